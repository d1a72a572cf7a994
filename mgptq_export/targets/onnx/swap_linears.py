"""Pass: float MatMul nodes become our operators, one per segment, fed by one column order per input group."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from mgptq_export.targets.onnx.node_names import HEAD_NODE
from mgptq_export.targets.onnx.operators import DOMAIN, HEAD, MATMUL, PERMUTE
from mgptq_export.targets.onnx.packed_initializers import PackedSegment, initializer, packed_segments, set_output
from mgptq_runtime.errors import UnsupportedModelError
from mgptq_runtime.quantized_model import InputGroup, QuantizedLinear

__all__ = ["swap_linears"]


def _matmul_nodes(graph: ir.Graph) -> dict[str, ir.Node]:
    return {node.name or "": node for node in graph if node.op_type == "MatMul"}


class _GroupInput:
    """The group's activation in storage order, and its pieces; each node is made once."""

    def __init__(self, graph: ir.Graph, group: InputGroup, activation: ir.Value, producer: ir.Node) -> None:
        self.graph, self.name, self.last_node = graph, group.name, producer
        self.columns = activation
        self.pieces: dict[tuple[int, ...], list[ir.Value]] = {}
        if group.permutation is not None:
            dtype = np.uint16 if group.permutation.size <= 1 << 16 else np.int32
            order = initializer(graph, f"{group.name}.permutation", group.permutation.astype(dtype))
            node = ir.node(PERMUTE, [activation, order], domain=DOMAIN, name=f"{group.name}/permute")
            set_output(node, activation, group.permutation.size)
            self.columns = self._insert(node)[0]

    def _insert(self, *nodes: ir.Node) -> list[ir.Value]:
        self.graph.insert_after(self.last_node, nodes)
        self.last_node = nodes[-1]
        return list(nodes[-1].outputs)

    def split(self, widths: tuple[int, ...]) -> list[ir.Value]:
        """The activation cut into ``widths`` columns."""
        if len(widths) == 1:
            return [self.columns]
        if widths not in self.pieces:
            name = f"{self.name}/split_{len(self.pieces)}"
            sizes = ir.node("Constant", [], {"value_ints": list(widths)}, name=f"{name}/sizes")
            sizes.outputs[0].name = f"{name}/sizes/output_0"
            node = ir.node("Split", [self.columns, sizes.outputs[0]], {"axis": -1}, num_outputs=len(widths), name=name)
            for i, width in enumerate(widths):
                set_output(node, self.columns, width, i)
            self.pieces[widths] = self._insert(sizes, node)
        return self.pieces[widths]


def _shared_nodes(segments: Sequence[PackedSegment], names: Mapping[tuple[str, ...], str]) -> list[list[PackedSegment]]:
    """The segments of each node, in order: pairs where there is an operator for both."""
    runs: list[list[PackedSegment]] = []
    for segment in segments:
        if runs and len(runs[-1]) == 1 and (runs[-1][0].format, segment.format) in names:
            runs[-1].append(segment)
        else:
            runs.append([segment])
    return runs


def _swap_one(
    graph: ir.Graph, node: ir.Node, linear: QuantizedLinear, source: _GroupInput, names: Mapping[tuple[str, ...], str]
) -> None:
    runs = _shared_nodes(packed_segments(graph, linear), names)
    widths = tuple(sum(segment.columns for segment in run) for run in runs)
    nodes = []
    for i, (run, width, piece) in enumerate(zip(runs, widths, source.split(widths), strict=True)):
        formats = tuple(segment.format for segment in run)
        stored = [value for segment in run for value in (segment.codes, segment.scales)]
        matmul = ir.node(
            names[formats],
            [piece, *stored],
            {"K": width, "N": linear.rows},
            domain=DOMAIN,
            name=f"{node.name}/{i}.{''.join(formats)}",
        )
        set_output(matmul, node.outputs[0], linear.rows)
        nodes.append(matmul)
    if len(nodes) > 1:
        nodes.append(ir.node("Sum", [matmul.outputs[0] for matmul in nodes], name=f"{node.name}/sum"))
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, node.outputs, nodes[-1].outputs)


def swap_linears(
    graph: ir.Graph, groups: tuple[InputGroup, ...], node_names: Mapping[str, str], *, pairs: bool = True
) -> None:
    """Replace the MatMul nodes of all ``groups`` in place.

    Per group one ``PermuteColumns`` (none in natural order), at most one ``Split`` per way of cutting the columns, per
    linear one ``MatMulB*`` (the head's: ``HeadB*``) per segment or pair of them, and a ``Sum``. The float weights are
    dropped.

    Args:
        graph: a family's float graph; each linear is one MatMul node.
        groups: quantized linears; the head, too, is a group.
        node_names: linear to name of its MatMul node.
        pairs: whether two segments whose codes a kernel reads in the same width share a node.

    Raises:
        UnsupportedModelError: a linear without its node, of another shape, or a group whose linears read different
            activations; a MatMul that no linear replaces.
    """
    matmuls = _matmul_nodes(graph)
    for group in groups:
        nodes = {}
        for linear in group.linears:
            name = node_names[linear.name]
            if name not in matmuls:
                raise UnsupportedModelError(f"{linear.name}: the graph has no MatMul {name}; it has {list(matmuls)}")
            node = nodes[linear.name] = matmuls.pop(name)
            weight = node.inputs[1]
            if weight is None or weight.shape != (linear.columns, linear.rows):
                raise UnsupportedModelError(
                    f"{linear.name}: {linear.rows} x {linear.columns}, but the configuration makes it "
                    f"{weight and weight.shape} (transposed)"
                )
        activations = {id(node.inputs[0]): node.inputs[0] for node in nodes.values()}
        if len(activations) != 1:
            raise UnsupportedModelError(f"{group.name}: its linears do not read the same activation")
        activation = next(iter(activations.values()))
        producer = activation.producer() if activation is not None else None
        if activation is None or producer is None:
            raise UnsupportedModelError(f"{group.name}: its linears read an input of the graph, not an activation")
        source = _GroupInput(graph, group, activation, producer)
        weights = [node.inputs[1] for node in nodes.values()]
        for linear in group.linears:
            names = HEAD if node_names[linear.name] == HEAD_NODE else MATMUL
            usable = {formats: name for formats, name in names.items() if pairs or len(formats) == 1}
            _swap_one(graph, nodes[linear.name], linear, source, usable)
        for weight in weights:
            if weight is not None and weight.name is not None and not weight.uses():
                del graph.initializers[weight.name]
    if matmuls:
        raise UnsupportedModelError(
            f"the graph has MatMul nodes that the checkpoint does not quantize: {list(matmuls)}"
        )
