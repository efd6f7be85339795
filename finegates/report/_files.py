"""Files that appear whole."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary name beside the path, renamed to it at the end."""
    target = Path(path)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".finegates-") as folder:
        temporary = Path(folder, target.name)
        yield temporary
        os.replace(temporary, target)
