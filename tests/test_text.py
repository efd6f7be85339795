"""Streaming text: documents, blocks, order, what is refused."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch.utils.data import DataLoader

from finegates.recipes import text
from finegates.recipes.arguments import TextArguments
from finegates.recipes.text import PackedText, file_documents, load_text, pack
from tiny_text import config, tokenizer, write_text


def documents(path: Path) -> list[str]:
    return ["".join(pieces) for pieces in file_documents(path)]


def test_documents_end_at_separators_and_files(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("third\n")
    (tmp_path / "a.txt").write_bytes("\ufefffirst\n\nline\n<|endoftext|>\nsecond\n".encode())
    (tmp_path / "other.md").write_text("not read")
    assert documents(tmp_path) == ["first\n\nline\n", "second\n", "third\n"]
    assert documents(tmp_path / "b.txt") == ["third\n"]


def test_a_long_document_comes_in_pieces_cut_at_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "_PIECE", 10)
    (tmp_path / "a.txt").write_text("one two\nthree\nfour five six\n<|endoftext|>\nend\n")
    first, second = (list(pieces) for pieces in file_documents(tmp_path / "a.txt"))
    assert first == ["one two\nthree\n", "four five six\n"]
    assert second == ["end\n"]
    assert documents(tmp_path / "a.txt") == ["one two\nthree\nfour five six\n", "end\n"]


def test_a_document_that_is_left_early_does_not_run_into_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "_PIECE", 1)
    (tmp_path / "a.txt").write_text("a\nb\n<|endoftext|>\nc\n")
    assert [next(iter(pieces)) for pieces in file_documents(tmp_path / "a.txt")] == ["a\n", "c\n"]


def test_blocks_run_on_and_every_document_begins_with_bos() -> None:
    blocks = list(pack([["w0 w1 ", "w2"], [" "], [], ["w3 w4 w5"]], tokenizer(), 4))
    assert blocks == [[1, 3, 4, 5], [1, 1, 6, 7]]
    plain = tokenizer()
    plain.bos_token = None
    assert list(pack([["w0 w1 w2"]], plain, 4)) == [[2, 3, 4, 5]]


def test_labels_leave_out_what_nothing_predicts() -> None:
    example = text.example([5, 6, 7])
    assert example["input_ids"].tolist() == [5, 6, 7]
    assert example["labels"].tolist() == [-100, 6, 7]


def stream(path: Path, **changes: Any) -> PackedText:
    return PackedText(lambda: file_documents(path), tokenizer(), 8, **changes)


def test_every_pass_is_another_order_of_the_same_blocks(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.txt", documents=10)
    blocks = list(stream(path).one_pass())
    count = len(blocks)
    seen = [row["input_ids"].tolist() for row in islice(stream(path, buffer=7, seed=3), 2 * count)]
    assert seen[:count] != blocks
    assert seen[:count] != seen[count:]
    assert sorted(seen[:count]) == sorted(seen[count:]) == sorted(blocks)
    again = [row["input_ids"].tolist() for row in islice(stream(path, buffer=7, seed=3), count)]
    assert again == seen[:count]
    other = [row["input_ids"].tolist() for row in islice(stream(path, buffer=7, seed=4), count)]
    assert other != again
    in_order = [row["input_ids"].tolist() for row in islice(stream(path, skip=2), count - 2)]
    assert in_order == blocks[2:]


# torch warns on a machine of one core.
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_take_turns(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.txt", documents=4)
    alone = [row["input_ids"] for row in islice(stream(path), 6)]
    loader = DataLoader(stream(path), batch_size=None, num_workers=2)
    together = [row["input_ids"] for row in islice(loader, 6)]
    assert torch.equal(torch.stack(alone), torch.stack(together))


def load(**changes: Any) -> text.TextData:
    arguments = TextArguments(block_size=16, validation_blocks=8, shuffle_buffer=0)
    for name, value in changes.items():
        setattr(arguments, name, value)
    return load_text(arguments, tokenizer(), config(), seed=0)


def test_evaluation_takes_its_file_or_the_start_of_training(tmp_path: Path) -> None:
    path = write_text(tmp_path / "train.txt")
    blocks = list(pack(file_documents(path), tokenizer(), 16))
    data = load(train_file=str(path))
    assert [row["input_ids"].tolist() for row in data.validation] == blocks[:8]
    assert next(data.train.one_pass()) == blocks[8]
    other = write_text(tmp_path / "dev.txt", documents=3, seed=5)
    data = load(train_file=str(path), validation_file=str(other))
    expected = list(pack(file_documents(other), tokenizer(), 16))[:8]
    assert [row["input_ids"].tolist() for row in data.validation] == expected
    assert next(data.train.one_pass()) == blocks[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "one of dataset and train_file must be given, got None and None"),
        ({"dataset": "a", "train_file": "b"}, "one of dataset and train_file .* got 'a' and 'b'"),
        ({"train_file": "/no/such"}, "train_file must be a text file or a folder .*'/no/such'"),
        ({"validation_file": "/no"}, "validation_file must be a text file or .* got '/no'"),
        ({"block_size": 65}, "block_size must be between 2 and 64, got 65"),
        ({"block_size": 1}, "block_size must be between 2 and 64, got 1"),
        ({"validation_blocks": 0}, "validation_blocks must be at least 1, got 0"),
        ({"shuffle_buffer": -1}, "shuffle_buffer must be at least 0, got -1"),
        ({"validation_blocks": 10_000}, "must have more than 10000 blocks of 16 tokens; name a"),
    ],
)
def test_bad_arguments(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    if changes and not {"dataset", "train_file"} & set(changes):
        changes = {"train_file": str(write_text(tmp_path / "a.txt")), **changes}
    with pytest.raises(ValueError, match=message):
        load(**changes)


def test_broken_and_empty_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"w1 w2\nw3 \xff\n")
    with pytest.raises(ValueError, match=r"a\.txt line 2: not UTF-8 \(invalid start byte\)"):
        load(train_file=str(tmp_path))
    (tmp_path / "a.txt").write_bytes(b"w1 w2\n")
    with pytest.raises(ValueError, match="the text for evaluation has no 16 tokens"):
        load(train_file=str(tmp_path))


def test_text_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"text": ["w1 " * 40, "w2 " * 40], "title": ["a", "b"]}
    found: dict[str, Any] = {"train": rows, "test": {**rows, "text": ["w3 " * 40] * 2}}
    asked = []

    def fake(path: str, name: str | None, streaming: bool) -> Any:
        asked.append((path, name, streaming))
        return {
            split: datasets.Dataset.from_dict(columns).to_iterable_dataset()
            for split, columns in found.items()
        }

    monkeypatch.setattr(datasets, "load_dataset", fake)
    data = load(dataset="some/text:en")
    assert asked == [("some/text", "en", True)]
    assert data.validation[0]["input_ids"].tolist() == [1, *[6] * 15]
    assert next(iter(data.train))["input_ids"].tolist() == [1, *[4] * 15]
    with pytest.raises(ValueError, match="text_column must be one of text, title, got 'content'"):
        load(dataset="some/text", text_column="content")
    del found["train"]
    with pytest.raises(ValueError, match="'some/text' must have a split 'train', got test"):
        load(dataset="some/text")


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach the hub\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", fake)
    with pytest.raises(OSError, match="^dataset 'some/text' can't be loaded .*reach the hub$"):
        load(dataset="some/text")
