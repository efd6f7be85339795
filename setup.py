"""Build of the native module: one ninja file, one object for each instruction set.

``FINEGATES_NO_NATIVE=1`` or a missing compiler gives a pure Python package that runs on PyTorch.
``CXX``, ``CXXFLAGS`` and ``LDFLAGS`` are honoured (a sanitizer build needs nothing else).
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
PACKAGES = [
    "finegates",
    "finegates.nn",
    "finegates.surgery",
    "finegates.ops",
    "finegates.hf",
    "finegates.recipes",
    "finegates.recipes.llama",  # configs only
    "finegates.report",
    "finegates.serving",
    "finegates.export",
    "finegates.kernels",
]
BASE_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra"
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma"
# Each file is compiled with what its level may use and nothing more, and exports its table alone:
# a personality routine for exceptions, which no kernel throws, would be a weak symbol beside it.
# gcc 12 warns about its own AVX-512 header (GCC bug 105593).
LEVEL_FLAGS = "-fno-exceptions"
ISA_FLAGS = {
    "kernel_avx2.cpp": "-mavx2 -mfma",
    "kernel_avx512.cpp": f"{AVX512} -Wno-uninitialized -Wno-maybe-uninitialized",
    "kernel_avx512bf16.cpp": (
        f"{AVX512} -mavx512vbmi -mavx512vbmi2 -mavx512bf16 "
        "-Wno-uninitialized -Wno-maybe-uninitialized"
    ),
}
ARCH_SOURCES = {
    "x86_64": ["kernel_avx2.cpp", "kernel_avx512.cpp", "kernel_avx512bf16.cpp"],
    "aarch64": ["kernel_neon.cpp"],
    "arm64": ["kernel_neon.cpp"],
}
COMMON = [
    "decoder.cpp",
    "encoder_layer.cpp",
    "isa.cpp",
    "kernel_generic.cpp",
    "layout.cpp",
    "module.cpp",
    "probe.cpp",
    "pruned_linear.cpp",
]


def sources(machine: str) -> list[str]:
    """Return the sources of a machine's levels, sorted for a reproducible build."""
    return sorted(COMMON + ARCH_SOURCES.get(machine, []))


def compiler() -> str | None:
    """Return the C++ compiler's command, or None."""
    if "CXX" in os.environ:
        return os.environ["CXX"]
    return next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def no_native_reason() -> str | None:
    """Return why no native module is built, or None."""
    if os.environ.get("FINEGATES_NO_NATIVE", "0") not in ("", "0"):
        return "FINEGATES_NO_NATIVE is set"
    if sys.platform == "win32":
        return "no native build for Windows yet"
    command = compiler()
    if command is None or shutil.which(shlex.split(command)[0]) is None:
        return f"no C++ compiler found (tried {command or 'c++, g++, clang++'})"
    return None


def escape(path: Path | str) -> str:
    """Return a path for a build line of ninja, which quotes it for the shell where it must."""
    return re.sub(r"[$: ]", r"$\g<0>", str(path))


def ninja_file(names: list[str], target: Path, cflags: str, ldflags: str) -> str:
    """Return the text of build.ninja; paths are absolute, so it runs from any folder."""
    openmp = "" if sys.platform == "darwin" else "-fopenmp"
    lines = [
        f"cxx = {compiler()}",
        f"cflags = {BASE_FLAGS} {openmp} {cflags} {os.environ.get('CXXFLAGS', '')}",
        f"ldflags = {openmp} {ldflags} {os.environ.get('LDFLAGS', '')}",
        "rule compile",
        "  command = $cxx $cflags $isa -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $in",
        "rule link",
        "  command = $cxx $in $ldflags -o $out",
        "  description = link $out",
    ]
    objects = []
    for name in names:
        source = (ROOT / "csrc" / name).resolve()
        objects.append(escape(target.parent / f"{source.stem}.o"))
        level = f"{LEVEL_FLAGS} {ISA_FLAGS.get(name, '')}" if name.startswith("kernel_") else ""
        lines += [f"build {objects[-1]}: compile {escape(source)}", f"  isa = {level}"]
    output = escape(target)
    lines += [f"build {output}: link {' '.join(objects)}", f"default {output}", ""]
    return "\n".join(lines)


def run_ninja(text: str, folder: Path) -> None:
    """Build what the text says; SystemExit with a hint when that fails."""
    import ninja

    (folder / "build.ninja").write_text(text)
    command = [os.path.join(ninja.BIN_DIR, "ninja"), "-C", str(folder)]
    try:
        subprocess.run(command, check=True)
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            f"finegates: the native build failed ({error}); "
            "FINEGATES_NO_NATIVE=1 installs without it"
        ) from error


def module_file(target: Path) -> str:
    """Return build.ninja for the Python module."""
    import pybind11

    mac = sys.platform == "darwin"
    # Hidden visibility does not reach std:: templates; the export list does.
    exports = target.parent / ("exports.txt" if mac else "exports.map")
    exports.write_text("_PyInit__C\n" if mac else "{ global: PyInit__C; local: *; };\n")
    includes = [pybind11.get_include(), sysconfig.get_path("include")]
    return ninja_file(
        sources(platform.machine()),
        target,
        shlex.join(["-DNDEBUG", *(f"-I{folder}" for folder in includes)]),
        shlex.join(
            ["-shared", "-undefined", "dynamic_lookup", f"-Wl,-exported_symbols_list,{exports}"]
            if mac
            else ["-shared", f"-Wl,--version-script={exports}", "-Wl,--strip-debug"]
        ),
    )


def install(built: Path, target: Path) -> None:
    """Copy under a temporary name, then rename: another process may have the old file mapped."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copy2(built, temporary)
    os.replace(temporary, target)


class NinjaBuildExt(build_ext):
    """build_ext that leaves compiling, and knowing what is stale, to ninja."""

    def build_extension(self, ext: Extension) -> None:
        """Run ninja in ``build/native-<platform>`` (kept between builds) and copy the module."""
        target = Path(self.get_ext_fullpath(ext.name))
        tag = f"native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        folder = ROOT / "build" / tag
        folder.mkdir(parents=True, exist_ok=True)
        run_ninja(module_file(folder / target.name), folder)
        install(folder / target.name, target)

    def copy_extensions_to_source(self) -> None:
        """Put the module beside the Python files (``--inplace`` and editable installs)."""
        for ext in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(ext.name)
            install(built, ROOT / self.get_ext_filename(ext.name))


class BuildPy(build_py):
    """build_py that notes in the package why it has no native module (finegates/_native.py)."""

    def run(self) -> None:
        """Copy the Python files and write the note, or remove an older build's."""
        super().run()
        folder = ROOT if self.editable_mode else Path(self.build_lib)
        note = folder / "finegates" / "_native_reason.txt"
        if reason is None:
            note.unlink(missing_ok=True)
        else:
            note.write_text(f"{reason}\n", encoding="utf-8")


class BuildFuzz(Command):
    """Build tests/native_fuzz.cpp with the native core: no Python, no OpenMP, any sanitizer.

    ``CXX=aarch64-linux-gnu-g++ LDFLAGS=-static setup.py build_fuzz --machine aarch64`` is one for
    qemu-user. OpenMP stays out because libgomp is not instrumented for ThreadSanitizer: teams are
    of three std::threads (csrc/parallel.h).
    """

    user_options = [("folder=", None, "where to build"), ("machine=", None, "target machine")]

    def initialize_options(self) -> None:
        """Set the defaults."""
        self.folder = "build/fuzz"
        self.machine = platform.machine()

    def finalize_options(self) -> None:
        """Make the folder absolute."""
        self.folder = Path(self.folder).resolve()

    def run(self) -> None:
        """Write the executable ``native_fuzz`` into the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        names = [name for name in sources(self.machine) if name != "module.cpp"]
        names.append("../tests/native_fuzz.cpp")
        target = self.folder / "native_fuzz"
        flags = "-g -fno-openmp -DFINEGATES_STD_THREADS=3"
        run_ninja(ninja_file(names, target, flags, "-pthread -fno-openmp"), self.folder)


reason = no_native_reason()
if reason is not None:
    sys.stderr.write(f"finegates: building without the native module: {reason}\n")

setup(
    packages=PACKAGES,
    package_data={"finegates.recipes.llama": ["*.json"]},
    ext_modules=[]
    if reason
    else [Extension("finegates._C", [f"csrc/{name}" for name in sources(platform.machine())])],
    cmdclass={"build_ext": NinjaBuildExt, "build_fuzz": BuildFuzz, "build_py": BuildPy},
)
