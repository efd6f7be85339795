"""The ``finegates`` command: one subcommand per workflow."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

USAGE = """usage: finegates COMMAND [OPTIONS]

  finetune     fine-tune an encoder with gates, remove what closes, save, reload, time
  posttrain    the same for a pretrained Llama, on plain text
  pretrain     train a Llama from nothing and remove part of it on the way
  compare      run methods side by side over tasks, seeds and rates; tabulate them
  profile      where a pruned model's time goes, layer by layer, and why it isn't faster
  bench-model  a pruned model against every runtime of the dense one
  export       a pruned model as ONNX, OpenVINO or in its dense shapes
  info         what runs here and why (also: python -m finegates)

finegates COMMAND --help lists a command's options."""


def _finetune(arguments: Sequence[str]) -> None:
    from .recipes.finetune_glue import main

    main(arguments)


def _posttrain(arguments: Sequence[str]) -> None:
    from .recipes.sparse_posttrain_llama import main

    main(arguments)


def _pretrain(arguments: Sequence[str]) -> None:
    from .recipes.sparse_pretrain_llama import main

    main(arguments)


def _compare(arguments: Sequence[str]) -> None:
    from .recipes.compare import main

    main(arguments)


def _profile(arguments: Sequence[str]) -> None:
    from .recipes.profile_model import main

    main(arguments)


def _bench_model(arguments: Sequence[str]) -> None:
    from .recipes.bench_model import main

    main(arguments)


def _export(arguments: Sequence[str]) -> None:
    from .recipes.export_model import main

    main(arguments)


def _info(arguments: Sequence[str]) -> None:
    from .diagnosis import main

    if list(arguments) in (["-h"], ["--help"]):
        sys.stdout.write("usage: finegates info\n\nwhat runs here and why; it has no options\n")
        return
    if arguments:
        raise ValueError(f"it takes no options, got {' '.join(arguments)!r}")
    main()


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "finetune": _finetune,
    "posttrain": _posttrain,
    "pretrain": _pretrain,
    "compare": _compare,
    "profile": _profile,
    "bench-model": _bench_model,
    "export": _export,
    "info": _info,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; bad input ends in one line on standard error and exit status 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(USAGE + "\n")
        return 0
    command = COMMANDS.get(words[0])
    if command is None:
        sys.stderr.write(f"finegates: unknown command {words[0]!r}; finegates --help lists them\n")
        return 2
    try:
        command(words[1:])
    except (ValueError, OSError, FloatingPointError) as error:
        return _refuse(words[0], str(error))
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "finegates":
            raise
        return _refuse(words[0], f"{error}; pip install 'finegates[hf]' brings what it needs")
    return 0


def _refuse(command: str, reason: str) -> int:
    sys.stderr.write(f"finegates {command}: {' '.join(reason.split())}\n")
    return 2
