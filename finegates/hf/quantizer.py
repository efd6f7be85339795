"""`save_pretrained` and `from_pretrained` for gated and pruned models.

transformers lets others register a quantizer: code that swaps modules of the empty model before its
weights are read. Ours puts back the gated or pruned layers that `gate_` and `prune_` recorded in
``config.json`` under ``quantization_config``. Once loaded, a model is what `gate_` or `prune_` left
behind: no quantizer stays attached, so that `Trainer`, `.half()` and `.float()` treat it as any
other, and a second save takes the same way as the first. What requires a gradient is what `gate_`
left; after pruning it is everything, as for any model that was just loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..config import GateConfig
from ..nn import FusedGatedLinear, PrunedLinear
from ..nn.pruned_linear import check_indices
from ..surgery import gate_
from ..surgery.record import METHOD, RECORD_VERSION, record_gated, record_pruned, tied_logits

_LAYER_FIELDS = (
    "in_features", "out_features", "kept_rows", "kept_columns", "bias", "activation"
)  # fmt: skip
# Names that only our layers have: stored without a layer to take them, a record is missing.
_OWN_NAMES = (
    ".row_gate.logits", ".column_gate.logits", ".lora.down", ".lora.up", ".rows", ".columns"
)  # fmt: skip


class FineGatesConfig(QuantizationConfigMixin):
    """The record of `gate_` or `prune_`, as read from ``config.json``.

    Args:
        quant_method: ``"finegates"``.
        record: ``version``, ``state`` (``"gated"`` or ``"pruned"``), ``modules`` (per name the
            arguments of a `PrunedLinear`) and, if gated, ``gate_config`` (`GateConfig.to_dict` with
            the gated modules' names as patterns).

    Raises:
        ValueError: the version or the state is unknown, or a field is missing or malformed.
    """

    def __init__(self, quant_method: str = METHOD, **record: Any) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]
        self.record = record
        version, state = record.get("version"), record.get("state")
        if type(version) is not int or not 1 <= version <= RECORD_VERSION:
            raise _invalid("version", f"between 1 and {RECORD_VERSION}", version)
        if state not in ("gated", "pruned"):
            raise _invalid("state", "'gated' or 'pruned'", state)
        self.modules: dict[str, Any] = record.get("modules", {})
        if not isinstance(self.modules, dict):
            raise _invalid("modules", "an object", self.modules)
        self.gate_config: GateConfig | None = None
        if state == "gated":
            where = "config.json: quantization_config.gate_config"
            self.gate_config = gate_config_from(record.get("gate_config"), where)

    def to_dict(self) -> dict[str, Any]:
        """Return what stands in ``config.json``."""
        return {"quant_method": self.quant_method, **copy.deepcopy(self.record)}


class FineGatesQuantizer(HfQuantizer):
    """Puts gated or pruned layers into the empty model, and checks what was read into them."""

    # Gates are put in by gate_, never by from_pretrained(..., quantization_config=...).
    requires_calibration = True
    quantization_config: FineGatesConfig

    def is_serializable(self) -> bool:
        """Return True: the state dict is plain tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: weights, biases and gates are ordinary parameters."""
        return True

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        self._prune(model)
        if self.quantization_config.gate_config is not None:
            self._gate(model, self.quantization_config.gate_config)
        _check_files(checkpoint_files or (), model)

    def _gate(self, model: PreTrainedModel, config: GateConfig) -> None:
        names = [_name_in(model, name) for name in config.modules or ()]
        gate_(model, replace(config, modules=tuple(names)))
        self.trainable = {
            name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad
        }
        self.ties = tied_logits(model)
        # transformers ties these again once the weights are read, wherever device_map puts them.
        model.all_tied_weights_keys.update(self.ties)

    def _prune(self, model: PreTrainedModel) -> None:
        for recorded, fields in self.quantization_config.modules.items():
            name = _name_in(model, recorded)
            linear: Any = model.get_submodule(name)
            _check_fields(recorded, fields, linear)
            layer = PrunedLinear(**fields, device="meta", dtype=linear.weight.dtype)
            model.set_submodule(name, layer)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for name, tensor in _layer_tensors(model):
            # transformers marks what it has read; the rest is empty memory or a random draw.
            if tensor.device.type != "meta" and not getattr(tensor, "_is_hf_initialized", False):
                raise ValueError(f"{name} is missing from the checkpoint")
            if name.endswith("_gate.logits") and tensor.isnan().any():
                raise ValueError(f"{name} of the checkpoint holds NaN")
        for name, layer in model.named_modules():
            if isinstance(layer, PrunedLinear):
                _check_layer_indices(name, layer)
        self.remove_quantization_config(model)  # type: ignore[no-untyped-call]
        if self.quantization_config.gate_config is None:
            record_pruned(model)
            return
        for alias in self.ties:
            model.all_tied_weights_keys.pop(alias, None)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(name in self.trainable)
        gated = [n for n, m in model.named_modules() if isinstance(m, FusedGatedLinear)]
        record_gated(model, self.quantization_config.gate_config, gated)


def register() -> None:
    """Register config and quantizer with transformers; a second call changes nothing."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(FineGatesConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(FineGatesQuantizer)


def gate_config_from(values: object, where: str) -> GateConfig:
    """Build the config of a stored gated model, whose ``modules`` are the gated modules' names.

    Raises:
        ValueError: naming ``where`` and the field.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be an object, got {values!r}")
    try:
        config = GateConfig.from_dict(values)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{where}: {error}") from error
    if config.modules is None:
        raise ValueError(f"{where}: modules must name the gated modules, got None")
    return config


def _invalid(field: str, what: str, value: object) -> ValueError:
    return ValueError(f"config.json: quantization_config.{field} must be {what}, got {value!r}")


def _name_in(model: PreTrainedModel, recorded: str) -> str:
    """Return the name in this model: a bare encoder lacks the prefix that its heads put before."""
    prefix = f"{model.base_model_prefix}."
    for name in (recorded, recorded.removeprefix(prefix), prefix + recorded):
        try:
            if type(model.get_submodule(name)) is nn.Linear:
                return name
        except AttributeError:
            continue
    raise ValueError(
        f"config.json: quantization_config names {recorded!r}, which is no nn.Linear of "
        f"{type(model).__name__}"
    )


def _check_fields(name: str, fields: object, linear: nn.Linear) -> None:
    """Check the recorded arguments of a `PrunedLinear` against the Linear it takes the place of."""
    where = f"modules[{name!r}]"
    if not isinstance(fields, dict) or set(fields) != set(_LAYER_FIELDS):
        raise _invalid(where, f"an object with the fields {', '.join(_LAYER_FIELDS)}", fields)
    for size, kept, full in (
        ("out_features", "kept_rows", linear.out_features),
        ("in_features", "kept_columns", linear.in_features),
    ):
        # Without kept indices the side is compact; with them the neighbours see the full size.
        least = 0 if fields[kept] is None else full
        if type(fields[size]) is not int or not least <= fields[size] <= full:
            raise _invalid(f"{where}.{size}", f"between {least} and {full}", fields[size])
        if fields[kept] is not None and (
            type(fields[kept]) is not int or not 0 <= fields[kept] <= full
        ):
            raise _invalid(f"{where}.{kept}", f"null or between 0 and {full}", fields[kept])
    has_bias = linear.bias is not None
    if fields["bias"] is not has_bias:
        raise _invalid(f"{where}.bias", repr(has_bias), fields["bias"])


def _layer_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the gated and pruned layers, by its name in the model."""
    for prefix, layer in model.named_modules():
        if isinstance(layer, (FusedGatedLinear, PrunedLinear)):
            yield from layer.state_dict(prefix=f"{prefix}.", keep_vars=True).items()


def _check_files(files: Sequence[str], model: PreTrainedModel) -> None:
    """Compare the files' headers with the layers, so that a bad file is named before it is read."""
    expected = dict(_layer_tensors(model))
    layers = {name.rpartition(".")[0] for name in expected}
    prefix = f"{model.base_model_prefix}."
    found, stray = set(), []
    for file in files:
        if not file.endswith(".safetensors"):
            raise ValueError(f"{file}: only safetensors are read, never pickled files")
        try:
            with safe_open(file, framework="pt") as reader:
                for key in reader.keys():  # noqa: SIM118 - not a dict
                    names = (key, key.removeprefix(prefix), prefix + key)
                    name = next((name for name in names if name in expected), None)
                    if name is not None:
                        found.add(name)
                        _check_header(f"{file}: {key}", reader.get_slice(key), expected[name])
                    elif key.endswith(_OWN_NAMES) or not layers.isdisjoint(
                        name.rpartition(".")[0] for name in names
                    ):
                        stray.append(f"{file}: {key}")
        except SafetensorError as error:
            raise ValueError(f"{file}: not a readable safetensors file ({error})") from error
    # Where nothing is found, transformers renames keys while it loads, and strays prove nothing.
    if found and stray:
        raise ValueError(f"{stray[0]} has no place in the layers that config.json names")


def _check_header(where: str, stored: Any, tensor: Tensor) -> None:
    shape, dtype = tuple(stored.get_shape()), str(stored.get_dtype())
    if shape != tuple(tensor.shape):
        raise ValueError(f"{where} must have shape {tuple(tensor.shape)}, got {shape}")
    wanted = ("F", "BF") if tensor.is_floating_point() else ("I32",)
    if not dtype.startswith(wanted):
        what = "a float type" if tensor.is_floating_point() else "I32"
        raise ValueError(f"{where} must have dtype {what}, got {dtype}")


def _check_layer_indices(name: str, layer: PrunedLinear) -> None:
    for side, indices, size in (
        ("rows", layer.rows, layer.out_features),
        ("columns", layer.columns, layer.in_features),
    ):
        if indices is not None and indices.device.type != "meta":
            check_indices(f"{name}.{side}", indices, size)
