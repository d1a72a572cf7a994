"""Stored codes and scales as initializers of a graph."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mgptq_export.targets.onnx.storage import to_initializers
from mgptq_runtime.quantized_model import QuantizedLinear

__all__ = ["PackedSegment", "initializer", "packed_segments", "set_output"]


@dataclass(frozen=True)
class PackedSegment:
    """A segment in a graph.

    Attributes:
        format: a key of :data:`mgptq_runtime.formats.FORMATS`.
        columns: columns without padding.
        codes: uint8 [rows, blocks, code_bytes].
        scales: float16 [rows, blocks].
    """

    format: str
    columns: int
    codes: ir.Value
    scales: ir.Value


def initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A new initializer of the graph."""
    value = ir.val(name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value


def packed_segments(graph: ir.Graph, linear: QuantizedLinear) -> list[PackedSegment]:
    """The segments of a linear, their initializers registered under the linear's name."""
    segments = []
    remaining = linear.columns
    for i, segment in enumerate(linear.segments):
        name = f"{linear.name}.{i}.{segment.format}"
        codes, scales = (
            initializer(graph, f"{name}.{part}", array)
            for part, array in zip(("codes", "scales"), to_initializers(segment.format, segment.data), strict=True)
        )
        segments.append(PackedSegment(segment.format, min(segment.columns, remaining), codes, scales))
        remaining -= segment.columns
    return segments


def set_output(node: ir.Node, like: ir.Value, columns: int, index: int = 0) -> None:
    """Name an output of ``node`` and give it the type and shape of ``like``, ``columns`` wide."""
    output = node.outputs[index]
    output.name = f"{node.name}/output_{index}"
    output.type = like.type
    if like.shape is not None:
        output.shape = ir.Shape([*like.shape[:-1], columns])
