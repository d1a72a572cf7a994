"""Pass: rotary cosines and sines are computed from the positions, as the reference computes them."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from mgptq_export.targets.onnx.node_names import layer_of
from mgptq_export.targets.onnx.packed_initializers import initializer
from mgptq_runtime.families.decoder import Decoder

__all__ = ["POSITIONS", "compute_rotations"]

POSITIONS = "position_ids"
PREFIX = "/model/rotations"

Dimension = int | str | ir.SymbolicDim | None
Rotation = tuple[ir.Value, ir.Value]


class _Rotations:
    """Makes the nodes in front of the graph; each once."""

    def __init__(self, graph: ir.Graph, decoder: Decoder, tensors: Mapping[str, np.ndarray]) -> None:
        self.graph, self.decoder, self.tensors = graph, decoder, tensors
        self.first_node = graph[0]
        self.position_ids = next(value for value in graph.inputs if value.name == POSITIONS)
        self.positions = self._positions()
        self.rotations: dict[tuple[str, str, int], Rotation] = {}

    def _node(
        self,
        name: str,
        op_type: str,
        inputs: Sequence[ir.Value],
        shape: Sequence[Dimension],
        **attributes: Any,
    ) -> ir.Value:
        node = ir.node(op_type, inputs, attributes, name=f"{PREFIX}/{name}")
        output = node.outputs[0]
        output.name, output.shape, output.dtype = f"{node.name}/output_0", ir.Shape(shape), ir.DataType.FLOAT
        self.graph.insert_before(self.first_node, node)
        return output

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        # Not an initializer: those go to the external file, where shape inference reads no axes.
        tensor = ir.tensor(array)
        value = self._node(name, "Constant", [], array.shape, value=tensor)
        value.dtype = tensor.dtype
        return value

    def _positions(self) -> ir.Value:
        """float32 [batch, sequence, 1]."""
        batch, sequence = self.position_ids.shape or (None, None)
        positions = self._node("Cast", "Cast", [self.position_ids], [batch, sequence], to=ir.DataType.FLOAT)
        last = self._constant("last_axis", np.array([-1], np.int64))
        return self._node("Unsqueeze", "Unsqueeze", [positions, last], [batch, sequence, 1])

    def _frequencies(self, first: str, later: str, switch: int) -> ir.Value:
        """The tensor ``first``; or, where the last position is ``switch`` or behind it, the tensor ``later``."""
        values = [
            self.graph.initializers.get(name) or initializer(self.graph, name, self.tensors[name])
            for name in dict.fromkeys((later, first))
        ]
        if len(values) == 1:
            return values[0]
        last = self._node(f"{later}/ReduceMax", "ReduceMax", [self.position_ids], [], keepdims=0)
        last.dtype = ir.DataType.INT64
        threshold = self._constant(f"{later}/first_position", np.array(switch, np.int64))
        is_later = self._node(f"{later}/GreaterOrEqual", "GreaterOrEqual", [last, threshold], [])
        is_later.dtype = ir.DataType.BOOL
        return self._node(f"{later}/Where", "Where", [is_later, *values], [self.decoder.rotary_size // 2])

    def of_layer(self, layer: int) -> Rotation:
        """Cosines and sines, float32 [batch, sequence, rotary_size / 2]."""
        choose, totals = self.decoder.frequencies_of, range(1, self.decoder.context_length + 1)
        first, later = choose(layer, totals[0]), choose(layer, totals[-1])
        # Index of the first total that is rotated otherwise, and so the position of the last token then.
        switch = bisect_left(totals, True, key=lambda total: choose(layer, total) != first)
        key = (first, later, switch)
        if key not in self.rotations:
            self.rotations[key] = self._rotation(*key)
        return self.rotations[key]

    def _rotation(self, first: str, later: str, switch: int) -> Rotation:
        shape = [*(self.positions.shape or ())[:2], self.decoder.rotary_size // 2]
        frequencies = self._frequencies(first, later, switch)
        angles = self._node(f"{first}/Mul", "Mul", [self.positions, frequencies], shape)
        cosines, sines = (self._node(f"{first}/{op}", op, [angles], shape) for op in ("Cos", "Sin"))
        factor = self.decoder.rope_attention_factor
        if factor == 1.0:
            return cosines, sines
        scale = self._constant(f"{first}/attention_factor", np.array(factor, np.float32))
        scaled = [self._node(f"{value.name}/Mul", "Mul", [value, scale], shape) for value in (cosines, sines)]
        return scaled[0], scaled[1]


def compute_rotations(graph: ir.Graph, decoder: Decoder, tensors: Mapping[str, np.ndarray]) -> None:
    """Let every ``RotaryEmbedding`` of the builder be the standard's, on computed cosines and sines, in place.

    The builder's tables hold a row for each position of the context, 32 MB at 131072 positions and 64 values, and
    differ from the model's for several kinds of frequencies; with computed values neither is so, and the frequencies
    may depend on the length of the text.

    Args:
        graph: has the input ``position_ids``, int64 [batch, sequence].
        decoder: says with which frequencies a layer rotates.
        tensors: float32 [rotary_size / 2] by name.
    """
    rotations = _Rotations(graph, decoder, tensors)
    for node in list(graph):
        if node.op_type != "RotaryEmbedding":
            continue
        rotation = rotations.of_layer(layer_of(node.name or ""))
        heads = decoder.kv_heads if "/k_rotary/" in (node.name or "") else decoder.heads
        partial = decoder.rotary_size if decoder.rotary_size < decoder.head_size else 0
        node.domain = ""
        for i, value in enumerate(rotation, start=1):
            node.replace_input_with(i, value)
        node.resize_inputs(3)
        node.attributes.clear()
        node.attributes.add(ir.AttrInt64("num_heads", heads))
        node.attributes.add(ir.AttrInt64("rotary_embedding_dim", partial))
    for name in [name for name in graph.initializers if name.startswith(("cos_cache", "sin_cache"))]:
        if not graph.initializers[name].uses():
            del graph.initializers[name]
