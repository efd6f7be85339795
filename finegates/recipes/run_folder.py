"""The output folder of a run: which run it belongs to, so that no other run writes into it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_NAME, _PART = "run.json", "run.part"


def check(folder: Path, identity: Mapping[str, Any], *, overwrite: bool) -> None:
    """Refuse a folder that isn't this run's to write; changes nothing.

    Args:
        folder: it need not exist.
        identity: JSON values that make two runs the same run.
        overwrite: whether another run's folder may be replaced.

    Raises:
        ValueError: the folder holds another run, a damaged ``run.json``, or files of nobody's run.
    """
    path = folder / _NAME
    if not path.exists():
        if folder.exists() and any(file.name != _PART for file in folder.iterdir()):
            raise ValueError(f"output_dir {str(folder)!r} holds files that no run wrote")
        return
    if overwrite:
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if found != json.loads(json.dumps(identity)):
        raise ValueError(
            f"output_dir {str(folder)!r} holds another run; name another folder or "
            "pass --overwrite_output_dir"
        )


def claim(folder: Path, identity: Mapping[str, Any], *, overwrite: bool) -> None:
    """Write the run's identity into its folder; arguments and errors as `check`."""
    check(folder, identity, overwrite=overwrite)
    path = folder / _NAME
    if overwrite and path.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / _PART
    part.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)
