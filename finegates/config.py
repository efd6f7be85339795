"""`GateConfig`: every constant of the method as a named, validated, serialisable field."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .cost_table import CostTable
from .ops.reference import DISTRIBUTIONS

# The native kernels are for pruned Linears.
GATED_BACKENDS = ("auto", "torch", "triton")
OBJECTIVES = ("fraction", "per_axis")
TIES = ("unit", "none")
BUDGETS = ("parameters", "latency")
CONFIG_VERSION = 1

# Ranking: three seeds each of 0.05 and 0.1 on SST-2 (docs/method.md).
_LOGIT_RATES = {"ranking": 0.1, "gaussian": 0.05, "hard_concrete": 0.2}


@dataclass(frozen=True)
class GateConfig:
    r"""How gates are placed, sampled, trained and scheduled.

    The gated Linear is ``y = r ⊙ ((x ⊙ c) wᵀ + b)`` with a row gate ``r`` (one value per output
    feature) and a column gate ``c`` (one value per input feature), functions of fp32 logits θ.

    Args:
        distribution: ``"ranking"`` (open iff θ > 0, straight-through gradient, exact budget at
            every step), ``"gaussian"`` (FineGates, arXiv 2602.09169) or ``"hard_concrete"``
            (Louizos et al. 2018, arXiv 1712.01312).
        sparsity: fraction of the budget to remove, in (0, 1); counted over the whole model with
            the units that die through couplings.
        budget: ``"parameters"`` counts the gated weights' parameters, ``"latency"`` the seconds
            that ``costs`` has for the gated layers; for ranking gates only.
        costs: what ``budget="latency"`` counts with, see `finegates.report.measure_costs`. It is
            saved with the gates, so that a resumed run counts as before.
        objective: for the stochastic distributions. ``"fraction"`` penalises the expected removed
            fraction of parameters; ``"per_axis"`` is the authors' objective: for every layer the
            distance of the mean open probability of rows, and of columns, from ``1 - sparsity``.
        tie: ``"unit"`` gives one gate to what can only die together (query-key pairs, value-output,
            MLP neurons, the input columns shared by query/key/value or gate/up); ``"none"`` gives
            every row and column its own gate, as the paper does.
        rows, columns: which sides carry gates; at least one.
        modules: name patterns (``fnmatch``) of the Linears to gate; None takes the attention and
            MLP Linears of the model's architecture.
        train_bias, train_weight: whether biases and weights of gated Linears are trained.
        trainable: name patterns (``fnmatch``) of further parameters that stay trainable: the head.
        closed_gradient: ranking only; whether closed gates still get a gradient, so that a unit can
            return. Worth about two points of accuracy on SST-2, costs a pass over the closed rows.
        shrink_every: ranking only; 0 computes every step on the whole weight. Above 0, forward and
            backward run on the open rows and columns alone, and closed gates get a gradient
            (``closed_gradient``) at every ``shrink_every``-th step only, which is computed on the
            whole weight.
        warmup: fraction of the steps with every gate open, during which importance is measured.
        ramp: fraction of the steps over which the target rises from 0 to ``sparsity`` (cubic).
        recovery: fraction of the steps at the end with the gates fixed as they evaluate, without
            noise, while everything else trained goes on.
        penalty_weight: λ of the stochastic objectives. The budget is met by shifting logits, so
            the fraction objective needs little; the authors use 50.
        gate_learning_rate: learning rate of the logits. None takes 0.1 for ranking gates; 0.05 for
            Gaussian ones, and 0.2 for hard concrete ones, whose logits lie between ±2.4 where the
            Gaussian's lie within ±0.55.
        sigma: standard deviation of the Gaussian noise.
        open_sigma: σ₀ in the Gaussian open probability Φ((tanh θ + offset) / σ₀).
        offset: the shift inside the Gaussian clamp, ½ in the paper.
        reorder_every: optimizer steps between two calls of `FusedGatedLinear.reorder_`, 0 for none.
            For a GPU, where closed gates then cost neither traffic nor arithmetic, at the price of
            a second copy of every gated weight; not measured on a GPU yet. Needs frozen weights.
        lora_rank: rank of a LoRA inside the gates of every gated layer, 0 for none:
            y = r ⊙ ((w + (lora_alpha / lora_rank) B A)(c ⊙ x) + b), trained with the gates and
            folded into the weight by `prune_` (Hu et al. 2021, arXiv 2106.09685).
        lora_alpha, lora_dropout: scale of the LoRA; dropout of its input in training, in [0, 1).
        lora_learning_rate: learning rate of A and B in `GatedTrainer`; None takes the Trainer's.
        beta, gamma, zeta: temperature and stretch interval of the hard concrete distribution.
        init_mean, init_std: the starting logits are drawn from N(init_mean, init_std²). A mean of
            None takes the opening edge, the smallest logit whose evaluation value is 1: from there
            1/2 of the Gaussian and 0.29 of the hard concrete samples are interior, so that there is
            a task gradient from the first step.
        backend: ``"auto"``, ``"torch"`` or ``"triton"`` for the gated layers; `prune_` leaves its
            layers on ``"auto"``.

    Raises:
        ValueError: a field has a value outside its range; the message names field and value.

    Example:
        >>> GateConfig(sparsity=0.4).distribution
        'ranking'
        >>> GateConfig.from_dict(GateConfig.paper().to_dict()) == GateConfig.paper()
        True
    """

    distribution: str = "ranking"
    sparsity: float = 0.4
    budget: str = "parameters"
    costs: CostTable | None = None
    objective: str = "fraction"
    tie: str = "unit"
    rows: bool = True
    columns: bool = True
    modules: tuple[str, ...] | None = None
    train_bias: bool = True
    train_weight: bool = False
    trainable: tuple[str, ...] = ("classifier.*", "score.*", "qa_outputs.*", "pre_classifier.*")
    closed_gradient: bool = True
    shrink_every: int = 0
    warmup: float = 0.3
    ramp: float = 0.3
    recovery: float = 0.0
    penalty_weight: float = 1.0
    gate_learning_rate: float | None = None
    reorder_every: int = 0
    lora_rank: int = 0
    lora_alpha: float = 8.0
    lora_dropout: float = 0.0
    lora_learning_rate: float | None = None
    sigma: float = 0.1
    open_sigma: float = 0.5
    offset: float = 0.5
    beta: float = 2.0 / 3.0
    gamma: float = -0.1
    zeta: float = 1.1
    init_mean: float | None = None
    init_std: float = 0.0
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name, choices in (
            ("distribution", DISTRIBUTIONS),
            ("objective", OBJECTIVES),
            ("tie", TIES),
            ("budget", BUDGETS),
            ("backend", GATED_BACKENDS),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {value!r}")
        for name in ("rows", "columns", "train_bias", "train_weight", "closed_gradient"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be a bool, got {value!r}")
        for name in ("lora_rank", "reorder_every", "shrink_every"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ValueError(f"{name} must be a whole number from 0, got {value!r}")
        if self.reorder_every and self.train_weight:
            raise ValueError(f"reorder_every needs train_weight=False, got {self.reorder_every}")
        if self.shrink_every and self.distribution != "ranking":
            raise ValueError(
                f"shrink_every must be 0 for {self.distribution} gates, which aren't binary in "
                f"training, got {self.shrink_every}"
            )
        if self.objective == "per_axis" and self.distribution == "ranking":
            raise ValueError(
                "objective 'per_axis' needs gaussian or hard_concrete gates, got 'ranking'"
            )
        if self.budget == "latency" and self.distribution != "ranking":
            raise ValueError(f"budget 'latency' needs ranking gates, got {self.distribution!r}")
        if self.costs is not None and not isinstance(self.costs, CostTable):
            raise ValueError(f"costs must be a CostTable, got {self.costs!r}")
        if not (self.rows or self.columns):
            raise ValueError("rows and columns are both False: no side would be gated")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "float" or field.type == "float | None" and value is not None:
                number = isinstance(value, (int, float)) and not isinstance(value, bool)
                if not number or not math.isfinite(value):
                    raise ValueError(f"{field.name} must be a finite number, got {value!r}")
        self._check_ranges()
        for name in ("modules", "trainable"):
            patterns = getattr(self, name)
            if patterns is None and name == "modules":
                continue
            if not isinstance(patterns, (tuple, list)) or not all(
                isinstance(pattern, str) for pattern in patterns
            ):
                raise ValueError(f"{name} must be a sequence of patterns, got {patterns!r}")
            object.__setattr__(self, name, tuple(patterns))
        if self.modules == ():
            raise ValueError("modules must not be empty; None takes the architecture's own")

    def _check_ranges(self) -> None:
        ranges = (
            ("sparsity", 0.0 < self.sparsity < 1.0, "in (0, 1)"),
            ("warmup", 0.0 <= self.warmup < 1.0, "in [0, 1)"),
            ("ramp", 0.0 <= self.ramp <= 1.0 - self.warmup, "in [0, 1 - warmup]"),
            (
                "recovery",
                0.0 <= self.recovery <= 1.0 - self.warmup - self.ramp,
                "in [0, 1 - warmup - ramp]",
            ),
            ("penalty_weight", self.penalty_weight >= 0.0, "at least 0"),
            ("gate_learning_rate", self.logits_learning_rate > 0.0, "above 0"),
            ("lora_alpha", self.lora_alpha > 0.0, "above 0"),
            ("lora_dropout", 0.0 <= self.lora_dropout < 1.0, "in [0, 1)"),
            (
                "lora_learning_rate",
                self.lora_learning_rate is None or self.lora_learning_rate > 0.0,
                "above 0",
            ),
            ("sigma", self.sigma > 0.0, "above 0"),
            ("open_sigma", self.open_sigma > 0.0, "above 0"),
            ("offset", 0.0 < self.offset < 1.0, "in (0, 1)"),
            ("beta", self.beta > 0.0, "above 0"),
            ("gamma", self.gamma < 0.0, "below 0"),
            ("zeta", self.zeta > 1.0, "above 1"),
            ("init_std", self.init_std >= 0.0, "at least 0"),
        )
        for name, holds, what in ranges:
            if not holds:
                raise ValueError(f"{name} must be {what}, got {getattr(self, name)!r}")

    @classmethod
    def paper(cls, **changes: Any) -> GateConfig:
        """Return the authors' constants: Gaussian gates, independent, their per-axis objective.

        λ = 50, target 0.4, σ = 0.1, σ₀ = 0.5, logits from N(1, 0.1²), learning rate 1e-3, no ramp
        (source: the authors' ``model.py`` and ``finetune_glue.py``).
        """
        constants: dict[str, Any] = {
            "distribution": "gaussian",
            "objective": "per_axis",
            "tie": "none",
            "sparsity": 0.4,
            "penalty_weight": 50.0,
            "gate_learning_rate": 1e-3,
            "warmup": 0.0,
            "ramp": 0.0,
            "init_mean": 1.0,
            "init_std": 0.1,
        }
        return cls(**{**constants, **changes})

    @property
    def closing_logit(self) -> float:
        """The logit at and below which a gate is exactly 0 in evaluation.

        ranking: 0; gaussian: artanh(-offset); hard concrete: logit(-γ / (ζ - γ)) = log(-γ / ζ).
        """
        if self.distribution == "gaussian":
            return math.atanh(-self.offset)
        if self.distribution == "hard_concrete":
            return math.log(-self.gamma) - math.log(self.zeta)
        return 0.0

    @property
    def logits_learning_rate(self) -> float:
        """``gate_learning_rate``, or the distribution's own when that is None."""
        if self.gate_learning_rate is not None:
            return self.gate_learning_rate
        return _LOGIT_RATES[self.distribution]

    @property
    def start_logit(self) -> float:
        """The mean of the starting logits: ``init_mean``, or the opening edge when that is None.

        ranking: 1; gaussian: artanh(1 - offset); hard concrete: logit((1 - γ) / (ζ - γ)), which is
        log((1 - γ) / (ζ - 1)).
        """
        if self.init_mean is not None:
            return self.init_mean
        if self.distribution == "gaussian":
            return math.atanh(1.0 - self.offset)
        if self.distribution == "hard_concrete":
            return math.log(1.0 - self.gamma) - math.log(self.zeta - 1.0)
        return 1.0

    @property
    def constants(self) -> tuple[float, float, float]:
        """(shift, scale, beta) of the sample, as `ops.gated_matmul` takes them.

        gaussian: (offset, σ, 1); hard concrete: (γ, ζ - γ, β); ranking has none.
        """
        if self.distribution == "gaussian":
            return self.offset, self.sigma, 1.0
        if self.distribution == "hard_concrete":
            return self.gamma, self.zeta - self.gamma, self.beta
        return 0.0, 1.0, 1.0

    @property
    def open_constants(self) -> tuple[float, float]:
        """(shift, scale) of the open probability, as `ops.open_mass` takes them.

        gaussian: (offset, σ₀); hard concrete: (β log(-γ / ζ), 1); ranking has none.
        """
        if self.distribution == "gaussian":
            return self.offset, self.open_sigma
        if self.distribution == "hard_concrete":
            return self.beta * self.closing_logit, 1.0
        return 0.0, 1.0

    def target(self, progress: float) -> float:
        """Return the fraction to remove at ``progress`` (steps done / all steps, in [0, 1]).

        0 during the warm-up, then sparsity · (1 - (1 - t)³) with t rising from 0 to 1 over the ramp
        (the cubic ramp of Zhu and Gupta 2017, arXiv 1710.01878).
        """
        if progress <= self.warmup and self.warmup > 0.0:
            return 0.0
        t = 1.0 if self.ramp == 0.0 else min(1.0, (progress - self.warmup) / self.ramp)
        return self.sparsity * (1.0 - (1.0 - t) ** 3)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable dict that carries the format's version."""
        fields = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }
        return {"version": CONFIG_VERSION, **fields}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GateConfig:
        """Build a config from `to_dict`'s output; unknown keys are dropped with a warning.

        Raises:
            ValueError: ``values`` isn't a mapping, its version is newer than this release knows, or
                a field is out of range.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"values must be a mapping, got {values!r}")
        fields = dict(values)
        version = fields.pop("version", CONFIG_VERSION)
        if type(version) is not int or not 1 <= version <= CONFIG_VERSION:
            raise ValueError(f"version must be from 1 to {CONFIG_VERSION}, got {version!r}")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(str(name) for name in set(fields) - known)
        if unknown:
            warnings.warn(f"GateConfig ignores unknown keys: {', '.join(unknown)}", stacklevel=2)
        if isinstance(fields.get("costs"), Mapping):
            fields["costs"] = CostTable.from_dict(fields["costs"])
        return cls(**{name: value for name, value in fields.items() if name in known})
