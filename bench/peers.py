"""Other runtimes, where they are installed: y = x wᵀ + b as one call, weight prepared beforehand.

Each takes torch's thread count and writes into one output that it keeps. A runtime that is not
there, or has no such operation, raises ImportError or NotImplementedError with its reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def openvino(x: Tensor, w: Tensor, b: Tensor) -> Callable[[], Tensor]:
    """MatMul and Add on the CPU plugin at x's precision, latency hint, one stream."""
    import openvino as ov
    from openvino import opset13

    kind = {torch.float32: ov.Type.f32, torch.bfloat16: ov.Type.bf16}[x.dtype]

    def shared(t: Tensor) -> Any:
        bits = t.view(torch.int16) if t.dtype == torch.bfloat16 else t
        return ov.Tensor(bits.numpy(), ov.Shape(list(t.shape)), kind)

    y = x.new_empty(x.shape[0], w.shape[0])
    given = opset13.parameter(list(x.shape), kind)
    product = opset13.matmul(given, opset13.constant(shared(w)), False, True)
    total = opset13.add(product, opset13.constant(shared(b[None])))
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": kind,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = (
        ov.Core()
        .compile_model(ov.Model([opset13.result(total)], [given]), "CPU", options)
        .create_infer_request()
    )
    request.set_input_tensor(shared(x))
    request.set_output_tensor(shared(y))

    def run() -> Tensor:
        request.infer()
        return y

    return run


def onnxruntime(x: Tensor, w: Tensor, b: Tensor) -> Callable[[], Tensor]:
    """Gemm on the CPU provider, whose weight is packed when the session starts."""
    import onnx
    import onnxruntime
    from onnx import helper, numpy_helper

    if x.dtype != torch.float32:
        raise NotImplementedError(f"its CPU provider has no Gemm in {x.dtype}")
    y = x.new_empty(x.shape[0], w.shape[0])
    values = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, list(t.shape))
        for name, t in (("x", x), ("y", y))
    ]
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)],
        "linear",
        values[:1],
        values[1:],
        [numpy_helper.from_array(t.numpy(), name) for name, t in (("w", w), ("b", b))],
    )
    opset = helper.make_opsetid("", 21)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    # Its workers may spin during its own calls, not during the others' turns.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    binding = session.io_binding()
    for name, t, bind in (("x", x, binding.bind_input), ("y", y, binding.bind_output)):
        bind(name, "cpu", 0, x.numpy().dtype, list(t.shape), t.data_ptr())

    def run() -> Tensor:
        session.run_with_iobinding(binding)
        return y

    return run


def compiled(x: Tensor, w: Tensor, b: Tensor, backend: str = "inductor") -> Callable[[], Tensor]:
    """torch.compile with freezing; seconds of compilation for each shape."""
    linear = torch.nn.Linear(*reversed(w.shape), device="meta").eval()
    linear.weight = torch.nn.Parameter(w, requires_grad=False)
    linear.bias = torch.nn.Parameter(b, requires_grad=False)
    torch._dynamo.reset()
    options = {"freezing": True} if backend == "inductor" else None
    call = torch.compile(linear, backend=backend, options=options)
    return lambda: call(x)


def zentorch(x: Tensor, w: Tensor, b: Tensor) -> Callable[[], Tensor]:
    """AMD's backend of torch.compile."""
    import zentorch  # noqa: F401

    return compiled(x, w, b, "zentorch")


RUNTIMES = {"openvino": openvino, "onnxruntime": onnxruntime}
COMPILERS = {"compiled": compiled, "zentorch": zentorch}
