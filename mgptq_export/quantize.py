"""Quantizing a model: calibrate, allocate, solve. Everything here works on a loaded model."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from mgptq_export.allocation import Allocation, Decision, Trial
from mgptq_export.calibration import (
    DriftFlow,
    GroupStatistics,
    Measured,
    ModelStatistics,
    attribute,
    calibration_sha256,
    calibration_tokens,
    collect_statistics,
    recovery_tokens,
)
from mgptq_export.checkpoint import pack_group, unpack_group
from mgptq_export.distributed import ALONE, World
from mgptq_export.families import GroupModules
from mgptq_export.journal import FORGETFUL, Journal, Record
from mgptq_export.layouts import COLUMNS, Allocated, Calibration, Layout, stacked_rows
from mgptq_export.layouts.columns import tables_of_one_format
from mgptq_export.models import SourceModel, load_dequantized
from mgptq_export.recipe import Recipe
from mgptq_export.solver import factorize
from mgptq_runtime.errors import BadInputError, BudgetError
from mgptq_runtime.formats import BLOCK_COLUMNS, FORMATS, GGML_FORMATS, padded_columns
from mgptq_runtime.progress import report, stage, track
from mgptq_runtime.quantized_model import InputGroup, QuantizedLinear, QuantizedModel, bits_stored

__all__ = [
    "Quantization",
    "Repairs",
    "calibrate",
    "calibration_set",
    "check_budget",
    "quantize",
    "round_to_nearest",
    "solve",
    "try_allocation",
]

HELD_OUT_ONE_IN = 8
# Relative to the mean of a Hessian's diagonal: with less, weights follow what only the calibration text shows.
DRIFT_DAMPING = 0.1
# With fewer tokens for every column of a linear, less of the drift is made up for.
DRIFT_TOKENS = 40


Repairs = dict[str, dict[str, Any]]
"""What had to be mended, by input group: ``damping``, where the Hessian needed more than the recipe's; how many
``dead_columns`` never had any input; how many ``scales_at_limit`` would not fit a float16, or belong to zeros."""

Targets = dict[str, torch.Tensor]
"""What each linear's weight was rounded from, the drift of what it reads being corrected: float16 [rows, columns]."""

Tables = tuple[QuantizedLinear, QuantizedLinear | None]
"""Embedding and head; None where these are one matrix."""


@dataclass(frozen=True)
class Quantization:
    """Attributes:
    model: the quantized model.
    bits: stored bits per linear weight that there was room for.
    tokens: the calibration set, int64 [samples, sequence].
    decision: who got how many bits, and why.
    repairs: see :func:`solve`.
    """

    model: QuantizedModel
    bits: float
    tokens: torch.Tensor
    decision: Decision
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
        journal: what has been done of this before, and where to keep what is done. Where nothing is kept, the best
            trial is solved again.

    Raises:
        BudgetError: the bits cannot be reached.
        CalibrationError, BadInputError: the calibration text cannot be used.
        NumericalError: NaN or infinity in activations or scores, or a Hessian beyond repair.
    """
    check_budget(source, recipe, layout)
    if calibration is None:
        calibration = calibrate(source, recipe)
    solved_tables: list[Tables] = []

    def tables(allocated: Allocated) -> Tables:
        """No trial changes what these are made of."""
        if not solved_tables:
            made = partial(_solve_tables, source, calibration.statistics.head.hessian, allocated.tables, recipe, layout)
            solved_tables.append(_tables_of(journal.once("tables", lambda: _tables_record(made()))))
        return solved_tables[0]

    def attempt(allocated: Allocated) -> Trial:
        name = _trial_name(allocated)
        tried = partial(try_allocation, source, calibration, recipe, layout, allocated)
        trial = journal.once(name, lambda: tried(tables(allocated), journal.within(name))[0].to_record())
        return Trial.from_record(trial)

    def allocate() -> Record:
        return layout.allocate(source, calibration, recipe, attempt).to_record()

    with stage("allocate"):
        allocated = Allocated.from_record(journal.once("allocation", allocate), source.model.device)
    repairs: Repairs = {}
    with stage("solve"):
        made = tables(allocated)
        text, part = calibration, journal
        if recipe.drift_correction and allocated.decision.divergences:
            text, part = _unseen(calibration), journal.within(_trial_name(allocated))
        model = solve(source, text, allocated, recipe, layout, journal=part, repairs=repairs, tables=made)
        report(f"{model.bits_stored:.4f} stored bits per weight")
    return Quantization(model, allocated.bits, calibration.tokens, allocated.decision, repairs)


def try_allocation(
    source: SourceModel,
    calibration: Calibration,
    recipe: Recipe,
    layout: Layout,
    allocated: Allocated,
    tables: Tables | None = None,
    journal: Journal = FORGETFUL,
) -> tuple[Trial, SourceModel, QuantizedModel]:
    """Quantize a copy of the model as told, and measure it on text that its calibration has not seen.

    Where drift is corrected, layers make up for much of what those before them lose, and other formats are worth their
    bits than where they do not: a trial goes through the layers in turn then, and is a solution that may be taken as it
    is. Without, it is fitted to the original's activations, which are at hand, in a third of the time.

    Args:
        tables: embedding and head, where they have been solved before.
        journal: input groups of this trial that have been quantized before, and where to keep those that are now.

    Returns:
        what was lost, the copy, and what its weights were made from.
    """
    working = source.copy()
    targets: Targets | None = None
    if recipe.drift_correction:
        text, targets = _unseen(calibration), {}
        model = solve(
            working,
            text,
            allocated,
            recipe,
            layout,
            original=source,
            journal=journal,
            tables=tables,
            targets=targets,
        )
    else:
        # To go over codes again would lower what all allocations lose, and take as long as the trial.
        plain = replace(recipe, descent_sweeps=0)
        model = solve(working, calibration, allocated, plain, layout, propagate=False, tables=tables)
    attribution = attribute(source, working, calibration.held_out, targets)
    return Trial(attribution.divergence, attribution.losses), working, model


def _trial_name(allocated: Allocated) -> str:
    """By what is tried: a network that learns once more, after a run was stopped, may propose something else."""
    formats = json.dumps(allocated.formats, sort_keys=True)
    return f"trial-{hashlib.sha256(formats.encode()).hexdigest()[:16]}"


def _unseen(calibration: Calibration) -> Calibration:
    """Without the text that trials are measured on, where there is other."""
    rest = calibration.tokens[len(calibration.held_out) :]
    return replace(calibration, tokens=rest) if len(rest) else calibration


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


@stage("calibrate")
def calibrate(source: SourceModel, recipe: Recipe, journal: Journal = FORGETFUL) -> Calibration:
    """Measure the model on calibration text, and put its columns in order of importance.

    What can be renumbered in the model itself costs nothing to store: the neurons between gate/up and down, and the
    channels of the residual stream, which all layers share. Beyond that a group's order is a permutation, where the
    layout has room for one.

    Args:
        journal: what has been done of this before, and where to keep what is done.
    """
    # Said at once: a file may change, or go, before a package says it.
    name, sha256 = recipe.to_json()["calibration"], calibration_sha256(recipe) if source.world.is_first else None
    tokens = calibration_set(source, recipe, journal)
    text = _recovery_set(source, recipe, tokens, journal) if recipe.recovers else tokens
    _check_shares(source, tokens)
    generator = torch.Generator().manual_seed(recipe.seed)
    held_out = len(tokens) // HELD_OUT_ONE_IN

    samples = recipe.sensitivity_samples
    measured = collect_statistics(source, tokens[held_out:], samples, generator, journal.within("statistics"))
    renumbered = _renumber_hidden(source, measured)
    orders = {name: group.diagonal.argsort(descending=True, stable=True) for name, group in renumbered.groups.items()}
    groups = dict(renumbered.groups)
    for index, layer in enumerate(source.layers):
        _renumber_intermediate(source, layer, index, groups, orders)
        source.memory.release_weights(layer)
    unseen = tokens[:held_out] if held_out else tokens
    return Calibration(tokens, unseen, text, replace(renumbered, groups=groups), orders, name, sha256)


def calibration_set(source: SourceModel, recipe: Recipe, journal: Journal = FORGETFUL) -> torch.Tensor:
    """What :func:`calibrate` measures the model on, with its journal: int64 [sequences, sequence_length]."""
    return _kept_tokens("text", partial(calibration_tokens, source, recipe), source, journal)


def _recovery_set(source: SourceModel, recipe: Recipe, tokens: torch.Tensor, journal: Journal) -> torch.Tensor:
    """Taken now and kept, as a data set of the hub may change, or be out of reach, before recovery needs it."""
    return _kept_tokens("recovery-text", partial(recovery_tokens, source, recipe, tokens), source, journal)


def _kept_tokens(name: str, make: Callable[[], torch.Tensor], source: SourceModel, journal: Journal) -> torch.Tensor:
    """Tokens that the first rank makes once, for a journal."""
    record = journal.once(name, lambda: Record({"tokens": source.world.from_first(make).numpy()}))
    return torch.from_numpy(record.arrays["tokens"])


def _check_shares(source: SourceModel, tokens: torch.Tensor) -> None:
    """Raise BadInputError where a rank would have nothing to measure the model on, or no row to solve."""
    measured = len(tokens) - len(tokens) // HELD_OUT_ONE_IN
    rows = min(module.out_features for group in source.groups() for module in group.modules.values())
    if min(measured, rows) < source.world.size:
        raise BadInputError(
            f"{source.world.size} processes are too many for {measured} calibration sequences and matrices of {rows} "
            f"rows; start at most {min(measured, rows)}, or give more --samples"
        )


def _renumber_hidden(source: SourceModel, statistics: ModelStatistics) -> ModelStatistics:
    """Statistics of the renumbered model."""
    reading = {group.name for group in source.groups() if group.reads_hidden}
    diagonals = [group.diagonal for name, group in statistics.groups.items() if name in reading]
    importance = torch.stack([diagonal / diagonal.mean() for diagonal in diagonals]).mean(0)
    # A mean's last digit may differ between machines, and all have to number alike.
    order = source.world.from_first(partial(importance.argsort, descending=True, stable=True))
    source.family.reorder_hidden(source.model, order)
    source.memory.release_weights(source.model)
    groups = {
        name: replace(group, order=order) if name in reading else _outputs_renumbered(group, order)
        for name, group in statistics.groups.items()
    }
    embedding = replace(statistics.embedding, sensitivity=statistics.embedding.sensitivity[order])
    return ModelStatistics(groups, replace(statistics.head, order=order), embedding)


def _renumber_intermediate(
    source: SourceModel,
    layer: nn.Module,
    index: int,
    groups: dict[str, GroupStatistics],
    orders: dict[str, torch.Tensor],
) -> None:
    """Put the statistics of the renumbered layer into ``groups``, and its order of columns into ``orders``."""
    down, gate_up = f"blk.{index}.ffn_down", f"blk.{index}.ffn_gate_up"
    order = orders[down]
    source.family.reorder_intermediate(layer, order)
    groups[down] = replace(groups[down], order=order)
    groups[gate_up] = _outputs_renumbered(groups[gate_up], order)
    orders[down] = torch.arange(order.numel(), device=order.device)


def _outputs_renumbered(group: GroupStatistics, order: torch.Tensor) -> GroupStatistics:
    return replace(group, sensitivity={name: values[order] for name, values in group.sensitivity.items()})


def solve(
    source: SourceModel,
    calibration: Calibration,
    allocated: Allocated,
    recipe: Recipe,
    layout: Layout = COLUMNS,
    *,
    propagate: bool = True,
    original: SourceModel | None = None,
    journal: Journal = FORGETFUL,
    repairs: Repairs | None = None,
    tables: Tables | None = None,
    targets: Targets | None = None,
) -> QuantizedModel:
    """Quantize the weights, layer after layer.

    Embedding and head come first, so that every layer sees the embedding that will be stored.

    Args:
        propagate: fit each layer to what the quantized layers before it put out; ranks share the rows of a matrix.
            Otherwise to the original's activations, whose Hessians are at hand: three times as quick, and a little
            worse; ranks deal out the layers.
        original: what ``source`` was, where it is at hand, else a copy is made; with ``propagate``, to correct drift.
        journal: with ``propagate``, input groups that have been quantized before, and where to keep those that are now.
        repairs: gets what had to be mended.
        tables: embedding and head, where they have been solved before.
        targets: with ``propagate``, gets what weights were rounded from, which ``journal`` then holds, too.
    """
    repairs = {} if repairs is None else repairs
    follows = propagate and not all(group.name in journal for group in source.groups())
    if not (follows and recipe.drift_correction):
        original = None
    elif original is None:
        original = source.copy()
    if tables is None:
        tables = _solve_tables(source, calibration.statistics.head.hessian, allocated.tables, recipe, layout)
    embedding, head = tables
    _replace_tables(source, embedding, head)
    flow = DriftFlow(source, original, calibration.tokens) if follows else None

    def solved_in_turn(flow: DriftFlow | None, index: int, group: GroupModules) -> Record:
        assert flow, group.name
        measured = flow.measure(index, group)
        _correct_drift(group, measured, recipe.drift_correction, calibration.tokens.numel())
        record = _solve_group(group, measured.hessian, allocated, recipe, layout, source.world)
        if targets is None:
            return record
        rounded_from = {_target(name): module.weight.half().cpu().numpy() for name, module in group.modules.items()}
        return Record({**record.arrays, **rounded_from}, record.facts)

    def solved_apart(index: int) -> list[Record]:
        hessians = ((group, calibration.statistics.groups[group.name].hessian) for group in source.layer_groups(index))
        return [_solve_group(group, hessian, allocated, recipe, layout) for group, hessian in hessians]

    apart = source.world.map(solved_apart, range(len(source.layers)))

    groups = []
    records: Iterator[Record]
    with torch.no_grad(), track("Quantizing", len(source.layers)) as advance:
        for index in range(len(source.layers)):
            modules = source.layer_groups(index)
            if flow:
                flow.enter(index, measuring=any(group.name not in journal for group in modules))
            if propagate:
                taken = partial(solved_in_turn, flow, index)
                records = (journal.once(group.name, partial(taken, group)) for group in modules)
            else:
                records = iter(next(apart))
            for group, record in zip(modules, records, strict=True):
                groups.append(_replace_group(source, group, record))
                if targets is not None:
                    targets |= {name: torch.from_numpy(record.arrays[_target(name)]) for name in group.modules}
                repairs |= {group.name: record.facts["repairs"]} if record.facts["repairs"] else {}
            report(f"{bits_stored(groups):.4f} stored bits so far")
            if flow:
                flow.leave(index)
            source.memory.release_weights(source.layers[index])
            advance()
    return _quantized_model(source, groups, embedding, head)


def _target(linear: str) -> str:
    """Where a record has what a linear was rounded from."""
    return f"{linear}.target"


def _correct_drift(group: GroupModules, measured: Measured, share: float, tokens: int) -> None:
    """Change a group's weights so that their outputs make up for some of what earlier layers have changed.

    A linear with weight ``W`` reads ``x``, and its outputs lie ``d`` behind the original's. Weights that make up for a
    share ``s`` of it as well as a linear can, ``sum |(W' - W) x - s d|^2`` being least, are
    ``W' = W + s (sum d x^T) inv(sum x x^T)``. To round these instead of ``W`` is the asymmetric calibration of GPTAQ
    (arXiv 2504.02692); here the residual stream's drift counts as well. Little text, of ``tokens``, would be learnt by
    heart that way, so it counts for less.
    """
    if measured.drift is None:
        return
    share *= min(1.0, tokens / (DRIFT_TOKENS * group.columns))
    natural = torch.arange(group.columns, device=measured.hessian.device)
    inverse = factorize(measured.hessian, natural, DRIFT_DAMPING, group.name).upper
    for module in group.modules.values():
        weight: Any = module.weight
        behind = measured.behind(weight)
        weight.addmm_(behind @ inverse.t(), inverse, alpha=share)


def round_to_nearest(source: SourceModel, fmt: str, recipe: Recipe) -> QuantizedModel:
    """The yardstick: every weight rounded on its own, one format throughout, nothing calibrated."""
    formats: dict[str, tuple[str, ...]] = {}
    orders = {}
    for group in source.groups():
        orders[group.name] = torch.arange(group.columns, device=source.model.device)
        formats |= dict.fromkeys(group.modules, (fmt,) * (padded_columns(group.columns) // BLOCK_COLUMNS))
    tables = tables_of_one_format(source, recipe.embedding_format)
    allocated = Allocated(Decision(formats), orders, tables, FORMATS[fmt].bits_per_weight)
    groups = []
    with torch.no_grad():
        for group in source.groups():
            plain = torch.eye(group.columns, device=source.model.device)
            groups.append(_replace_group(source, group, _solve_group(group, plain, allocated, recipe, COLUMNS)))
        identity = torch.eye(source.model.lm_head.in_features, device=source.model.device)
        embedding, head = _solve_tables(source, identity, tables, recipe, COLUMNS)
    _replace_tables(source, embedding, head)
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
    group: GroupModules,
    hessian: torch.Tensor,
    allocated: Allocated,
    recipe: Recipe,
    layout: Layout,
    world: World = ALONE,
) -> Record:
    """A quantized input group and its repairs, for a journal; each rank solves its rows of every linear."""
    part = group if world.size == 1 else _rows_of(group, world)
    parts = world.gather(layout.solve_group(part, hessian, allocated, recipe))
    linears = tuple(map(stacked_rows, zip(*(part.group.linears for part in parts), strict=True)))
    solved = replace(parts[0], group=replace(parts[0].group, linears=linears))
    found = {
        "damping": solved.damping if solved.damping > recipe.damping else 0,
        "dead_columns": int((hessian.diagonal() <= 0).sum()),
        "scales_at_limit": sum(map(_scales_at_limit, solved.group.linears)),
    }
    arrays, entry = pack_group(solved.group)
    return Record(arrays, {"group": entry, "repairs": {name: value for name, value in found.items() if value}})


def _rows_of(group: GroupModules, world: World) -> GroupModules:
    """This rank's rows of every linear of a group."""
    modules = {}
    for name, module in group.modules.items():
        weight = module.weight[world.rows(module.out_features)]
        modules[name] = nn.Linear(module.in_features, len(weight), bias=False, device="meta")
        modules[name].weight = nn.Parameter(weight, requires_grad=False)
    return replace(group, modules=modules)


def _scales_at_limit(linear: QuantizedLinear) -> int:
    limits = np.finfo(np.float16)
    count = 0
    for segment in linear.segments:
        if segment.format in FORMATS:
            scales = FORMATS[segment.format].unpack(segment.data)[1]
            smallest = float(limits.smallest_normal)
        else:
            # ggml's may be subnormal, and are, where sub-blocks have scales of their own.
            scales, smallest = GGML_FORMATS[segment.format].unpack(segment.data)[1].d, 0.0
        size = np.abs(scales)
        count += int(((size >= limits.max) | (size <= smallest)).sum())
    return count


def _replace_group(source: SourceModel, group: GroupModules, record: Record) -> InputGroup:
    """Replace a group's weights by quantized ones."""
    solved = unpack_group(record.arrays, record.facts["group"])
    for module, linear in zip(group.modules.values(), solved.linears, strict=True):
        load_dequantized(source, module, linear)
    return solved


def _solve_tables(
    source: SourceModel, hessian: torch.Tensor, formats: Allocation, recipe: Recipe, layout: Layout
) -> Tables:
    """Embedding and head; a tied matrix is solved once, as the head, whose error counts for every token."""

    def solved(name: str, hessian: torch.Tensor) -> QuantizedLinear:
        weight = source.tables()[name].detach()
        mine = weight[source.world.rows(len(weight))].float()
        return stacked_rows(source.world.gather(layout.solve_table(name, mine, hessian, formats[name], recipe)))

    if source.tied:
        return solved("token_embd", hessian), None
    return solved("token_embd", torch.eye(len(hessian), device=hessian.device)), solved("output", hessian)


def _tables_record(tables: Tables) -> Record:
    """Embedding and head, for a journal."""
    return Record(*pack_group(InputGroup("tables", None, tuple(table for table in tables if table is not None))))


def _tables_of(record: Record) -> Tables:
    """What :func:`_tables_record` packed."""
    embedding, *head = unpack_group(record.arrays, record.facts).linears
    return embedding, head[0] if head else None


def _replace_tables(source: SourceModel, embedding: QuantizedLinear, head: QuantizedLinear | None) -> None:
    """Replace the weights of embedding and head by quantized ones."""
    load_dequantized(source, source.model.model.embed_tokens, embedding)
    if head is not None:
        load_dequantized(source, source.model.lm_head, head)
