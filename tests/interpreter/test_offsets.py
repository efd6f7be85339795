"""Addresses in tensors that span more than 32 bits: computed in the interpreter, not followed."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from finegates.kernels import fold, gated_matmul, launch, norm_gather
from finegates.kernels import gated_matmul_bwd as bwd

TALL = 512
# Elements between rows, and between the columns of the widest last dimension that is not refused.
ROW_STRIDE, COLUMN_STRIDE = 2**27, launch.MAX_SIZE // TALL
_FWD, _X, _R, _W = (
    gated_matmul._gated_matmul_fwd_kernel,
    bwd._gated_matmul_bwd_x_kernel,
    bwd._gated_matmul_bwd_r_kernel,
    bwd._gated_matmul_bwd_w_kernel,
)
_PLAIN = {"ROW": "none", "COLUMN": "none", "ACTIVATION": "none"}
_BACKWARD = {"CLOSED_GRAD": True}
# Per kernel: which operands are there, which size is `TALL`, which strides along it are the long
# one, each in its turn, and the constants. Index maps are the identity.
LONG_STRIDES: dict[str, tuple[Any, str, str, str, dict[str, Any]]] = {
    "fwd": (_FWD, "x w y residual", "M", "xm ym residual", _PLAIN),
    "fwd, w": (_FWD, "x w y", "N", "wn", _PLAIN),
    "fwd, columns": (_FWD, "x w y columns", "K", "xk wk", _PLAIN),
    "bwd_x": (_X, "dy w x y dx dc", "M", "dym xm", _BACKWARD),
    "bwd_x, sums": (_X, "dy w x y dr db", "M", "dym ym", _BACKWARD),
    "bwd_x, w": (_X, "dy w x y dx dc", "N", "wn", _BACKWARD),
    "bwd_x, rows": (_X, "dy w x y dx dc rows", "N", "dyn", _BACKWARD),
    "bwd_x, sums of rows": (_X, "dy w x y dr rows", "N", "dyn", _BACKWARD),
    "bwd_x, columns": (_X, "dy w x y dx dc columns", "K", "xk wk", _BACKWARD),
    "bwd_r": (_R, "dy w x r dr", "M", "dym xm", {}),
    "bwd_r, w": (_R, "dy w x r dr", "N", "wn", {}),
    "bwd_r, rows": (_R, "dy w x r dr rows", "N", "dyn", {}),
    "bwd_r, columns": (_R, "dy w x r dr columns", "K", "xk wk", {}),
    "bwd_w": (_W, "dy x w dw", "M", "dym xm", _BACKWARD),
    "bwd_w, sums": (_W, "dy x w r dw db", "M", "dym", {"CLOSED_GRAD": False}),
    "bwd_w, w": (_W, "dy x w dw dc", "N", "wn", _BACKWARD),
    "bwd_w, rows": (_W, "dy x w dw", "N", "dyn", _BACKWARD),
    "bwd_w, columns": (_W, "dy x w dw dc", "K", "xk wk", _BACKWARD),
    "fold_fwd": (fold._fold_fwd_kernel, "w w_out", "N", "wn", _PLAIN),
    "fold_fwd, columns": (fold._fold_fwd_kernel, "w w_out", "K", "wk", _PLAIN),
    "fold_bwd": (fold._fold_bwd_kernel, "dy y x dx dr dc", "M", "dym ym xm dxm", {}),
    "fold_bwd, rows": (fold._fold_bwd_kernel, "dy y x dx dr dc", "N", "dyn", {}),
    "fold_bwd, columns": (fold._fold_bwd_kernel, "dy y x dx dr dc", "K", "xk", {}),
    "bwd_gates": (
        bwd._gated_matmul_bwd_gates_kernel, "dr row_out", "row_tiles", "tile",
        {"N_out": ROW_STRIDE, "row_units": 8, "row_span": 8, "row_width": 8,
         "DISTRIBUTION": "value", "NOISE": False, "CLOSED_GRAD": True, "CLOSED_ROW_GRAD": True,
         "DIVIDE_ROW": False, "DIVIDE_COLUMN": False, "BLOCK": 64, "BLOCK_T": 32},
    ),
    "norm_gather": (
        norm_gather._norm_gather_fwd_kernel, "x columns y", "M", "xm", {"NORM": "rms"},
    ),
    "norm_gather, columns": (
        norm_gather._norm_gather_fwd_kernel, "x columns y", "K", "xk",
        {"NORM": "rms", "count": TALL},
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "side"),
    [(name, side) for name, row in LONG_STRIDES.items() for side in row[3].split()],
)
def test_offsets_are_64_bit(name: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows 2²⁷ elements apart, so that a block of them is 2³² or more; and the longest columns.

    Addresses are computed and not dereferenced.
    """
    kernel, operands, tall, _, constants = LONG_STRIDES[name]
    stride = COLUMN_STRIDE if name.endswith(("rows", "columns")) else ROW_STRIDE
    lowest, highest = [2**63], [0]
    builder = type(interpreter.interpreter_builder)
    memory = torch.zeros(1)

    def load(self: Any, ptrs: Any, mask: Any, other: Any, *_: Any, **__: Any) -> Any:
        note(ptrs, mask)
        element = ptrs.get_element_ty()
        kind = interpreter._get_np_dtype(element)
        values = np.zeros(ptrs.data.shape, kind)
        if kind == np.int32:  # an index map
            values = ((ptrs.data.astype(np.int64) - memory.data_ptr()) // 4).astype(kind)
        return interpreter.TensorHandle(values, element)

    def note(ptrs: Any, mask: Any) -> None:
        addresses = ptrs.data[mask.data.astype(bool)].astype(np.uint64)
        if addresses.size:
            lowest[0] = min(lowest[0], int(addresses.min()))
            highest[0] = max(highest[0], int(addresses.max()))

    monkeypatch.setattr(builder, "create_masked_load", load)
    monkeypatch.setattr(
        builder, "create_masked_store", lambda self, ptrs, value, mask, *_: note(ptrs, mask)
    )
    sizes = {"M": 8, "N": 8, "K": 8, "N_out": 8, "K_in": 8, "count": 8, "eps": 1.0, tall: TALL}
    sizes |= {"N_out": TALL} if tall == "N" else {"K_in": TALL} if tall == "K" else {}
    blocks = {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP_M": 8, "BLOCK": 256, "STEPS": 1}
    given: dict[str, Any] = {"GATHERED": False, "PRECISION": "ieee", **sizes, **blocks}
    given |= {f"{operand}_ptr": memory for operand in operands.split()}
    for index_map in ("rows", "columns"):
        if index_map in operands:
            given[f"{index_map}_ptr"] = memory.view(torch.int32)
    given |= {f"stride_{side}": stride} | constants
    names = inspect.signature(kernel.fn).parameters
    arguments = {n: given.get(n, None if n.endswith("_ptr") else 1) for n in names}
    m, n, k = (launch.cdiv(sizes[side], blocks[f"BLOCK_{side}"]) for side in "MNK")
    wide_n, wide_k = (launch.cdiv(sizes[side], blocks["BLOCK"]) for side in "NK")
    programs = {
        "fwd": (m * n,), "bwd_x": (m * k,), "bwd_r": (m * n,), "bwd_w": (n * k,),
        "bwd_gates": (1,), "norm_gather": (sizes["M"],), "fold_bwd": (m, wide_n + wide_k),
        "fold_fwd": (launch.cdiv(sizes["N"], blocks["BLOCK_M"]), wide_k),
    }  # fmt: skip
    kernel[programs[name.split(",")[0]]](**arguments)
    assert lowest[0] == memory.data_ptr()
    assert highest[0] - memory.data_ptr() == 4 * ((TALL - 1) * stride + 7)
