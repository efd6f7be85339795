"""Train a Llama from nothing and remove part of it on the way: `finegates pretrain`.

All weights are trained. Gates are open until a chosen step, then close along the ramp; what is left
goes on training. With ``--compare`` the same model is trained without gates first, on the same
blocks in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from .. import report
from ..surgery import architecture_of, gate_
from .arguments import PretrainArguments, PretrainTrainingArguments
from .job import couplings, run_command
from .language import LanguageJob
from .models import load_tokenizer
from .text import load_text

CONFIGS = Path(__file__).parent / "llama"


class Pretrain(LanguageJob):
    """One run of the job; see `Job` for arguments and errors."""

    titles: ClassVar[dict[str, str]] = {"dense": "dense", "gated": "gated"}
    metric = "loss"

    def prepare(self) -> None:
        """Load config, tokenizer and text, and choose what is gated and from which step on."""
        self.tokenizer = load_tokenizer(self.arguments.tokenizer)
        self.config = load_config(self.arguments.config, self.tokenizer)
        self.text = load_text(self.arguments, self.tokenizer, self.config, self.training.seed)
        steps, start = self.training.max_steps, self.arguments.gate_start
        warmup = start if start < 1 else start / steps
        if not 0.0 <= warmup < 1.0:
            raise ValueError(
                f"gate_start must be below max_steps={steps} and not negative, got {start}"
            )
        modules = self.gate_config.modules
        if not self.arguments.gate_down_proj:
            with torch.device("meta"):
                names = modules or architecture_of(self.load_model()).linears
            modules = tuple(name for name in names if not name.endswith("down_proj"))
        ramp = min(self.gate_config.ramp, 1.0 - warmup)
        self.gate_config = replace(
            self.gate_config, modules=modules, warmup=warmup, ramp=ramp,
            train_weight=True, trainable=("*",),
        )  # fmt: skip

    def run(self) -> report.Report:
        """Train, remove, reload and time; writes the folder and returns its report.

        Raises:
            RuntimeError: as `Job.remove` does.
        """
        rate = self.training.learning_rate
        dense, dense_row = self.fresh_model(), None
        if self.arguments.compare:
            dense, dense_row = self.train("dense", dense, rate)
        gated, gated_row = self.train("gated", gate_(self.fresh_model(), self.gate_config), rate)
        reloaded, removed_rows = self.remove(gated)
        ratios = {}
        if dense_row is not None:
            ratios["loss"] = gated_row.score / dense_row.score
            if gated_row.step and dense_row.step:
                ratios["training step"] = gated_row.step / dense_row.step
        result = report.Report(
            job={**self.facts(), **couplings(reloaded)},
            metric=self.metric,
            rows=[*([] if dense_row is None else [dense_row]), gated_row, *removed_rows],
            timings=self.latency({"dense": dense, "reloaded": reloaded}, self.inputs()),
            layers=report.kept(gated, reloaded),
            ratios=ratios,
            history=self.history,
        )
        removed = removed_rows[0].removed
        return self.write(
            result, f"{self.arguments.config}, {removed:.1%} of the gated weights removed"
        )

    def load_model(self) -> Any:
        """Return a model of the config with random weights."""
        return LlamaForCausalLM(self.config)


def load_config(name: str, tokenizer: Any) -> LlamaConfig:
    """Return a Llama's config with the tokenizer's vocabulary.

    Args:
        name: ``"llama_9m"`` … ``"llama_7b"``, which the package ships, or a config.json. The
            shipped ones have the sizes of ReLoRA (Lialin et al. 2023, arXiv 2307.05695) and GaLore
            (Zhao et al. 2024, arXiv 2403.03507).
        tokenizer: sets ``vocab_size`` and the special tokens.

    Raises:
        ValueError: there is no such file, or it is no JSON of a Llama.
    """
    path = CONFIGS / f"{name}.json" if (CONFIGS / f"{name}.json").is_file() else Path(name)
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.json")))
        raise ValueError(f"config must be one of {shipped}, or a file, got {name!r}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(values, dict) or values.get("model_type") != "llama":
        raise ValueError(f"{path}: model_type must be 'llama'")
    tokens = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos")}
    return LlamaConfig(**{**values, **tokens, "pad_token_id": None, "vocab_size": len(tokenizer)})


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the job from command-line words; None takes those of the process.

    Raises:
        ValueError: a flag or an argument is wrong.
    """
    run_command(Pretrain, (PretrainArguments, PretrainTrainingArguments), "pretrain", arguments)
