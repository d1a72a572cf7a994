"""Pass: the head computes the logits of the last position only, unless a caller asks for more of them."""

import numpy as np
import onnx_ir as ir

from mgptq_export.targets.onnx.packed_initializers import initializer
from mgptq_runtime.errors import UnsupportedModelError

__all__ = ["FIRST_LOGIT", "keep_last_logits"]

FIRST_LOGIT = "first_logit"
PREFIX = "/lm_head/last"


def _constant(graph: ir.Graph, before: ir.Node, name: str, number: int) -> ir.Value:
    node = ir.node("Constant", [], {"value": ir.tensor(np.array([number], np.int64))}, name=f"{PREFIX}/{name}")
    node.outputs[0].name = f"{node.name}/output_0"
    node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.INT64, ir.Shape([1])
    graph.insert_before(before, node)
    return node.outputs[0]


def _one_position(shape: ir.Shape) -> ir.Shape:
    """[batch, sequence, width] with one for the sequence."""
    return ir.Shape([shape[0], 1, shape[2]])


def keep_last_logits(graph: ir.Graph, head_node: str) -> None:
    """Cut the head's activation to its last position, in place.

    A prompt's other logits are of no use to generation, and take as much time as a fifth of a small model's layers and
    memory for each token of the vocabulary. The input ``first_logit``, int64 [1], is the first position that is kept;
    it has a value, -1, so that onnxruntime-genai, which does not know it, gives none. The output is declared with one
    position: by that genai knows what to expect.

    Args:
        graph: a family's float graph.
        head_node: name of the head's MatMul node.

    Raises:
        UnsupportedModelError: no such node, or the output ``logits`` is not what it computes.
    """
    head = next((node for node in graph if node.name == head_node), None)
    hidden = head.inputs[0] if head is not None else None
    if head is None or hidden is None or hidden.shape is None or head.outputs[0].name != "logits":
        raise UnsupportedModelError(f"the graph's logits are not the output of a node {head_node}")
    logits = head.outputs[0]
    first = initializer(graph, FIRST_LOGIT, np.array([-1], np.int64))
    graph.inputs.append(first)
    end, axis = _constant(graph, head, "end", np.iinfo(np.int64).max), _constant(graph, head, "axis", 1)
    cut = ir.node("Slice", [hidden, first, end, axis], name=f"{PREFIX}/Slice")
    cut.outputs[0].name, cut.outputs[0].type = f"{cut.name}/output_0", hidden.type
    cut.outputs[0].shape = _one_position(hidden.shape)
    graph.insert_before(head, cut)
    head.replace_input_with(0, cut.outputs[0])
    logits.shape = _one_position(logits.shape) if logits.shape is not None else None
