"""Run tests on a GPU and keep what became of each, beside the tables of the card.

``python bench/gpu_tests.py tests/test_triton_gpu.py`` takes pytest's arguments, with one file, and
writes ``test_triton_gpu.txt``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from gpu_clock import folder_of


def run(arguments: list[str], folder: Path) -> int:
    """Run pytest, print what it says and keep it in ``folder``; return its exit status."""
    script = next(Path(argument) for argument in arguments if argument.endswith(".py"))
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "--show-capture=no", *arguments]
    with (
        (folder / f"{script.stem}.txt").open("w") as file,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process,
    ):
        for line in process.stdout or ():
            sys.stdout.write(line)
            file.write(line)
    return process.returncode


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.stderr.write("no GPU here\n")
        raise SystemExit(2)
    raise SystemExit(run(sys.argv[1:], folder_of(torch.cuda.get_device_name())))
