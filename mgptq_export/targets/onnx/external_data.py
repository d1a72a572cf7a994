"""Weights of a graph into one external file."""

import hashlib
from pathlib import Path

import onnx_ir as ir

__all__ = ["externalize"]

ALIGNMENT = 64


def externalize(graph: ir.Graph, path: Path) -> None:
    """Write all initializers to ``path`` in the graph's order, 64-byte aligned, and let the graph refer to it.

    Equal initializers share their bytes in the file: they are separate to ONNX Runtime, which maps each from the file
    and lets it go once its user has packed it; so a tied head does not keep the embedding in memory.
    """
    offsets: dict[bytes, int] = {}
    with path.open("wb") as file:
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None:
                raise ValueError(f"{value.name}: an initializer without a value")
            data = tensor.tobytes()
            digest = hashlib.sha256(data).digest()
            if digest not in offsets:
                file.write(b"\0" * (-file.tell() % ALIGNMENT))
                offsets[digest] = file.tell()
                file.write(data)
            value.const_value = ir.ExternalTensor(
                path.name,
                offsets[digest],
                len(data),
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=value.name or "",
                base_dir=path.parent,
            )
