"""``python -m finegates``: the command, and without arguments what runs here and why."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["info"]))
