"""Fetching one pinned file of the package index, offline, with the real pip."""

import base64
import hashlib
import zipfile

import pytest

from finegates.recipes import _fetch
from finegates.recipes._fetch import PackageFile, fetch

PAYLOAD = b"one\ntwo\n"


@pytest.fixture
def pin(tmp_path, monkeypatch):
    """A pinned wheel on a local index that stands for the package index: the real pip, offline."""
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "fgdemo-1.0-py3-none-any.whl"
    files = {
        "fgdemo/payload.txt": PAYLOAD,
        "fgdemo-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: fgdemo\nVersion: 1.0\n",
        "fgdemo-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\n"
        b"Root-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(content)}\n"
    files["fgdemo-1.0.dist-info/RECORD"] = record.encode()
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("FINEGATES_CACHE", str(tmp_path / "cache"))
    return PackageFile("fgdemo", "1.0", wheel.name, hashlib.sha256(wheel.read_bytes()).hexdigest())


def take_payload(archive, folder):
    with zipfile.ZipFile(archive) as files:
        (folder / "payload.txt").write_bytes(files.read("fgdemo/payload.txt"))


def no_network(*_, **__):
    raise AssertionError("pip was called")


def test_fetch_extracts_once_and_then_needs_no_pip(pin, monkeypatch, tmp_path):
    folder = fetch(pin, take_payload)
    assert (folder / "payload.txt").read_bytes() == PAYLOAD
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["fgdemo-1.0"]
    monkeypatch.setattr(_fetch.subprocess, "run", no_network)
    assert fetch(pin, take_payload) == folder


@pytest.mark.parametrize("damage", ["changed", "truncated", "missing"])
def test_fetch_names_the_damaged_file(pin, damage):
    file = fetch(pin, take_payload) / "payload.txt"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(PAYLOAD[:3] if damage == "truncated" else PAYLOAD + b"!")
    with pytest.raises(ValueError, match=r"payload\.txt: sha256 must be .*; delete .*fgdemo-1\.0"):
        fetch(pin, take_payload)


def test_fetch_refuses_a_folder_without_sums(pin):
    (fetch(pin, take_payload) / _fetch.SUMS).unlink()
    with pytest.raises(ValueError, match="SHA256SUMS is missing; delete"):
        fetch(pin, take_payload)


def test_fetch_refuses_a_wrong_hash_and_leaves_nothing(pin, tmp_path):
    wrong = PackageFile(pin.name, pin.version, pin.filename, "0" * 64)
    with pytest.raises(OSError, match=f"can't fetch fgdemo 1.0.*{'0' * 64}.*{pin.sha256}"):
        fetch(wrong, take_payload)
    assert list((tmp_path / "cache").iterdir()) == []


def test_fetch_gives_pips_reason(pin):
    absent = PackageFile("fgdemo", "2.0", "fgdemo-2.0-py3-none-any.whl", pin.sha256)
    with pytest.raises(OSError, match="can't fetch fgdemo 2.0 .*: No matching distribution"):
        fetch(absent, take_payload)


def test_fetch_leaves_nothing_when_extraction_fails(pin, tmp_path):
    def fail(archive, folder):
        (folder / "half").write_text("half")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fetch(pin, fail)
    assert list((tmp_path / "cache").iterdir()) == []


def test_fetch_yields_to_a_faster_process(pin):
    def slow(archive, folder):
        fetch(pin, take_payload)
        take_payload(archive, folder)

    assert (fetch(pin, slow) / "payload.txt").read_bytes() == PAYLOAD
