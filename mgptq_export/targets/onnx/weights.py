"""Weights as a written package holds them, to prove that they are the checkpoint's."""

from pathlib import Path

import numpy as np
import onnx_ir as ir

from mgptq_export.targets.onnx.operators import DOMAIN, EMBEDDING, HEAD, MATMUL, PERMUTE
from mgptq_export.targets.onnx.storage import from_initializers
from mgptq_runtime.formats import FORMATS

__all__ = ["read_onnx_weights"]

FORMATS_OF_OPERATOR = {name: formats for table in (MATMUL, HEAD, EMBEDDING) for formats, name in table.items()}


def _constant(value: ir.Value | None) -> np.ndarray:
    """Value of an initializer or of a Constant node."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    if tensor is None:
        raise ValueError(f"{value}: not a constant")
    return tensor.numpy()


def _columns_read(value: ir.Value | None, width: int) -> np.ndarray:
    """The activation's columns, in the model's own order, that ``value`` holds: int [width]."""
    start = 0
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "Split" and value is not None:
        start = int(_constant(node.inputs[1])[: value.index()].sum())
        source = node.inputs[0]
        node = source.producer() if source is not None else None
    if node is not None and node.domain == DOMAIN and node.op_type == PERMUTE:
        return _constant(node.inputs[1]).astype(np.int64)[start : start + width]
    return np.arange(start, start + width)


def _weights(node: ir.Node) -> np.ndarray:
    """float32 [rows, blocks * 64] of one operator's initializers, by the formats' own code."""
    stored = [_constant(value) for value in node.inputs[1:]]
    formats = FORMATS_OF_OPERATOR[node.op_type]
    parts = [
        FORMATS[fmt].dequantize(from_initializers(fmt, codes, scales))
        for fmt, codes, scales in zip(formats, stored[::2], stored[1::2], strict=True)
    ]
    return np.concatenate(parts, axis=1)


def read_onnx_weights(folder: Path) -> dict[str, np.ndarray]:
    """Dequantize all matrices of a written package from its initializers, following the graph's wiring.

    Args:
        folder: as :func:`export_onnx` wrote it.

    Returns:
        Canonical name (``blk.0.attn_q``, ``token_embd``, ``output``) to float32 [rows, columns] in the model's own
        column order. ``output`` is there when the head is tied to the embedding, too.

    Raises:
        ValueError: a graph that this target did not write.
    """
    graph = ir.load(folder / "model.onnx").graph
    parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for node in graph:
        if node.domain != DOMAIN or node.op_type not in FORMATS_OF_OPERATOR:
            continue
        codes = node.inputs[1]
        # LINEAR.SEGMENT.FORMAT.codes
        name = str(codes and codes.name).rsplit(".", 3)[0]
        width = node.attributes["K"].as_int()
        if node.op_type not in EMBEDDING.values():
            columns = _columns_read(node.inputs[0], width)
        else:
            start = sum(len(columns) for _, columns in parts.get(name, []))
            columns = np.arange(start, start + width)
        parts.setdefault(name, []).append((_weights(node), columns))
    return {name: _assemble(segments) for name, segments in parts.items()}


def _assemble(parts: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    matrix = np.full((len(parts[0][0]), sum(len(columns) for _, columns in parts)), np.nan, np.float32)
    for weight, columns in parts:
        matrix[:, columns] = weight[:, : len(columns)]
    return matrix
