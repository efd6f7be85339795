"""Trainers that stop where a run can't go on, and keep what the figures are drawn from."""

from __future__ import annotations

import logging
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..hf.trainer import GatedTrainer
from ..report import gate_histogram
from ..surgery import GateMap
from .checkpoints import last_complete

# Keys of our own in a log entry.
SECONDS, GATES = "step_seconds", "gates"


class StageTrainer(Trainer):
    """transformers' Trainer that stops at a loss or weight that is no number.

    Every log entry of training carries the mean seconds of a step since the last one. A
    checkpoint that can't be written whole is taken away again.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(StepTimes())

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the loss of one batch, after its backward.

        Raises:
            FloatingPointError: it isn't finite; names the step and the last good checkpoint.
        """
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        # The Trainer asks the same of every loss, to leave it out of the log.
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}; "
                f"{self._last_good()}"
            )
        return loss

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not torch.isfinite(parameter).all():
                raise FloatingPointError(
                    f"{name} isn't finite after step {step}; {self._last_good()}"
                )
        try:
            super()._save_checkpoint(model, trial)
        # What a full disk raises: safetensors' own error, torch.save's RuntimeError, or OSError.
        except (OSError, RuntimeError, SafetensorError) as error:
            folder = Path(str(self.args.output_dir), f"checkpoint-{step}")
            shutil.rmtree(folder, ignore_errors=True)
            raise OSError(f"{folder} can't be written: {error}; {self._last_good()}") from error

    def _last_good(self) -> str:
        found = last_complete(Path(str(self.args.output_dir)))
        return "there is no checkpoint" if found is None else f"the last good checkpoint is {found}"


class GatedStageTrainer(StageTrainer, GatedTrainer):
    """`GatedTrainer` with the same, and a histogram of the gates in every log entry of training."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(GateHistograms())


class StepTimes(TrainerCallback):
    """Adds the mean seconds of a training step, evaluations left out, to the log's history."""

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        self._seconds.append(time.perf_counter() - self._began)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Add to the newest entry, which the Trainer has put there just before."""
        if self._seconds and "loss" in state.log_history[-1]:
            state.log_history[-1][SECONDS] = statistics.fmean(self._seconds)
            self._seconds.clear()


class GateHistograms(TrainerCallback):
    """Adds the gates' histogram to the log's history, which checkpoints hold."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Add to the newest entry."""
        if "loss" in state.log_history[-1]:
            state.log_history[-1][GATES] = gate_histogram(GateMap(model))  # type: ignore[assignment]


def step_seconds(history: Sequence[Mapping[str, Any]]) -> float | None:
    """Return a step's mean seconds, the median over the last fifth of a run's log entries."""
    seconds = [entry[SECONDS] for entry in history if SECONDS in entry]
    return statistics.median(seconds[-max(1, len(seconds) // 5) :]) if seconds else None


@contextmanager
def quiet_about_ties(model: torch.nn.Module) -> Iterator[None]:
    """Hide the Trainer's warning that a checkpoint lacks the further names of shared parameters."""
    owners: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    further = [n for n, tensor in state.items() if owners.setdefault(id(tensor), n) != n]
    expected = f"There were missing keys in the checkpoint model loaded: {further}."
    logger = logging.getLogger("transformers.trainer")

    def other(record: logging.LogRecord) -> bool:
        return record.getMessage() != expected

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)
