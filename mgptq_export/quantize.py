"""Quantizing a model: calibrate, allocate, solve. Everything here works on a model in memory."""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import nn

from mgptq_export.allocation import Trial
from mgptq_export.calibration import (
    HessianAccumulator,
    ModelStatistics,
    attribute,
    calibration_tokens,
    collect_statistics,
)
from mgptq_export.checkpoint import pack_group, unpack_group
from mgptq_export.compute import compute_dtype, computing_in
from mgptq_export.families import GroupModules
from mgptq_export.hooks import hooked
from mgptq_export.journal import FORGETFUL, Journal, Record
from mgptq_export.layouts import COLUMNS, Allocated, Calibration, Layout
from mgptq_export.models import SourceModel
from mgptq_export.recipe import Recipe
from mgptq_runtime.errors import BudgetError
from mgptq_runtime.formats import BLOCK_COLUMNS, FORMATS, GGML_FORMATS, padded_columns
from mgptq_runtime.progress import track
from mgptq_runtime.quantized_model import InputGroup, QuantizedLinear, QuantizedModel

__all__ = ["Quantization", "Repairs", "calibrate", "check_budget", "quantize", "round_to_nearest", "solve"]

SEQUENCES_AT_ONCE = 4
HELD_OUT_ONE_IN = 8


Repairs = dict[str, dict[str, Any]]
"""What had to be mended, by input group: ``damping``, where the Hessian needed more than the recipe's; how many
``dead_columns`` never had any input; how many ``scales_at_limit`` would not fit a float16, or belong to zeros."""


@dataclass(frozen=True)
class Quantization:
    """Attributes:
    model: the quantized model.
    tokens: the calibration set, int64 [samples, sequence].
    repairs: see :func:`solve`.
    """

    model: QuantizedModel
    tokens: torch.Tensor
    repairs: Repairs


def quantize(
    source: SourceModel,
    recipe: Recipe,
    layout: Layout = COLUMNS,
    calibration: Calibration | None = None,
    journal: Journal = FORGETFUL,
) -> Quantization:
    """Quantize a model with MG-PTQ. The weights of ``source`` become the dequantized ones.

    Args:
        calibration: of this very model, where it has been calibrated before.
        journal: what has been done of this before, and where to keep what is done.

    Raises:
        BudgetError: the bits cannot be reached.
        CalibrationError, BadInputError: the calibration text cannot be used.
        NumericalError: NaN or infinity in activations or scores, or a Hessian beyond repair.
    """
    check_budget(source, recipe, layout)
    if calibration is None:
        calibration = calibrate(source, recipe)
    numbers = count(1)

    def attempt(allocated: Allocated) -> Trial:
        trial = journal.once(
            f"trial-{next(numbers)}", lambda: _attempt(source, calibration, recipe, layout, allocated).to_record()
        )
        return Trial.from_record(trial)

    def allocate() -> Record:
        return layout.allocate(source, calibration, recipe, attempt).to_record()

    allocated = Allocated.from_record(journal.once("allocation", allocate), source.model.device)
    repairs: Repairs = {}
    model = solve(source, calibration, allocated, recipe, layout, journal=journal, repairs=repairs)
    return Quantization(model, calibration.tokens, repairs)


def _attempt(
    source: SourceModel, calibration: Calibration, recipe: Recipe, layout: Layout, allocated: Allocated
) -> Trial:
    """Quantize a copy of the model as told, and measure it on text that its calibration has not seen."""
    working = source.copy()
    solve(working, calibration, allocated, recipe, layout, propagate=False)
    attribution = attribute(source, working, calibration.held_out)
    return Trial(attribution.divergence, attribution.losses)


def check_budget(source: SourceModel, recipe: Recipe, layout: Layout) -> None:
    """Raise BudgetError when the layout cannot deliver the recipe's bits."""
    reach = layout.reach(source, recipe)
    if not reach.includes(recipe.bits):
        names = dict.fromkeys(name for formats in reach.formats.values() for name in formats)
        raise BudgetError(
            f"{recipe.bits} stored bits per weight cannot be reached with formats {', '.join(names)}; "
            f"for this model they reach {_round_up(reach.lowest)} to {reach.highest:.2f}"
        )


def _round_up(bits: float) -> float:
    return math.ceil(bits * 100) / 100


def calibrate(source: SourceModel, recipe: Recipe, journal: Journal = FORGETFUL) -> Calibration:
    """Measure the model on calibration text, and put its columns in order of importance.

    What can be renumbered in the model itself costs nothing to store: the neurons between gate/up and down, and the
    channels of the residual stream, which all layers share. Beyond that a group's order is a permutation, where the
    layout has room for one.

    Args:
        journal: what has been done of this before, and where to keep what is done.
    """
    text = journal.once("text", lambda: Record({"tokens": calibration_tokens(source, recipe).numpy()}))
    tokens = torch.from_numpy(text.arrays["tokens"])
    generator = torch.Generator().manual_seed(recipe.seed)
    held_out = len(tokens) // HELD_OUT_ONE_IN

    def measure() -> Record:
        return collect_statistics(source, tokens[held_out:], recipe.sensitivity_samples, generator).to_record()

    statistics = ModelStatistics.from_record(journal.once("statistics", measure), source.model.device)
    _renumber_hidden(source, statistics)
    orders = {}
    for name, group in statistics.groups.items():
        orders[name] = group.hessian.diagonal().argsort(descending=True, stable=True)
    for index, layer in enumerate(source.layers):
        _renumber_intermediate(source, layer, index, statistics, orders)
    return Calibration(tokens, tokens[:held_out] if held_out else tokens, statistics, orders)


def _renumber_hidden(source: SourceModel, statistics: ModelStatistics) -> None:
    reading = [group.name for group in source.groups() if group.reads_hidden]
    diagonals = [statistics.groups[name].hessian.diagonal() for name in reading]
    importance = torch.stack([diagonal / diagonal.mean() for diagonal in diagonals]).mean(0)
    order = importance.argsort(descending=True, stable=True)
    source.family.reorder_hidden(source.model, order)
    for hessian in (*(statistics.groups[name].hessian for name in reading), statistics.head_hessian):
        hessian.copy_(hessian[order][:, order])
    for group in source.groups():
        if not group.reads_hidden:
            for values in statistics.groups[group.name].sensitivity.values():
                values.copy_(values[order])


def _renumber_intermediate(
    source: SourceModel,
    layer: nn.Module,
    index: int,
    statistics: ModelStatistics,
    orders: dict[str, torch.Tensor],
) -> None:
    down, gate_up = f"blk.{index}.ffn_down", f"blk.{index}.ffn_gate_up"
    order = orders[down]
    source.family.reorder_intermediate(layer, order)
    group = statistics.groups[down]
    group.hessian.copy_(group.hessian[order][:, order])
    for values in statistics.groups[gate_up].sensitivity.values():
        values.copy_(values[order])
    orders[down] = torch.arange(order.numel(), device=order.device)


def solve(
    source: SourceModel,
    calibration: Calibration,
    allocated: Allocated,
    recipe: Recipe,
    layout: Layout = COLUMNS,
    *,
    propagate: bool = True,
    journal: Journal = FORGETFUL,
    repairs: Repairs | None = None,
) -> QuantizedModel:
    """Quantize the weights, layer after layer.

    Embedding and head come first, so that every layer sees the embedding that will be stored.

    Args:
        propagate: fit each layer to what the quantized layers before it put out. Otherwise to the original's
            activations, whose Hessians are at hand: three times as quick, and a little worse.
        journal: input groups that have been quantized before, and where to keep those that are now.
        repairs: gets what had to be mended.
    """
    repairs = {} if repairs is None else repairs
    embedding, head = _solve_tables(source, calibration.statistics.head_hessian, recipe, layout)
    groups = []
    with torch.no_grad():
        flow = _Flow(source, calibration.tokens) if propagate else None
        with track("Quantizing", len(source.layers)) as advance:
            for index in range(len(source.layers)):
                modules = source.layer_groups(index)
                # Activations within a layer are those of its weights before any of them is replaced.
                missing = any(group.name not in journal for group in modules)
                hessians = flow.hessians(index) if flow and missing else {}
                for group in modules:
                    hessian = hessians.get(group.name, calibration.statistics.groups[group.name].hessian)
                    solving = partial(_solve_group, group, hessian, allocated, recipe, layout)
                    record = journal.once(group.name, solving)
                    groups.append(_replace_group(group, record))
                    repairs |= {group.name: record.facts["repairs"]} if record.facts["repairs"] else {}
                if flow:
                    flow.advance(index)
                advance()
    return _quantized_model(source, groups, embedding, head)


def round_to_nearest(source: SourceModel, fmt: str, recipe: Recipe) -> QuantizedModel:
    """The yardstick: every weight rounded on its own, one format throughout, nothing calibrated."""
    formats: dict[str, tuple[str, ...]] = {}
    orders = {}
    for group in source.groups():
        orders[group.name] = torch.arange(group.columns, device=source.model.device)
        formats |= dict.fromkeys(group.modules, (fmt,) * (padded_columns(group.columns) // BLOCK_COLUMNS))
    allocated = Allocated(formats, orders)
    groups = []
    with torch.no_grad():
        for group in source.groups():
            plain = torch.eye(group.columns, device=source.model.device)
            groups.append(_replace_group(group, _solve_group(group, plain, allocated, recipe, COLUMNS)))
        identity = torch.eye(source.model.lm_head.in_features, device=source.model.device)
        embedding, head = _solve_tables(source, identity, recipe, COLUMNS)
    return _quantized_model(source, groups, embedding, head)


def _quantized_model(
    source: SourceModel, groups: list[InputGroup], embedding: QuantizedLinear, head: QuantizedLinear | None
) -> QuantizedModel:
    family = source.family
    return QuantizedModel(
        family.name,
        family.hyperparameters(source.model),
        tuple(groups),
        embedding,
        head,
        family.other_tensors(source.model),
    )


def _solve_group(
    group: GroupModules, hessian: torch.Tensor, allocated: Allocated, recipe: Recipe, layout: Layout
) -> Record:
    """A quantized input group and its repairs, for a journal."""
    solved = layout.solve_group(group, hessian, allocated, recipe)
    found = {
        "damping": solved.damping if solved.damping > recipe.damping else 0,
        "dead_columns": int((hessian.diagonal() <= 0).sum()),
        "scales_at_limit": sum(map(_scales_at_limit, solved.group.linears)),
    }
    arrays, entry = pack_group(solved.group)
    return Record(arrays, {"group": entry, "repairs": {name: value for name, value in found.items() if value}})


def _scales_at_limit(linear: QuantizedLinear) -> int:
    limits = np.finfo(np.float16)
    count = 0
    for segment in linear.segments:
        if segment.format in FORMATS:
            scales = FORMATS[segment.format].unpack(segment.data)[1]
        else:
            scales = GGML_FORMATS[segment.format].unpack(segment.data)[1].d
        size = np.abs(scales)
        count += int(((size >= limits.max) | (size <= limits.smallest_normal)).sum())
    return count


def _replace_group(group: GroupModules, record: Record) -> InputGroup:
    """Replace a group's weights by quantized ones."""
    solved = unpack_group(record.arrays, record.facts["group"])
    for module, linear in zip(group.modules.values(), solved.linears, strict=True):
        _replace_weight(module, linear)
    return solved


def _replace_weight(module: nn.Module, linear: QuantizedLinear) -> None:
    weight: Any = module.weight
    weight.data.copy_(torch.from_numpy(linear.dequantize()))


def _solve_tables(
    source: SourceModel, hessian: torch.Tensor, recipe: Recipe, layout: Layout
) -> tuple[QuantizedLinear, QuantizedLinear | None]:
    """Embedding and head; a tied matrix is solved once, as the head, whose error counts for every token."""
    model = source.model

    def solved(name: str, module: nn.Module, hessian: torch.Tensor) -> QuantizedLinear:
        weight: Any = module.weight
        table = layout.solve_table(name, weight.detach().float(), hessian, recipe)
        _replace_weight(module, table)
        return table

    if source.tied:
        return solved("token_embd", model.lm_head, hessian), None
    plain = torch.eye(hessian.shape[0], device=hessian.device)
    return solved("token_embd", model.model.embed_tokens, plain), solved("output", model.lm_head, hessian)


class _StopForward(Exception):
    """Enough was seen."""


class _Flow:
    """What enters each layer, as the layers before it compute now: hidden states of the calibration set."""

    def __init__(self, source: SourceModel, tokens: torch.Tensor) -> None:
        self._source = source
        self._computing = partial(computing_in, compute_dtype(source.model.device), source.model.device)
        self._arguments = self._layer_arguments(tokens)
        self._states = self._first_layer_inputs(tokens)

    def hessians(self, index: int) -> dict[str, torch.Tensor]:
        """Hessians of a layer's input groups: float32 [columns, columns] by group name."""
        groups = self._source.layer_groups(index)
        accumulators = {group.name: HessianAccumulator(group.columns, self._states[0].device) for group in groups}

        def feed(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
            def add(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
                accumulators[name].add(inputs[0])
                if name == groups[-1].name:
                    raise _StopForward  # nothing behind the last group's input is wanted

            return add

        handles = []
        for group in groups:
            first = next(iter(group.modules.values()))
            handles.append(first.register_forward_pre_hook(feed(group.name)))
        with hooked(handles):
            for state in self._states:
                with suppress(_StopForward):
                    self._output(index, state)
        return {name: accumulator.hessian for name, accumulator in accumulators.items()}

    def advance(self, index: int) -> None:
        """Go through a layer."""
        self._states = [self._output(index, state) for state in self._states]

    def _output(self, index: int, state: torch.Tensor) -> torch.Tensor:
        with self._computing():
            output = self._source.layers[index](state, **self._arguments[index])
        return output[0] if isinstance(output, tuple) else output

    def _first_layer_inputs(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """Hidden states [batch, sequence, hidden] that enter the first layer."""
        states: list[torch.Tensor] = []

        def catch(module: nn.Module, inputs: tuple[torch.Tensor, ...], keywords: dict[str, Any]) -> None:
            states.append(inputs[0] if inputs else keywords["hidden_states"])
            raise _StopForward

        with hooked([self._source.layers[0].register_forward_pre_hook(catch, with_kwargs=True)]):
            for batch in tokens.split(SEQUENCES_AT_ONCE):
                with suppress(_StopForward):
                    self._source.model.model(batch.to(self._source.model.device), use_cache=False)
        return states

    def _layer_arguments(self, tokens: torch.Tensor) -> list[dict[str, Any]]:
        """What every layer gets beside the hidden states; of one sequence, which fits a batch of any size."""
        arguments: list[dict[str, Any]] = []

        def catch(module: nn.Module, inputs: tuple[torch.Tensor, ...], keywords: dict[str, Any]) -> None:
            arguments.append({name: value for name, value in keywords.items() if name != "hidden_states"})

        with hooked([layer.register_forward_pre_hook(catch, with_kwargs=True) for layer in self._source.layers]):
            self._source.model.model(tokens[:1].to(self._source.model.device), use_cache=False)
        return arguments
