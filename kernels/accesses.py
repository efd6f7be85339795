"""Which operand each global load and store of a compiled kernel is of, and how many bytes it moves.

Read from Triton's LLVM IR, where every address leads back to the kernel's arguments through
``getelementptr``, ``phi`` and the like. NVIDIA's loads are inline PTX there, word for word what the
assembler gets; AMD's are LLVM loads and buffer intrinsics. An address that threads exchange through
shared memory, as a scatter's may be, leads to ``"unknown"``.
"""

import re
from collections import Counter
from collections.abc import Sequence

# Operand → bytes of one access → how many of them are in the code.
Widths = dict[str, dict[str, int]]

_BYTES = {"i8": 1, "half": 2, "bfloat": 2, "i16": 2, "float": 4, "i32": 4, "double": 8, "i64": 8}
_TYPE = r"(?P<type><\d+ x \w+>|\w+)"
_POINTER = r"ptr addrspace\([18]\) (?:\w+ )*(?P<pointer>%[\w.]+)"
_PTX = re.compile(
    r'asm sideeffect "[^"]*?(?<![a-z])(?P<op>ld|st|cp\.async\.c[ag]\.shared)\.global'
    r"(?P<rest>[^\"]*)\"[^(]*\(.*?" + _POINTER
)
_PTX_VECTOR = re.compile(r"(?:\.v(\d))?\.b(\d+)\b")
_PTX_COPY = re.compile(r"\], 0x(\w+)")
_LLVM = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        ("loads", rf"= (?:tail )?load {_TYPE}, {_POINTER}"),
        ("loads", rf"call {_TYPE} @llvm\.amdgcn\.raw\.ptr\.buffer\.load\S*\({_POINTER}"),
        ("stores", rf"\bstore {_TYPE} [^,]+, {_POINTER}"),
        ("stores", rf"@llvm\.amdgcn\.raw\.ptr\.buffer\.store\S*\({_TYPE} [^,]+, {_POINTER}"),
    )
)


def accesses(llir: str, operands: Sequence[str]) -> tuple[Widths, Widths]:
    """Return the loads and the stores of one kernel.

    Args:
        operands: the names of the kernel's arguments, in order, as far as it has them.

    Raises:
        ValueError: an address leads to none of them.
    """
    head = re.search(r"^define [^\n]*?@\w+_kernel\((.*)\) [^()]*\{$", llir, re.MULTILINE)
    if head is None:
        raise ValueError("no kernel is defined here")
    arguments = re.findall(r"(%[\w.]+)(?:,|$)", head[1])
    names = dict(zip(arguments, operands, strict=False))
    definitions = dict(re.findall(r"^\s*(%[\w.]+) = (.*)$", llir, re.MULTILINE))
    counts: dict[str, dict[str, Counter[str]]] = {"loads": {}, "stores": {}}
    for line in llir.splitlines():
        found = _access(line)
        if found is not None:
            kind, width, pointer = found
            (name,) = _origins(pointer, names, definitions)
            counts[kind].setdefault(name, Counter())[str(width)] += 1
    loads, stores = ({n: dict(c) for n, c in of.items()} for of in counts.values())
    return loads, stores


def _access(line: str) -> tuple[str, int, str] | None:
    """Return kind, bytes and pointer of the access that a line of LLVM IR makes, if it does."""
    ptx = _PTX.search(line)
    if ptx is not None:
        if ptx["op"].startswith("cp"):
            width = int(_PTX_COPY.search(ptx["rest"])[1], 16)  # type: ignore[index]
            return "loads", width, ptx["pointer"]
        vector = _PTX_VECTOR.search(ptx["rest"])
        width = int(vector[1] or 1) * int(vector[2]) // 8  # type: ignore[index]
        return "stores" if ptx["op"] == "st" else "loads", width, ptx["pointer"]
    for kind, pattern in _LLVM:
        found = pattern.search(line)
        if found is not None:
            *many, element = found["type"].strip("<>").split(" x ")
            return kind, int(many[0] if many else 1) * _BYTES[element], found["pointer"]
    return None


def _origins(pointer: str, names: dict[str, str], definitions: dict[str, str]) -> set[str]:
    """Return the arguments that an address leads back to."""
    origins, seen, left = set(), set(), [pointer]
    while left:
        value = left.pop()
        if value in seen:
            continue
        seen.add(value)
        if value in names:
            origins.add(names[value])
            continue
        definition = definitions.get(value, "")
        if definition.startswith("inttoptr"):
            origins.add("unknown")
            continue
        if definition.startswith("phi"):
            sources = re.findall(r"\[ (%[\w.]+),", definition)
        else:
            sources = re.findall(r"ptr addrspace\(\d\) (?:\w+ )*(%[\w.]+)", definition)
        if not sources:
            raise ValueError(f"{pointer} leads to {value} = {definition!r}")
        left += sources
    return origins
