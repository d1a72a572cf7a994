"""The column layout, of container and ONNX: permuted columns, every 64-column block in a format of its own."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch

from mgptq_export.allocation import (
    Allocation,
    BlockProblem,
    InputColumns,
    LinearProblem,
    TableProblem,
    share_budget,
)
from mgptq_export.families import GroupModules
from mgptq_export.layouts.base import (
    Allocated,
    Attempt,
    Calibration,
    Reach,
    SolvedGroup,
    check_delivered,
    decide,
    stacked_rows,
)
from mgptq_export.models import SourceModel
from mgptq_export.recipe import BITS_GRID, MIXED, Recipe
from mgptq_export.solver import BlockwiseSolution, InverseFactor, descend, factorize, pack_linear, solve_blockwise
from mgptq_runtime.formats import BLOCK_COLUMNS, FORMATS, padded_columns
from mgptq_runtime.progress import track
from mgptq_runtime.quantized_model import InputGroup, QuantizedLinear, permutation_dtype

__all__ = ["ColumnLayout"]

# Weights that are solved together; several times their memory is taken on the way.
NUMBERS_AT_ONCE = 1 << 22


class ColumnLayout:
    """See :class:`mgptq_export.layouts.base.Layout`."""

    name = "columns"
    folder = "quantized"

    def reach(self, source: SourceModel, recipe: Recipe) -> Reach:
        """Any row length fits: blocks are padded."""
        weights = padded = permutations = 0
        mixed, kinds = recipe.embedding_format == MIXED, source.linear_kinds()
        for table in source.tables().values() if mixed else ():
            weights += table.numel()
            padded += len(table) * padded_columns(table.shape[1])
        for group in source.groups():
            rows = sum(module.out_features for module in group.modules.values())
            weights += rows * group.columns
            padded += rows * padded_columns(group.columns)
            permutations += _permutation_bits(group)
        per_weight = [FORMATS[name].bits_per_weight for name in recipe.formats]
        return Reach(
            lowest=min(per_weight) * padded / weights,
            highest=(max(per_weight) * padded + permutations) / weights,
            weights=weights,
            mixed=mixed,
            formats=dict.fromkeys(kinds, recipe.formats),
            excluded={kind: {} for kind in kinds},
            tables=dict.fromkeys(source.tables(), recipe.formats if mixed else (recipe.embedding_format,)),
        )

    def allocate(self, source: SourceModel, calibration: Calibration, recipe: Recipe, attempt: Attempt) -> Allocated:
        """Blocks compete; columns keep their order where the budget has no room for permutations."""
        reach = self.reach(source, recipe)
        permutations, room = sum(map(_permutation_bits, source.groups())), int(recipe.bits * reach.weights)
        if round(reach.lowest * reach.weights) + permutations <= room and not self._is_one_format(source, recipe):
            orders = calibration.orders
        else:
            orders, permutations = natural_orders(calibration), 0
        problem = BlockProblem(
            linears=list(linear_problems(source, calibration, orders, recipe)),
            formats=tuple(sorted(recipe.formats, key=lambda name: FORMATS[name].bits_per_weight)),
            budget=room - permutations,
            world=source.world,
        )
        weights, bits = sum(linear.rows * linear.columns for linear in problem.linears), recipe.bits
        if reach.mixed:
            tables, costs, left = share_budget(problem, table_problems(source, calibration, recipe))
            bits = math.ceil((left + permutations) / weights * BITS_GRID) / BITS_GRID
            problem = replace(problem, budget=left, estimated=costs)
        else:
            tables = tables_of_one_format(source, recipe.embedding_format)

        def check(formats: Allocation) -> None:
            check_delivered((problem.stored_bits(formats) + permutations) / weights, recipe, "blocks")

        settled = partial(Allocated, orders=orders, tables=tables, bits=bits)
        return decide(problem, recipe, attempt, check, settled)

    def _is_one_format(self, source: SourceModel, recipe: Recipe) -> bool:
        """Whether ``uniform`` comes out even without permutations: the plain method, one format throughout."""
        if recipe.allocator != "uniform" or recipe.embedding_format == MIXED:
            return False
        weights = sum(module.weight.numel() for group in source.groups() for module in group.modules.values())
        padded = sum(
            module.out_features * padded_columns(group.columns)
            for group in source.groups()
            for module in group.modules.values()
        )
        exact = [FORMATS[name].bits_per_weight * padded / weights for name in recipe.formats]
        return any(abs(bits - recipe.bits) < 1e-9 for bits in exact)

    def solve_group(
        self, group: GroupModules, hessian: torch.Tensor, allocated: Allocated, recipe: Recipe
    ) -> SolvedGroup:
        """All linears of the group along their common order: at once, or where that is much, some rows at a time."""
        order = allocated.orders[group.name]
        factor = factorize(hessian, order, recipe.damping, group.name)
        natural = torch.equal(order, torch.arange(len(order), device=order.device))
        permutation = None if natural else order.to(torch.int32).cpu().numpy()

        def solved(weights: Mapping[str, torch.Tensor]) -> list[QuantizedLinear]:
            spans, start = {}, 0
            for name, weight in weights.items():
                spans[name] = slice(start, start + len(weight))
                start += len(weight)
            rows_and_formats = [(rows, allocated.formats[name]) for name, rows in spans.items()]
            stacked = torch.cat(list(weights.values()))[:, order]
            solution = _solution(stacked, hessian, order, factor, rows_and_formats, recipe)
            return [
                pack_linear(
                    name,
                    solution.values[rows],
                    solution.scales[rows],
                    allocated.formats[name],
                    group.columns,
                    permutation,
                )
                for name, rows in spans.items()
            ]

        def solved_alone(name: str, weight: torch.Tensor) -> QuantizedLinear:
            return solved({name: weight})[0]

        weights = {name: module.weight.detach().float() for name, module in group.modules.items()}
        if sum(weight.numel() for weight in weights.values()) <= NUMBERS_AT_ONCE:
            linears = solved(weights)
        else:
            linears = [by_rows(weight, partial(solved_alone, name)) for name, weight in weights.items()]
        return SolvedGroup(InputGroup(group.name, permutation, tuple(linears)), factor.damping)

    def solve_table(
        self, name: str, weight: torch.Tensor, hessian: torch.Tensor, formats: Sequence[str], recipe: Recipe
    ) -> QuantizedLinear:
        """Along the residual stream's own order, which is by importance."""
        columns = weight.shape[1]
        natural = torch.arange(columns, device=hessian.device)
        factor = factorize(hessian, natural, recipe.damping, name)

        def solved(part: torch.Tensor) -> QuantizedLinear:
            solution = _solution(part, hessian, natural, factor, [(slice(0, len(part)), formats)], recipe)
            return pack_linear(name, solution.values, solution.scales, formats, columns, None)

        return by_rows(weight, solved)


def _solution(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    order: torch.Tensor,
    factor: InverseFactor,
    formats: Sequence[tuple[slice, Sequence[str]]],
    recipe: Recipe,
) -> BlockwiseSolution:
    """GPTQ's, and what the recipe's sweeps make of it; arguments as for :func:`descend`."""
    solution = solve_blockwise(weight, factor.upper, formats)
    descend(solution, weight, hessian, order, factor, formats, recipe.descent_sweeps)
    return solution


def by_rows(weight: torch.Tensor, solve: Callable[[torch.Tensor], QuantizedLinear]) -> QuantizedLinear:
    """Solve a large matrix some rows at a time, which do not depend on one another."""
    return stacked_rows([solve(part) for part in weight.split(max(1, NUMBERS_AT_ONCE // weight.shape[1]))])


def _permutation_bits(group: GroupModules) -> int:
    """What a group's column order takes; that of ffn_down lies in the numbering of its neurons and takes nothing."""
    if group.name.endswith("ffn_down"):
        return 0
    return group.columns * permutation_dtype(group.columns).itemsize * 8


def tables_of_one_format(source: SourceModel, fmt: str) -> Allocation:
    """All blocks of embedding and head alike."""
    blocks = padded_columns(source.model.lm_head.in_features) // BLOCK_COLUMNS
    return dict.fromkeys(source.tables(), (fmt,) * blocks)


def table_problems(source: SourceModel, calibration: Calibration, recipe: Recipe) -> list[TableProblem]:
    """Embedding and head, or the one matrix that is both, with what their errors cost.

    As a head, a matrix is a linear. As an embedding it adds its row to the residual stream: what an error of that costs
    is the token's frequency times the channels' sensitivity.
    """
    head, embedding = calibration.statistics.head, calibration.statistics.embedding
    natural = torch.arange(len(head.order), device=head.order.device)
    factor = factorize(head.hessian, natural, recipe.damping, head.name)

    def use(name: str, inputs: InputColumns, sensitivity: torch.Tensor) -> LinearProblem:
        weight = source.tables().get(name, source.tables()["token_embd"]).detach()
        return LinearProblem(name, 0, 1, weight, natural, inputs, sensitivity)

    as_head = use("output", InputColumns.of_factor(factor.upper), head.sensitivity["output"])
    # Hessians are twice the mean, too.
    as_embedding = use("token_embd", InputColumns.apart(2 * embedding.sensitivity), embedding.frequency)
    if source.tied:
        return [TableProblem("token_embd", (as_head, as_embedding))]
    return [TableProblem("token_embd", (as_embedding,)), TableProblem("output", (as_head,))]


def natural_orders(calibration: Calibration) -> Mapping[str, torch.Tensor]:
    """Every group's columns as they are."""
    return {name: torch.arange(len(order), device=order.device) for name, order in calibration.orders.items()}


def linear_problems(
    source: SourceModel, calibration: Calibration, orders: Mapping[str, torch.Tensor], recipe: Recipe
) -> Iterator[LinearProblem]:
    """All linears in forward order, columns in the given orders."""
    layers = len(source.layers)

    def of_layer(index: int) -> list[InputColumns]:
        found = []
        for group in source.layer_groups(index):
            statistics = calibration.statistics.groups[group.name]
            order = statistics.order[orders[group.name]]
            factor = factorize(statistics.measured, order, recipe.damping, group.name)
            found.append(InputColumns.of_factor(factor.upper))
        return found

    with track("Factorizing Hessians", layers) as advance:
        for index, columns in enumerate(source.world.map(of_layer, range(layers))):
            for group, inputs in zip(source.layer_groups(index), columns, strict=True):
                statistics = calibration.statistics.groups[group.name]
                for name, module in group.modules.items():
                    sensitivity, order = statistics.sensitivity[name], orders[group.name]
                    yield LinearProblem(name, index, layers, module.weight.detach(), order, inputs, sensitivity)
            advance()
