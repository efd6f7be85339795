"""Count the instructions of the native kernels' inner loops.

python bench/loops.py build/native-*/kernel_avx512bf16.o

A turn of a loop is four units: 128 bytes of each panel. A ``tile`` is alone or one of several that
share weights. ``products`` are multiply-adds or dot products: at one 512-bit product a cycle (Zen
4; two on Zen 5) the least number of a turn's cycles. ``loads`` counts every read of memory (two a
cycle), ``stack`` those of them that are spills, ``other`` what is neither, nor a prefetch.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from collections import Counter
from pathlib import Path

KINDS = ("fp32", "bf16", "bf16 as dot products", "int8", "int8 as dot products")
FUNCTION = re.compile(r"tile<\(finegates::Kind\)(\d), (\d+), (\d+), (\d+), (\w+)>")
LINE = re.compile(r"^\s*([0-9a-f]+):\t(\S+)\s*(.*)$")
JUMP = re.compile(r"^([0-9a-f]+) <")
UNITS = 4  # of a turn
PARTS = (1, 2, 1, 4, 2)  # products of a kind for each unit


def disassemble(path: Path) -> dict[tuple[int, ...], list[tuple[int, str, str]]]:
    """Return (kind, rows, panels, vectors, alone) → each instruction's address, name, operands."""
    command = ["objdump", "-d", "--no-show-raw-insn", "-C", str(path)]
    functions: dict[tuple[int, ...], list[tuple[int, str, str]]] = {}
    lines: list[tuple[int, str, str]] = []
    for line in subprocess.check_output(command, text=True).splitlines():
        if line.endswith(">:"):
            lines = []
            if found := FUNCTION.search(line):
                *shape, alone = found.groups()
                functions[(*map(int, shape), alone == "true")] = lines
        elif found := LINE.match(line):
            lines.append((int(found[1], 16), found[2], found[3]))
    return functions


def is_product(name: str) -> bool:
    return name.startswith(("vfmadd", "vdpbf16"))


def turn(lines: list[tuple[int, str, str]], products: int) -> list[tuple[str, str]]:
    """Return the instructions between jumps that have so many products, empty if there are none."""
    runs: list[list[tuple[str, str]]] = [[]]
    targets = {int(found[1], 16) for _, _, operands in lines if (found := JUMP.match(operands))}
    for address, name, operands in lines:
        if address in targets:
            runs.append([])
        runs[-1].append((name, operands))
        if name.startswith("j"):
            runs.append([])
    return next((run for run in runs if sum(is_product(name) for name, _ in run) == products), [])


def count(run: list[tuple[str, str]]) -> Counter[str]:
    found: Counter[str] = Counter(all=len(run))
    for name, operands in run:
        prefetch = name.startswith("prefetch")
        reads = "(" in operands and not prefetch and not name.startswith(("lea", "nop"))
        found["products"] += is_product(name)
        found["loads"] += reads
        found["stack"] += reads and "(%rsp" in operands
        found["prefetches"] += prefetch
        found["other"] += not (is_product(name) or reads or prefetch)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("object", type=Path, help="a level's object file, from setup.py build_ext")
    arguments = parser.parse_args()
    columns = ["all", "products", "loads", "stack", "prefetches", "other"]
    heads = ["weights", "rows × panels", "tile", *columns]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    functions = disassemble(arguments.object)
    for (kind, rows, panels, vectors, alone), lines in sorted(functions.items()):
        run = turn(lines, UNITS * rows * panels * vectors * PARTS[kind])
        if vectors == 1 or not run:  # one vector: the narrow tile at the end of the last panel
            continue
        found = count(run)
        tile = "alone" if alone else "shared"
        cells = [KINDS[kind], f"{rows} × {panels}", tile, *(str(found[name]) for name in columns)]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
