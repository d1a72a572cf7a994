"""Quantizing a model: calibrate, allocate, solve. Everything here works on a model in memory."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from mgptq_export.allocation import (
    Allocation,
    AllocationProblem,
    LinearProblem,
    allocate_by_gnn,
    allocate_by_hessian,
    allocate_uniformly,
)
from mgptq_export.calibration import HessianAccumulator, ModelStatistics, calibration_tokens, collect_statistics
from mgptq_export.models import FAMILIES, GroupModules, SourceModel
from mgptq_export.recipe import Recipe
from mgptq_export.solver import InverseFactor, factorize, pack_linear, solve_blockwise
from mgptq_runtime.errors import BudgetError
from mgptq_runtime.formats import BLOCK_COLUMNS, FORMATS, padded_columns
from mgptq_runtime.progress import track
from mgptq_runtime.quantized_model import InputGroup, QuantizedLinear, QuantizedModel, permutation_dtype

__all__ = [
    "Calibration",
    "Quantization",
    "allocate",
    "budget_range",
    "calibrate",
    "quantize",
    "round_to_nearest",
    "solve",
]

BITS_WINDOW = 0.05
SEQUENCES_AT_ONCE = 4


@dataclass(frozen=True)
class Calibration:
    """What the later steps know of the model on the calibration set.

    Attributes:
        tokens: int64 [samples, sequence].
        statistics: Hessians and sensitivities, in the model's (reordered) numbering.
        orders: for every input group the order of its columns, most important first: int64 [columns].
    """

    tokens: torch.Tensor
    statistics: ModelStatistics
    orders: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Quantization:
    """Attributes:
    model: the quantized model.
    tokens: the calibration set, int64 [samples, sequence].
    """

    model: QuantizedModel
    tokens: torch.Tensor


def quantize(source: SourceModel, recipe: Recipe) -> Quantization:
    """Quantize a model with MG-PTQ. The weights of ``source`` become the dequantized ones.

    Raises:
        BudgetError: the bits cannot be reached.
        CalibrationError, BadInputError: the calibration text cannot be used.
        NumericalError: NaN or infinity in activations or scores, or a Hessian beyond repair.
    """
    check_budget(source, recipe)
    calibration = calibrate(source, recipe)
    allocation, permuted = allocate(source, calibration, recipe)
    return Quantization(solve(source, calibration, allocation, permuted, recipe), calibration.tokens)


def calibrate(source: SourceModel, recipe: Recipe) -> Calibration:
    """Measure the model on calibration text, and put its columns in order of importance.

    The neurons between gate/up and down are renumbered in the model itself, which costs nothing to store; the
    other groups keep their numbering and get a permutation.
    """
    tokens = calibration_tokens(source, recipe)
    generator = torch.Generator().manual_seed(recipe.seed)
    statistics = collect_statistics(source, tokens, recipe.sensitivity_samples, generator)
    orders = {}
    for name, group in statistics.groups.items():
        orders[name] = group.hessian.diagonal().argsort(descending=True, stable=True)
    for index, layer in enumerate(source.layers):
        _renumber_intermediate(source, layer, index, statistics, orders)
    return Calibration(tokens, statistics, orders)


def _renumber_intermediate(
    source: SourceModel,
    layer: nn.Module,
    index: int,
    statistics: ModelStatistics,
    orders: dict[str, torch.Tensor],
) -> None:
    down, gate_up = f"blk.{index}.ffn_down", f"blk.{index}.ffn_gate_up"
    order = orders[down]
    FAMILIES[source.family].reorder_intermediate(layer, order)
    group = statistics.groups[down]
    group.hessian.copy_(group.hessian[order][:, order])
    for values in statistics.groups[gate_up].sensitivity.values():
        values.copy_(values[order])
    orders[down] = torch.arange(order.numel(), device=order.device)


def _permutation_bits(columns: int) -> int:
    return columns * permutation_dtype(columns).itemsize * 8


def _is_permuted(group: GroupModules) -> bool:
    return not group.name.endswith("ffn_down")


def budget_range(source: SourceModel, formats: Sequence[str]) -> tuple[float, float]:
    """The stored bits per linear weight that ``formats`` can reach: lowest and highest."""
    weights = padded = permutations = 0
    for group in source.groups():
        rows = sum(module.out_features for module in group.modules.values())
        weights += rows * group.columns
        padded += rows * padded_columns(group.columns)
        permutations += _permutation_bits(group.columns) if _is_permuted(group) else 0
    per_weight = [FORMATS[name].bits_per_weight for name in formats]
    low = min(per_weight) * padded / weights
    high = (max(per_weight) * padded + permutations) / weights
    return low, high


def check_budget(source: SourceModel, recipe: Recipe) -> None:
    """Raise BudgetError when the recipe's formats cannot deliver in (bits - 0.05, bits]."""
    low, high = budget_range(source, recipe.formats)
    if not low <= recipe.bits < high + BITS_WINDOW:
        raise BudgetError(
            f"{recipe.bits} stored bits per weight cannot be reached with formats {', '.join(recipe.formats)}; "
            f"for this model they reach {_round_up(low)} to {high:.2f}"
        )


def _round_up(bits: float) -> float:
    return float(np.ceil(bits * 100) / 100)


def allocate(source: SourceModel, calibration: Calibration, recipe: Recipe) -> tuple[Allocation, bool]:
    """Decide every block's format.

    Returns:
        the allocation, and whether columns are permuted (not where the budget has no room for permutations).
    """
    groups = source.groups()
    modules = [module for group in groups for module in group.modules.values()]
    weights = sum(module.out_features * module.in_features for module in modules)
    padded = sum(module.out_features * padded_columns(module.in_features) for module in modules)
    permutations = sum(_permutation_bits(group.columns) for group in groups if _is_permuted(group))
    room = int(recipe.bits * weights)
    least = padded * min(FORMATS[name].bits_per_weight for name in recipe.formats)
    permuted = least + permutations <= room and not _is_one_format(source, recipe)
    problem = AllocationProblem(
        linears=list(_linear_problems(source, calibration, permuted, recipe)),
        formats=tuple(sorted(recipe.formats, key=lambda name: FORMATS[name].bits_per_weight)),
        budget=room - (permutations if permuted else 0),
    )
    if recipe.allocator == "gnn":
        allocation = allocate_by_gnn(problem, recipe.training_steps, recipe.seed)
    elif recipe.allocator == "hessian":
        allocation = allocate_by_hessian(problem)
    else:
        allocation = allocate_uniformly(problem)
    delivered = (problem.stored_bits(allocation) + (permutations if permuted else 0)) / weights
    if delivered <= recipe.bits - BITS_WINDOW:
        raise BudgetError(
            f"{recipe.bits} stored bits per weight cannot be met closely: blocks of this model are so coarse that "
            f"{delivered:.4f} is the most that fits; ask for that"
        )
    return allocation, permuted


def _is_one_format(source: SourceModel, recipe: Recipe) -> bool:
    """Whether ``uniform`` comes out even without permutations: then it is the plain method, one format throughout."""
    exact = [budget_range(source, (name,))[0] for name in recipe.formats]
    return recipe.allocator == "uniform" and any(abs(bits - recipe.bits) < 1e-9 for bits in exact)


def _orders(calibration: Calibration, permuted: bool) -> Mapping[str, torch.Tensor]:
    if permuted:
        return calibration.orders
    return {name: torch.arange(len(order), device=order.device) for name, order in calibration.orders.items()}


def _linear_problems(
    source: SourceModel, calibration: Calibration, permuted: bool, recipe: Recipe
) -> Iterator[LinearProblem]:
    orders = _orders(calibration, permuted)
    layers = len(source.layers)
    with track("Factorizing Hessians", layers) as advance:
        for index in range(layers):
            for group in source.layer_groups(index):
                statistics = calibration.statistics.groups[group.name]
                order = orders[group.name]
                factor = factorize(statistics.hessian, order, recipe.damping, group.name)
                for name, module in group.modules.items():
                    weight = module.weight.detach().float()[:, order]
                    yield LinearProblem(name, index, layers, weight, factor, statistics.sensitivity[name])
            advance()


def solve(
    source: SourceModel, calibration: Calibration, allocation: Allocation, permuted: bool, recipe: Recipe
) -> QuantizedModel:
    """Quantize the weights, layer after layer, each on what the quantized layers before it put out.

    Embedding and head come first, so that every layer sees the embedding that will be stored.
    """
    embedding, head = _solve_embedding(source, calibration.statistics.head_hessian, recipe)
    orders = _orders(calibration, permuted)
    groups = []
    with torch.no_grad():
        states, arguments = _first_layer_inputs(source, calibration.tokens)
        with track("Quantizing", len(source.layers)) as advance:
            for index, layer in enumerate(source.layers):
                modules = source.layer_groups(index)
                hessians = _layer_hessians(layer, modules, states, arguments)
                for group in modules:
                    groups.append(_solve_group(group, hessians[group.name], orders[group.name], allocation, recipe))
                states = [_layer_output(layer, state, arguments) for state in states]
                advance()
    return _quantized_model(source, groups, embedding, head)


def round_to_nearest(source: SourceModel, fmt: str, recipe: Recipe) -> QuantizedModel:
    """The yardstick: every weight rounded on its own, one format throughout, nothing calibrated."""
    plain = {}
    for group in source.groups():
        plain[group.columns] = torch.eye(group.columns, device=source.model.device)
    groups = []
    with torch.no_grad():
        for group in source.groups():
            order = torch.arange(group.columns, device=source.model.device)
            blocks = padded_columns(group.columns) // BLOCK_COLUMNS
            formats = dict.fromkeys(group.modules, (fmt,) * blocks)
            groups.append(_solve_group(group, plain[group.columns], order, formats, recipe))
        identity = torch.eye(source.model.lm_head.in_features, device=source.model.device)
        embedding, head = _solve_embedding(source, identity, recipe)
    return _quantized_model(source, groups, embedding, head)


def _quantized_model(
    source: SourceModel, groups: list[InputGroup], embedding: QuantizedLinear, head: QuantizedLinear | None
) -> QuantizedModel:
    family = FAMILIES[source.family]
    return QuantizedModel(
        source.family,
        family.hyperparameters(source.model),
        tuple(groups),
        embedding,
        head,
        family.other_tensors(source.model),
    )


def _solve_group(
    group: GroupModules, hessian: torch.Tensor, order: torch.Tensor, allocation: Allocation, recipe: Recipe
) -> InputGroup:
    factor = factorize(hessian, order, recipe.damping, group.name)
    natural = torch.equal(order, torch.arange(len(order), device=order.device))
    permutation = None if natural else order.to(torch.int32).cpu().numpy()
    spans, start = [], 0
    for name, module in group.modules.items():
        spans.append((slice(start, start + module.out_features), allocation[name]))
        start += module.out_features
    stacked = torch.cat([module.weight.detach().float() for module in group.modules.values()])[:, order]
    solution = solve_blockwise(stacked, factor.upper, spans)
    linears = []
    for (name, module), (rows, formats) in zip(group.modules.items(), spans, strict=True):
        linear = pack_linear(
            name, solution.values[rows], solution.scales[rows], formats, module.in_features, permutation
        )
        _replace_weight(module, linear)
        linears.append(linear)
    return InputGroup(group.name, permutation, tuple(linears))


def _replace_weight(module: nn.Module, linear: QuantizedLinear) -> None:
    weight: Any = module.weight
    weight.data.copy_(torch.from_numpy(linear.dequantize()))


def _solve_embedding(
    source: SourceModel, hessian: torch.Tensor, recipe: Recipe
) -> tuple[QuantizedLinear, QuantizedLinear | None]:
    """Embedding and head; a tied matrix is solved once, as the head, whose error counts for every token."""
    model = source.model

    def quantized(name: str, module: nn.Module, factor: InverseFactor) -> QuantizedLinear:
        weight: Any = module.weight
        columns = weight.shape[1]
        formats = [recipe.embedding_format] * (padded_columns(columns) // BLOCK_COLUMNS)
        solution = solve_blockwise(weight.detach().float(), factor.upper, [(slice(0, weight.shape[0]), formats)])
        return pack_linear(name, solution.values, solution.scales, formats, columns, None)

    natural = torch.arange(hessian.shape[0], device=hessian.device)
    factor = factorize(hessian, natural, recipe.damping, "output")
    plain = factorize(torch.eye(hessian.shape[0], device=hessian.device), natural, recipe.damping, "token_embd")
    if source.tied:
        embedding, head = quantized("token_embd", model.lm_head, factor), None
        _replace_weight(model.lm_head, embedding)
    else:
        embedding = quantized("token_embd", model.model.embed_tokens, plain)
        head = quantized("output", model.lm_head, factor)
        _replace_weight(model.model.embed_tokens, embedding)
        _replace_weight(model.lm_head, head)
    return embedding, head


class _StopForward(Exception):
    pass


def _first_layer_inputs(source: SourceModel, tokens: torch.Tensor) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Hidden states [batch, sequence, hidden] that enter the first layer, and the arguments that every layer gets."""
    states: list[torch.Tensor] = []
    arguments: dict[str, Any] = {}

    def catch(module: nn.Module, inputs: tuple[torch.Tensor, ...], keywords: dict[str, Any]) -> None:
        states.append(inputs[0] if inputs else keywords.pop("hidden_states"))
        arguments.update(keywords)
        raise _StopForward

    handle = source.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for batch in tokens.split(SEQUENCES_AT_ONCE):
            with suppress(_StopForward):
                source.model(batch.to(source.model.device), use_cache=False)
    finally:
        handle.remove()
    return states, arguments


def _layer_output(layer: nn.Module, state: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    output = layer(state, **arguments)
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def _hooked(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layer_hessians(
    layer: nn.Module, groups: list[GroupModules], states: list[torch.Tensor], arguments: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Hessians of a layer's input groups on the given inputs: float32 [columns, columns] by group name."""
    accumulators = {group.name: HessianAccumulator(group.columns, states[0].device) for group in groups}

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
    with _hooked(handles):
        for state in states:
            with suppress(_StopForward):
                _layer_output(layer, state, arguments)
    return {name: accumulator.hessian for name, accumulator in accumulators.items()}
