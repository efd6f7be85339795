"""A pruned model for those who don't have finegates: dense-shaped, ONNX, OpenVINO."""

from .dense import dense_model, export_dense
from .graph import export_onnx, export_openvino

__all__ = ["dense_model", "export_dense", "export_onnx", "export_openvino"]
