"""Pruned models to optimize."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from finegates import GateConfig, gate_, prune_
from tiny_models import VOCABULARY, build, scatter_gates_


def pruned(model_type: str, **changes: Any) -> PreTrainedModel:
    """Return a tiny model with 30 % of its units closed at random and removed."""
    # An architecture that couples nothing needs patterns.
    config = GateConfig(modules=("*_lin", "*.lin1")) if model_type == "distilbert" else None
    model = gate_(build(model_type, **changes), config)
    scatter_gates_(model, 0.7)
    return prune_(model).eval()


def words(**options: Any) -> PreTrainedTokenizerFast:
    """Return a tokenizer of `tiny_models`' vocabulary: ``w3`` is token 3, and so on."""
    vocabulary = {f"w{i}": i for i in range(3, VOCABULARY)}
    vocabulary |= {"[PAD]": 0, "[UNK]": 1, "[MASK]": 2}
    tokens = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokens.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]",
        **options,
    )  # fmt: skip


def check_threads_serve_as_one_does(
    serve: Callable[[Tensor], Tensor], requests: Sequence[Tensor]
) -> None:
    """Four threads, a thousand mixed requests each: bitwise serial results, no memory lost."""
    serial = [serve(request) for request in requests]
    wrong: list[int] = []

    def work(worker: int, rounds: int) -> None:
        for i in range(worker, worker + rounds):
            at = i * 7 % len(requests)
            if not torch.equal(serve(requests[at]), serial[at]):
                wrong.append(at)

    def in_threads(rounds: int) -> int:
        workers = [threading.Thread(target=work, args=(i, rounds)) for i in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return resident()

    warm = in_threads(200)
    assert in_threads(1000) - warm < 8 << 20
    assert not wrong


def resident() -> int:
    """Bytes in memory of this process."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
