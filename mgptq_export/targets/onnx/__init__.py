"""The ONNX target: a package that stock ONNX Runtime and onnxruntime-genai run at low-bit kernel speed."""

from mgptq_export.targets.onnx.export import export_onnx
from mgptq_export.targets.onnx.weights import read_onnx_weights

__all__ = ["export_onnx", "read_onnx_weights"]
