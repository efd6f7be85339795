"""Gates in transformers' Trainer: a callback for the schedule, optimizer settings for logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..gates import Gate
from ..surgery import GateController, GateMap, replicate_


class GateCallback(TrainerCallback):
    """Runs a `GateController` inside any transformers Trainer.

    Gradient accumulation, mixed precision and resuming stay the Trainer's own: the callback acts
    once per optimizer step, and a checkpoint of the model holds all of its state.
    """

    controller: GateController | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Build the controller; a fresh run starts its schedule, a resumed one goes on.

        Raises:
            ValueError: the Trainer gave no model, or one without gates.
        """
        if model is None:
            raise ValueError("model must be given by the Trainer, got None")
        self.controller = GateController(model, state.max_steps)
        if state.global_step == 0:
            self.controller.start()

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Choose whether the step computes with the whole weights or with what is left."""
        if self.controller is not None:
            self.controller.begin_step(state.global_step)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Collect importance or add the penalty's gradient."""
        if self.controller is not None:
            self.controller.before_step(state.global_step)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Meet the step's budget."""
        if self.controller is not None:
            self.controller.after_step(state.global_step)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Meet the final budget, and log what that removed which was not removed before.

        A run that stops before its target was reached leaves the gates where the schedule was.
        """
        if self.controller is not None and self.controller.at_target(state.global_step):
            self.controller.finish()
            hardened = {"hardened": self.controller.hardened, "step": state.global_step}
            state.log_history.append(hardened)


class GatedTrainer(Trainer):
    """transformers' Trainer for a gated model: adds `GateCallback` and logs how the gates do.

    The logits form an optimizer group of their own with ``gate_learning_rate`` and no weight decay,
    and so do the LoRA's factors where ``lora_learning_rate`` is set.
    Takes the arguments of `transformers.Trainer`; the model must have been through `gate_`. Under
    FSDP the logits stay whole on every process, see `replicate_`.

    With ``load_best_model_at_end``, ``save_strategy="best"`` or early stopping, evaluations count
    from the step on at which the schedule has reached ``sparsity``: before it a model scores better
    because less is removed from it. The best checkpoint's gates come back with its weights, and the
    final budget is met from there.

    Raises:
        ValueError: fp16 without gradient clipping, which is what unscales the gradients in time.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.fp16 and self.args.max_grad_norm == 0.0:
            raise ValueError(
                "max_grad_norm must be above 0 with fp16, got 0.0: gradients stay scaled otherwise"
            )
        if self.is_fsdp_enabled:
            sharded: Any = self.model
            replicate_(sharded)
            gates = [module for module in sharded.modules() if isinstance(module, Gate)]
            self.accelerator.state.fsdp_plugin.ignored_modules = gates
        self.gate_callback = GateCallback()
        self.add_callback(self.gate_callback)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return the Trainer's optimizer with the logits moved to a group of their own."""
        fresh = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if fresh:
            gates = GateMap(self.accelerator.unwrap_model(self.model))
            layers = gates.layers.values()
            config = next(iter(layers)).config
            logits: list[nn.Parameter] = [gate.logits for gate in gates.gates()]
            rate = config.logits_learning_rate
            _move_to_own_group(optimizer, logits, {"lr": rate, "weight_decay": 0.0})
            if config.lora_rank and config.lora_learning_rate is not None:
                factors = [p for m in layers if m.lora is not None for p in m.lora.parameters()]
                _move_to_own_group(optimizer, factors, {"lr": config.lora_learning_rate})
        return optimizer

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        controller = self.gate_callback.controller
        if controller is not None and not controller.at_target(self.state.global_step):
            return False
        best: bool = super()._determine_best_metric(metrics, trial)
        return best

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log `GateWatch.figures` of the gates beside the Trainer's own figures."""
        controller = self.gate_callback.controller
        if controller is not None:
            logs = {**logs, **controller.watch.figures()}
        super().log(logs, start_time)


def _move_to_own_group(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], options: dict[str, float]
) -> None:
    """Take parameters out of the optimizer's groups into one of their own."""
    moved = {id(p) for p in parameters}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in moved]
    optimizer.add_param_group({"params": parameters, **options})
