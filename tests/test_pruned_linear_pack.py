"""`PrunedLinear` and the packed copy of its weight."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finegates import PrunedLinear
from finegates.ops import packing, pruned_linear, reference
from numerics import assert_no_worse
from pruned_case import COLUMNS, ROWS, example, needs_native, op_of, reference_of


class TestPack:
    """The native backend's copy of the weight never outlives a change of the weight."""

    @pytest.fixture(autouse=True)
    def _inference(self) -> Iterator[None]:
        with torch.no_grad():
            yield

    @staticmethod
    def check(pruned: PrunedLinear) -> None:
        x = torch.randn(3, 9).to(pruned.weight.dtype)
        exact = reference_of(copy.deepcopy(pruned).double(), x.double())
        # The layer's short way keeps a pack of its own, the op another one.
        for y in (pruned(x), op_of(pruned, x)):
            assert_no_worse(y, reference_of(pruned, x), exact)

    def test_in_place_change(self) -> None:
        _, pruned = example()
        self.check(pruned)
        pruned.weight.mul_(-3.0)
        self.check(pruned)
        assert pruned.bias is not None
        pruned.bias.add_(5.0)
        self.check(pruned)

    def test_optimizer_step(self) -> None:
        _, pruned = example()
        self.check(pruned)
        pruned.weight.grad = torch.ones_like(pruned.weight)
        torch.optim.SGD([pruned.weight], lr=1.0).step()
        self.check(pruned)

    @pytest.mark.parametrize("how", ["fused", "foreach", "plain"])
    def test_adamw_step(self, how: str) -> None:
        """The fused step, Trainer's default, raises no version counter."""
        _, pruned = example()
        flags = {"fused": {"fused": True}, "foreach": {"foreach": True}, "plain": {}}[how]
        optimizer = torch.optim.AdamW(pruned.parameters(), lr=1.0, **flags)
        for _ in range(3):
            self.check(pruned)
            for parameter in pruned.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
            self.check(pruned)

    def test_trainer_evaluates_the_weight_of_the_step(self, tmp_path: Path) -> None:
        from transformers import Trainer, TrainingArguments

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = PrunedLinear.from_linear(nn.Linear(9, 7), ROWS, COLUMNS)

            def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
                y = self.layer(x)
                if not torch.is_grad_enabled():
                    torch.testing.assert_close(y, reference_of(self.layer, x))
                return {"loss": F.mse_loss(y, labels), "logits": y}

        data = [{"x": torch.randn(9), "labels": torch.randn(7)} for _ in range(8)]
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, eval_strategy="steps", eval_steps=1,
            learning_rate=1.0, per_device_train_batch_size=4, use_cpu=True, report_to=[],
            save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        with torch.enable_grad():
            Trainer(Model(), arguments, train_dataset=data, eval_dataset=data).train()

    @needs_native
    @pytest.mark.parametrize("how", ["cast", "meta", "replaced", "assigned"])
    def test_the_old_weight_is_let_go(self, how: str) -> None:
        _, pruned = example()
        self.check(pruned)
        entry = packing.entry(
            pruned.weight, pruned.bias, pruned.rows, pruned.columns, pruned.out_features, 9
        )
        old = weakref.ref(entry.sources[0])  # type: ignore[arg-type]
        del entry
        assert old() is not None
        x = torch.randn(3, 9)
        if how == "cast":
            pruned.to(torch.float64)
        elif how == "meta":
            pruned.to("meta")
        elif how == "replaced":
            pruned.weight = nn.Parameter(torch.randn(4, 5))
            with torch.enable_grad():
                pruned(x)
        else:
            pruned.load_state_dict(example()[1].state_dict(), assign=True)
            with torch.enable_grad():
                pruned(x)
        gc.collect()
        assert old() is None

    def test_load_state_dict(self) -> None:
        _, pruned = example()
        self.check(pruned)
        other = PrunedLinear.from_linear(nn.Linear(9, 7), ROWS - 0, COLUMNS - 1)
        pruned.load_state_dict(other.state_dict())
        self.check(pruned)

    def test_replaced_parameter_at_the_same_address(self) -> None:
        """The allocator gives a freed block to the next tensor of its size."""
        _, pruned = example()
        for _ in range(10):
            self.check(pruned)
            pruned.weight = nn.Parameter(torch.randn(4, 5))

    def test_cast_there_and_back(self) -> None:
        _, pruned = example()
        for _ in range(10):
            self.check(pruned)
            pruned.to(torch.bfloat16).to(torch.float32)
            self.check(pruned)
            pruned.weight.copy_(torch.randn(4, 5))

    def test_changed_sides(self) -> None:
        _, pruned = example()
        self.check(pruned)
        pruned.columns = pruned.columns - 1  # type: ignore[operator]
        self.check(pruned)
        pruned.columns.add_(1)
        self.check(pruned)

    def test_deepcopy(self) -> None:
        _, pruned = example()
        self.check(pruned)
        twin = copy.deepcopy(pruned)
        twin.weight.neg_()
        self.check(twin)
        self.check(pruned)

    def test_gradient_mode_and_inference_mode(self) -> None:
        _, pruned = example()
        self.check(pruned)
        with torch.inference_mode():
            x = torch.randn(3, 9)
            made = PrunedLinear.from_linear(nn.Linear(9, 7), ROWS, COLUMNS)
            for layer in (made, pruned):
                for call in (layer, lambda t, layer=layer: op_of(layer, t)):
                    torch.testing.assert_close(call(x), reference_of(layer, x))
            bare = PrunedLinear.from_linear(nn.Linear(9, 7, bias=False))
            for layer in (made, bare):
                layer(x), op_of(layer, x)
                layer.weight.neg_()  # no version counter tells of it
                torch.testing.assert_close(layer(x), reference_of(layer, x))
                torch.testing.assert_close(op_of(layer, x), reference_of(layer, x))

    def test_other_sizes_with_the_same_weight(self) -> None:
        _, pruned = example()
        for n, k in ((7, 9), (8, 9), (8, 10), (7, 9)):
            args = (torch.randn(2, k), pruned.weight, None, pruned.rows, pruned.columns, n)
            torch.testing.assert_close(pruned_linear(*args), reference.pruned_linear(*args))

    def test_the_pack_dies_with_the_layer(self) -> None:
        before = len(packing._entries)
        layers = [example()[1] for _ in range(5)]
        for layer in layers:
            self.check(layer)
        del layers, layer
        gc.collect()
        assert len(packing._entries) == before
