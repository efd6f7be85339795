"""Streaming text: documents from the hub or from files, as blocks of token ids of one length."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from .arguments import TextArguments
from .tasks import decoded_lines
from .tokens import max_positions

SEPARATOR = "<|endoftext|>"
# Characters that are tokenized at once: long enough that the calls cost nothing, short enough to
# stream. A document is only cut between two lines.
_PIECE = 1 << 15

Documents = Callable[[], Iterator[Iterable[str]]]


@dataclass(frozen=True)
class TextData:
    """Text as a language model's Trainer takes it.

    Args:
        train: an endless stream of blocks.
        validation: blocks in order.
    """

    train: PackedText
    validation: list[dict[str, torch.Tensor]]


class PackedText(IterableDataset[dict[str, torch.Tensor]]):
    """An endless stream of blocks; every pass over the documents is shuffled anew.

    A block is ``input_ids`` and ``labels`` [block_size], int64. The order depends on the seed
    alone, so that a resumed run that skips what it has seen goes on as if it had not stopped.
    Workers of a DataLoader take turns.

    Args:
        documents: begins a new pass over the documents, each in pieces.
        tokenizer: a transformers tokenizer.
        block_size: tokens per block.
        skip: blocks at the start of every pass that are left out.
        buffer: blocks among which the next one is drawn; 0 keeps the order.
        seed: of the order.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: Any,
        block_size: int,
        skip: int = 0,
        buffer: int = 0,
        seed: int = 0,
    ) -> None:
        self.documents, self.tokenizer, self.block_size = documents, tokenizer, block_size
        self.skip, self.buffer, self.seed = skip, buffer, seed

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return islice(self._endless(), first, None, step)

    def one_pass(self) -> Iterator[list[int]]:
        """Yield the blocks of one pass in order, without those that are skipped."""
        return islice(pack(self.documents(), self.tokenizer, self.block_size), self.skip, None)

    def _endless(self) -> Iterator[dict[str, torch.Tensor]]:
        generator = random.Random(self.seed)
        while True:
            yield from map(example, _shuffled(self.one_pass(), self.buffer, generator))


def load_text(arguments: TextArguments, tokenizer: Any, config: Any, seed: int) -> TextData:
    """Load training and evaluation text.

    Args:
        arguments: which text, and how it is cut.
        tokenizer: a transformers tokenizer.
        config: the model's; its positions bound ``block_size``.
        seed: of the training order.

    Raises:
        ValueError: no text or two are named, a file is missing or no UTF-8 (names file and line),
            the column doesn't exist, ``block_size`` is too long for the model, or there is too
            little text.
        OSError: the hub can't be reached.
    """
    limit = max_positions(config)
    if not 2 <= arguments.block_size <= limit:
        raise ValueError(f"block_size must be between 2 and {limit}, got {arguments.block_size}")
    for name, least in (("validation_blocks", 1), ("shuffle_buffer", 0)):
        if getattr(arguments, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(arguments, name)}")
    train, validation = _sources(arguments)
    wanted = arguments.validation_blocks
    blocks = pack((train if validation is None else validation)(), tokenizer, arguments.block_size)
    held_out = list(islice(blocks, wanted))
    if not held_out:
        raise ValueError(f"the text for evaluation has no {arguments.block_size} tokens")
    stream = PackedText(
        train,
        tokenizer,
        arguments.block_size,
        skip=wanted if validation is None else 0,
        buffer=arguments.shuffle_buffer,
        seed=seed,
    )
    if next(stream.one_pass(), None) is None:
        raise ValueError(
            f"the training text must have more than {stream.skip} blocks of "
            f"{arguments.block_size} tokens; name a validation_file or lower validation_blocks"
        )
    return TextData(stream, [example(block) for block in held_out])


def pack(
    documents: Iterable[Iterable[str]], tokenizer: Any, block_size: int
) -> Iterator[list[int]]:
    """Yield blocks of ``block_size`` token ids that run on over the ends of documents.

    Every document begins with the tokenizer's first token (BOS), or its last one (EOS) where there
    is none. An incomplete last block is dropped.
    """
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    tokens: list[int] = []
    for document in documents:
        for number, piece in enumerate(document):
            tokens += [begin] if number == 0 and begin is not None else []
            tokens += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
            whole = len(tokens) - len(tokens) % block_size
            for start in range(0, whole, block_size):
                yield tokens[start : start + block_size]
            tokens = tokens[whole:]


def example(block: list[int]) -> dict[str, torch.Tensor]:
    """Return a block as the Trainer takes it; the first token is predicted from nothing."""
    ids = torch.tensor(block)
    # Ignored by the model too, but counted by the Trainer, which divides the loss by the count.
    return {"input_ids": ids, "labels": torch.cat([torch.tensor([-100]), ids[1:]])}


def file_documents(path: Path) -> Iterator[Iterator[str]]:
    """Yield the documents of a text file, or of a folder's ``.txt`` files, each in pieces.

    A document ends with its file or at a line that is ``<|endoftext|>``.

    Raises:
        ValueError: a line is no UTF-8; names file and line.
    """
    for file in sorted(path.glob("*.txt")) if path.is_dir() else [path]:
        lines = (line for _, line in decoded_lines(file))
        for first in lines:
            document = _until_separator(first, lines)
            yield _pieces(document)
            # What the reader left of this document isn't the start of the next one.
            for _ in document:
                pass


def _until_separator(first: str, lines: Iterator[str]) -> Iterator[str]:
    line: str | None = first
    while line is not None and line.strip() != SEPARATOR:
        yield line
        line = next(lines, None)


def _pieces(lines: Iterable[str]) -> Iterator[str]:
    piece: list[str] = []
    size = 0
    for line in lines:
        piece.append(line)
        size += len(line)
        if size >= _PIECE:
            yield "".join(piece)
            piece, size = [], 0
    text = "".join(piece)
    if text.strip():
        yield text


def _sources(arguments: TextArguments) -> tuple[Documents, Documents | None]:
    """Return training and evaluation text; None where the evaluation takes the training text."""
    if (arguments.dataset is None) == (arguments.train_file is None):
        raise ValueError(
            "one of dataset and train_file must be given, got "
            f"{arguments.dataset!r} and {arguments.train_file!r}"
        )
    files = {}
    for name in ("train_file", "validation_file"):
        value = getattr(arguments, name)
        if value is not None:
            path = Path(value)
            if not (path.is_file() or any(path.glob("*.txt"))):
                raise ValueError(f"{name} must be a text file or a folder of them, got {value!r}")
            files[name] = path
    train = files.get("train_file")
    validation = files.get("validation_file")
    named = None if validation is None else lambda: file_documents(validation)
    if train is not None:
        return (lambda: file_documents(train)), named
    rows = _hub_splits(str(arguments.dataset), arguments.text_column)
    streams = {
        split: lambda split=split: ([row[arguments.text_column]] for row in rows[split])
        for split in rows
    }
    own = next((streams[split] for split in ("validation", "test") if split in streams), None)
    return streams["train"], named or own


def _hub_splits(dataset: str, column: str) -> Any:
    import datasets

    name, _, config = dataset.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, streaming=True)
    except Exception as error:  # hub errors have no common class besides Exception
        reason = str(error).strip().partition("\n")[0]
        raise OSError(f"dataset {dataset!r} can't be loaded from the hub: {reason}") from error
    if "train" not in rows:
        raise ValueError(f"dataset {dataset!r} must have a split 'train', got {', '.join(rows)}")
    columns = rows["train"].column_names or list(next(iter(rows["train"]), {}))
    if column not in columns:
        raise ValueError(f"text_column must be one of {', '.join(columns)}, got {column!r}")
    return rows


def _shuffled(
    blocks: Iterator[list[int]], buffer: int, generator: random.Random
) -> Iterator[list[int]]:
    held = list(islice(blocks, buffer))
    if buffer:
        for block in blocks:
            at = generator.randrange(len(held))
            yield held[at]
            held[at] = block
        generator.shuffle(held)
    yield from held if buffer else blocks
