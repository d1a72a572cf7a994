"""Pass: the contributed norm under the standard's domain becomes the standard's own."""

import onnx_ir as ir

__all__ = ["standardize_norms"]


def standardize_norms(graph: ir.Graph) -> None:
    """Rename ``SimplifiedLayerNormalization`` to ``RMSNormalization`` (opset 23), its equal, in place.

    ONNX Runtime accepts the first in the standard domain; the standard, and so its checker, does not know it.
    """
    for node in graph:
        if node.op_type == "SimplifiedLayerNormalization" and not node.domain:
            node.op_type, node.domain = "RMSNormalization", ""
