"""Pass: the embedding's Gather becomes our operator on packed rows."""

import onnx_ir as ir

from mgptq_export.targets.onnx.operators import DOMAIN, EMBEDDING
from mgptq_export.targets.onnx.packed_initializers import packed_segments, set_output
from mgptq_runtime.errors import UnsupportedModelError
from mgptq_runtime.quantized_model import QuantizedLinear

__all__ = ["swap_embedding"]


def swap_embedding(graph: ir.Graph, embedding: QuantizedLinear, node_name: str) -> None:
    """Replace the Gather ``node_name`` in place: one operator per segment, and a Concat.

    Raises:
        UnsupportedModelError: no such node, or another shape.
    """
    gather = next((node for node in graph if node.name == node_name), None)
    if gather is None:
        raise UnsupportedModelError(f"{embedding.name}: the graph has no node {node_name}")
    weight, ids = gather.inputs[0], gather.inputs[1]
    if weight is None or weight.name is None or weight.shape != (embedding.rows, embedding.columns):
        raise UnsupportedModelError(
            f"{embedding.name}: {embedding.rows} x {embedding.columns}, but the configuration makes it "
            f"{weight and weight.shape}"
        )
    nodes = []
    for i, segment in enumerate(packed_segments(graph, embedding)):
        node = ir.node(
            EMBEDDING[(segment.format,)],
            [ids, segment.codes, segment.scales],
            {"K": segment.columns},
            domain=DOMAIN,
            name=f"{node_name}/{i}.{segment.format}",
        )
        set_output(node, gather.outputs[0], segment.columns)
        nodes.append(node)
    if len(nodes) > 1:
        nodes.append(ir.node("Concat", [node.outputs[0] for node in nodes], {"axis": -1}, name=f"{node_name}/concat"))
    ir.convenience.replace_nodes_and_values(graph, gather, [gather], nodes, gather.outputs, nodes[-1].outputs)
    del graph.initializers[weight.name]
