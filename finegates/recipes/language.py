"""What both jobs on language models share: streaming text, and a score from the loss."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor
from transformers import AutoModelForCausalLM, default_data_collator

from .job import Job
from .text import TextData


class LanguageJob(Job):
    """A job whose metric is ``"loss"``, the mean cross entropy in nats, or ``"perplexity"``."""

    auto: ClassVar[Any] = AutoModelForCausalLM
    text: TextData

    def trainer_fields(self) -> dict[str, Any]:
        """Return the stream of training blocks and the blocks for evaluation."""
        return {
            "train_dataset": self.text.train,
            "eval_dataset": self.text.validation,
            "data_collator": default_data_collator,
        }

    def score(self, model: Any) -> float:
        """Return the metric on the evaluation blocks."""
        loss = self.metrics(model, self.text.validation)["eval_loss"]
        return math.exp(loss) if self.metric == "perplexity" else loss

    def inputs(self) -> dict[str, dict[str, Tensor]]:
        """Return one token, and a block, for `report.latency`."""
        ids = self.text.validation[0]["input_ids"][None]
        return {f"{n} tokens": {"input_ids": ids[:, :n]} for n in (1, ids.shape[1])}
