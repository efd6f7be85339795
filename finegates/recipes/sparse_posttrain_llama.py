"""Sparsify a pretrained Llama on plain text, without a task: `finegates posttrain`.

Perplexity before, with trained gates, pruned and reloaded; then a text that both models write.
Weights stay frozen: gates are trained, with biases where the model has them and the norms' gains.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from transformers import AutoModelForCausalLM

from .. import report
from ..surgery import architecture_of, gate_
from .arguments import PosttrainArguments, PosttrainTrainingArguments
from .job import couplings, gate_all, run_command
from .language import LanguageJob
from .models import load_causal_lm, load_tokenizer
from .text import load_text

_log = logging.getLogger("finegates")
_PROMPT = 16


class Posttrain(LanguageJob):
    """One run of the job; see `Job` for arguments and errors."""

    auto: ClassVar[Any] = AutoModelForCausalLM
    titles: ClassVar[dict[str, str]] = {"gated": "gated"}
    metric = "perplexity"

    def prepare(self) -> None:
        """Load tokenizer and text, and choose what is gated: the output embedding if asked for."""
        model = self.load_model()
        self.tokenizer = load_tokenizer(self.arguments.model)
        self.text = load_text(self.arguments, self.tokenizer, model.config, self.training.seed)
        config = gate_all(self.gate_config, model)
        if self.arguments.gate_head:
            head = model.get_output_embeddings()
            name = next(name for name, module in model.named_modules() if module is head)
            config = replace(
                config, modules=(*(config.modules or architecture_of(model).linears), name)
            )
        self.gate_config = config

    def run(self) -> report.Report:
        """Score, train, remove, reload, write and time; returns the report.

        Raises:
            RuntimeError: as `Job.remove` does.
        """
        dense = self.fresh_model()
        dense_row = report.Row(model="dense", score=self.score(dense))
        gated, gated_row = self.train(
            "gated", gate_(self.fresh_model(), self.gate_config), self.training.learning_rate
        )
        reloaded, removed_rows = self.remove(gated)
        models = {"dense": dense, "reloaded": reloaded}
        result = report.Report(
            job={**self.facts(), **couplings(reloaded)},
            metric=self.metric,
            rows=[dense_row, gated_row, *removed_rows],
            timings=self.latency(models, self.inputs()),
            layers=report.kept(gated, reloaded),
            samples={name: self._sample(model) for name, model in models.items()}
            if self.arguments.new_tokens
            else {},
            history=self.history,
        )
        removed = removed_rows[0].removed
        return self.write(
            result, f"{self.arguments.model}, {removed:.1%} of the gated weights removed"
        )

    def load_model(self) -> Any:
        """Return the pretrained model."""
        return load_causal_lm(self.arguments.model, self.arguments.dtype)

    @torch.inference_mode()
    def _sample(self, model: Any) -> str:
        """Return what the model makes of the evaluation text's beginning, greedily."""
        prompt = self.text.validation[0]["input_ids"][None, :_PROMPT].to(model.device)
        written = model.eval().generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=self.arguments.new_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
        )
        text: str = self.tokenizer.decode(written[0], skip_special_tokens=True)
        return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the job from command-line words; None takes those of the process.

    Raises:
        ValueError: a flag or an argument is wrong.
    """
    run_command(Posttrain, (PosttrainArguments, PosttrainTrainingArguments), "posttrain", arguments)
