"""Real data beside the checkout, which a user's machine need not have."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def shared(name: str) -> Path:
    """Return a file or folder of ``shared/data`` in a folder above; skip the test without one."""
    for parent in ROOT.parents:
        path = parent / "shared" / "data" / name
        if path.exists():
            return path
    pytest.skip(f"no shared/data/{name} above {ROOT.name}")
