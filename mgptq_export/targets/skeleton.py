"""A quantized model without weights: what the writers need to tell how large their files will be.

The recipe's bits are spent to the last; which matrix gets how many is not known yet. So a skeleton spends them anyhow,
and says how far off that is.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mgptq_export.checkpoint import Checkpoint
from mgptq_export.families import GroupModules
from mgptq_export.golden import LENGTH, PROMPTS, TOP
from mgptq_export.layouts import Reach
from mgptq_export.models import SourceModel
from mgptq_export.recipe import Recipe
from mgptq_runtime.formats import GGML_FORMATS, format_named, padded_columns
from mgptq_runtime.golden import DIGEST_SIZE, GoldenVectors
from mgptq_runtime.quantized_model import InputGroup, QuantizedLinear, QuantizedModel, Segment

__all__ = ["PlannedFile", "Skeleton", "make_skeleton", "most_padding"]


# None that are written have more digits.
LONGEST_BITS = 99.9999


@dataclass(frozen=True)
class PlannedFile:
    """Attributes:
    path: in the package.
    bytes: its size when the budget is spent.
    most: what it never exceeds, whatever the allocation.
    exact: whether the size is known, which is then the most; otherwise it is an estimate.
    """

    path: str
    bytes: int
    most: int
    exact: bool = True


@dataclass(frozen=True)
class Skeleton:
    """What an exporter takes, of the right shapes and without values.

    Attributes:
        checkpoint: every matrix has as many segments as it can have; all bytes of packed data are one and the same.
        golden: zeros.
        formats: those that a linear may get, by its kind, and embedding and head, by their names.
        budget: bytes that all that competes and permutations may take.
        mixed: whether embedding and head compete with the linears.
    """

    checkpoint: Checkpoint
    golden: GoldenVectors
    formats: Mapping[str, tuple[str, ...]]
    budget: int
    mixed: bool

    @property
    def model(self) -> QuantizedModel:
        """The quantized model."""
        return self.checkpoint.model

    def competing(self) -> list[QuantizedLinear]:
        """All that the budget is for."""
        return [*self.model.linears(), *(self.model.tables() if self.mixed else [])]

    @property
    def unspent(self) -> int:
        """The budget less what it is for takes here, which may be more."""
        matrices = sum(matrix.stored_bytes for matrix in self.competing())
        return self.budget - matrices - sum(group.permutation_bytes for group in self.model.groups)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors of the model, the budget spent."""
        tables = 0 if self.mixed else sum(table.stored_bytes for table in self.model.tables())
        return self.budget + tables + sum(tensor.nbytes for tensor in self.model.tensors.values())

    def formats_of(self, linear: QuantizedLinear) -> tuple[str, ...]:
        """The formats that a linear, embedding or head may get."""
        return self.formats[linear.name.split(".")[-1]]

    def with_segments(self, count: int) -> "Skeleton":
        """The same with at most ``count`` segments per matrix, those of fewest bits."""

        def linear(old: QuantizedLinear) -> QuantizedLinear:
            formats = [segment.format for segment in old.segments[-count:]]
            return replace(_linear(old.name, old.rows, old.columns, formats), permutation=old.permutation)

        groups = [replace(group, linears=tuple(map(linear, group.linears))) for group in self.model.groups]
        head = None if self.model.head is None else linear(self.model.head)
        model = replace(self.model, groups=tuple(groups), embedding=linear(self.model.embedding), head=head)
        return replace(self, checkpoint=replace(self.checkpoint, model=model))


def most_padding(unit: int, alignment: int) -> int:
    """The most bytes that align the end of any number of units."""
    return alignment - math.gcd(unit, alignment)


def make_skeleton(source: SourceModel, recipe: Recipe, reach: Reach, folder: Path) -> Skeleton:
    """The skeleton of a model.

    Args:
        source: a model of shapes, see :func:`mgptq_export.models.load_shape`; its norms and the like become ones.
        reach: of the layout, for this model.
        folder: holds the tokenizer files.

    Raises:
        BudgetError: no format can hold a matrix.
    """
    _materialize_vectors(source.model)
    rows, columns = source.model.get_input_embeddings().weight.shape
    tables = {name: _linear(name, rows, columns, reach.tables[name]) for name in source.tables()}
    model = QuantizedModel(
        source.family.name,
        source.family.hyperparameters(source.model),
        tuple(_group(group, reach) for group in source.groups()),
        tables["token_embd"],
        tables.get("output"),
        source.family.other_tensors(source.model),
    )
    # A file has the bits that linears got of those that are shared: other digits.
    shown = replace(recipe, bits=LONGEST_BITS) if reach.mixed else recipe
    quantization = {"name": source.name, "recipe": shown.to_json()}
    checkpoint = Checkpoint(folder, model, {**source.config, "quantization_config": quantization})
    budget = math.floor(min(recipe.bits, reach.highest) * reach.weights) // 8
    golden = _golden(len(source.layers), rows, recipe)
    return Skeleton(checkpoint, golden, {**reach.formats, **reach.tables}, budget, reach.mixed)


def _materialize_vectors(model: nn.Module) -> None:
    """Give norms, biases and rotary frequencies values: ones, as exporters leave out biases of zeros."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dim() == 1:
                setattr(module, name, nn.Parameter(torch.ones(parameter.shape), requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.ones(buffer.shape))


def _group(group: GroupModules, reach: Reach) -> InputGroup:
    """Linears with segments of all formats; a permutation where the layout can store one."""
    formats = {name: reach.formats[name.split(".")[-1]] for name in group.modules}
    movable = not any(fmt in GGML_FORMATS for possible in formats.values() for fmt in possible)
    permutation = None
    if movable and not group.name.endswith("ffn_down"):  # the numbering of its neurons is free
        permutation = np.zeros(group.columns, np.int32)
    linears = [
        replace(_linear(name, module.out_features, module.in_features, formats[name]), permutation=permutation)
        for name, module in group.modules.items()
    ]
    return InputGroup(group.name, permutation, tuple(linears))


def _linear(name: str, rows: int, columns: int, formats: Sequence[str]) -> QuantizedLinear:
    """As many of the formats as there are blocks, most bits first; a ggml type takes the linear whole."""
    first = format_named(formats[0])
    if first.name in GGML_FORMATS:
        segments = [(first, columns // first.block_columns)]
    else:
        blocks = padded_columns(columns) // first.block_columns
        by_bits = sorted(map(format_named, formats), key=lambda fmt: -fmt.bits_per_weight)[-blocks:]
        segments = [(fmt, 1) for fmt in by_bits]
        segments[-1] = (by_bits[-1], blocks - len(by_bits) + 1)
    packed = tuple(
        Segment(fmt.name, np.broadcast_to(np.uint8(0), (rows, blocks * fmt.block_bytes))) for fmt, blocks in segments
    )
    return QuantizedLinear(name, rows, columns, packed)


def _golden(layers: int, vocabulary: int, recipe: Recipe) -> GoldenVectors:
    sequences = recipe.samples + (0 if recipe.calibration == "self" else recipe.own_samples)
    prompts, length = min(PROMPTS, sequences), min(LENGTH, recipe.sequence_length)
    shape = (prompts, length, min(TOP, vocabulary))
    arrays: dict[str, Any] = {
        "token_ids": np.zeros(shape[:2], np.int32),
        "top_ids": np.zeros(shape, np.int32),
        "top_logits": np.zeros(shape, np.float32),
        "log_partition": np.zeros(shape[:2], np.float32),
        "hidden_digests": np.zeros((layers + 1, prompts, DIGEST_SIZE), np.float32),
    }
    return GoldenVectors(**arrays)
