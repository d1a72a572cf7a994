"""The sizes of an ONNX package's files that are not written."""

import tempfile
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from mgptq_export.targets.onnx.builder_graph import build_float_graph
from mgptq_export.targets.onnx.export import (
    EXACT_LEVEL,
    EXACT_MODEL,
    FAST_LEVEL,
    MODEL,
    WEIGHTS,
    quantized_graph,
    set_operators,
)
from mgptq_export.targets.onnx.external_data import ALIGNMENT
from mgptq_export.targets.onnx.operators import EMBEDDING, HEAD, MATMUL, operators
from mgptq_export.targets.skeleton import PlannedFile, Skeleton, most_padding
from mgptq_runtime.formats import BLOCK_COLUMNS, FORMATS, padded_columns
from mgptq_runtime.package import ONNX_FOLDER
from mgptq_runtime.quantized_model import InputGroup, QuantizedLinear, QuantizedModel

__all__ = ["onnx_files"]

SCALE_BYTES = 2
LEVELS = {MODEL: FAST_LEVEL, EXACT_MODEL: EXACT_LEVEL}
# How many formats the allocator gives a linear: a guess that only the graphs' sizes depend on.
USUAL_SEGMENTS = 2
# By how much the numbers that a graph holds of one segment can be longer than in another segment's place: four offsets
# and lengths in the file, in decimal; five widths and numbers of blocks, and the lengths of what they lie in.
NUMBER_BYTES = 48


def onnx_files(skeleton: Skeleton) -> list[PlannedFile]:
    """The file of weights, and both graphs, whose sizes are estimates: they depend on the number of segments.

    Raises:
        UnsupportedModelError: a family or a configuration that cannot be exported.
    """
    usual = skeleton.with_segments(USUAL_SEGMENTS)
    widest = replace(skeleton, checkpoint=replace(skeleton.checkpoint, model=_ungrouped(skeleton.model)))
    # A tied matrix is named by the embedding's nodes and by the head's.
    segments = sum(len(matrix.segments) for matrix in (*skeleton.competing(), skeleton.model.embedding))
    with tempfile.TemporaryDirectory() as scratch:
        model, end = _sized_graph(usual, Path(scratch) / "usual")
        sizes = {name: _graph_size(model, level, Path(scratch) / name) for name, level in LEVELS.items()}
        model, _ = _sized_graph(widest, Path(scratch) / "widest", pairs=False)
        possible = _possible_operators(skeleton)
        most = {name: _graph_size(model, level, Path(scratch) / name, possible) for name, level in LEVELS.items()}
    weights = end + usual.unspent + _padding(usual)
    graphs = [
        PlannedFile(f"{ONNX_FOLDER}/{name}", size, most[name] + segments * NUMBER_BYTES, exact=False)
        for name, size in sizes.items()
    ]
    return [PlannedFile(f"{ONNX_FOLDER}/{WEIGHTS}", weights, weights), *graphs]


def _possible_operators(skeleton: Skeleton) -> set[str]:
    """Names of all that an allocation may need."""
    tables, found = {table.name for table in skeleton.model.tables()}, set()
    for matrix, formats in skeleton.formats.items():
        for names in (HEAD, EMBEDDING) if matrix in tables else (MATMUL,):
            found |= {name for of_node, name in names.items() if set(of_node).issubset(formats)}
    return found


def _sized_graph(skeleton: Skeleton, scratch: Path, *, pairs: bool = True) -> tuple[ir.Model, int]:
    """The graph of a skeleton, and the size of its file of weights."""
    one_row = replace(skeleton.checkpoint, model=_one_row(skeleton.model))
    graph_model, _ = build_float_graph(one_row, scratch)
    model = quantized_graph(one_row, graph_model, pairs=pairs)
    return model, _externalize_shapes(model.graph, skeleton.model)


def _ungrouped(model: QuantizedModel) -> QuantizedModel:
    """Every linear in a group of its own, of a longer name: none cuts the activation as another does."""
    groups = [
        InputGroup(f"{group.name}.{linear.name}", group.permutation if linear is group.linears[0] else None, (linear,))
        for group in model.groups
        for linear in group.linears
    ]
    return replace(model, groups=tuple(groups))


def _one_row(model: QuantizedModel) -> QuantizedModel:
    """The model with packed data of a single row: graphs are made of names and sizes, not of values."""

    def linear(old: QuantizedLinear) -> QuantizedLinear:
        return replace(old, segments=tuple(replace(segment, data=segment.data[:1]) for segment in old.segments))

    groups = tuple(replace(group, linears=tuple(map(linear, group.linears))) for group in model.groups)
    head = None if model.head is None else linear(model.head)
    return replace(model, groups=groups, embedding=linear(model.embedding), head=head)


def _externalize_shapes(graph: ir.Graph, model: QuantizedModel) -> int:
    """Let the graph refer to a file of all initializers, as :func:`externalize` does, and return the file's size.

    Args:
        graph: its initializers of packed data have one row.
        model: with all rows.
    """
    tables = [model.embedding, model.head or replace(model.embedding, name="output")]
    rows = {linear.name: linear.rows for linear in (*model.linears(), *tables)}
    offsets: dict[str, int] = {}
    end = 0
    for value in graph.initializers.values():
        name, tensor = value.name or "", value.const_value
        if tensor is None:
            raise ValueError(f"{name}: an initializer without a value")
        linear = name.rsplit(".", 3)[0]
        shape, size = list(tensor.shape.numpy()), tensor.nbytes
        if linear in rows:
            shape[0], size = rows[linear], size * rows[linear]
        # A tied head is the embedding again, whose bytes it shares.
        shared = name.replace("output.", "token_embd.") if model.head is None and linear == "output" else name
        if shared not in offsets:
            offsets[shared] = end + -end % ALIGNMENT
            end = offsets[shared] + size
        value.const_value = ir.ExternalTensor(
            WEIGHTS, offsets[shared], size, tensor.dtype, shape=ir.Shape(shape), name=name
        )
    return end


def _graph_size(model: ir.Model, accuracy_level: int, path: Path, more_operators: Collection[str] = ()) -> int:
    """Bytes of the graph with the operators that it uses, and more of them by name."""
    set_operators(model, accuracy_level)
    for function in operators(accuracy_level):
        if function.name in more_operators:
            model.functions[function.identifier()] = function
    ir.save(model, path)
    return path.stat().st_size


def _padding(skeleton: Skeleton) -> int:
    """The most that aligns codes and scales of all that competes; nothing where rows are a multiple of 32."""
    total = 0
    for linear in skeleton.competing():
        formats = [FORMATS[name] for name in skeleton.formats_of(linear)]
        codes = max(most_padding(linear.rows * (fmt.block_bytes - SCALE_BYTES), ALIGNMENT) for fmt in formats)
        scales = most_padding(linear.rows * SCALE_BYTES, ALIGNMENT)
        total += min(len(formats), padded_columns(linear.columns) // BLOCK_COLUMNS) * (codes + scales)
    return total
