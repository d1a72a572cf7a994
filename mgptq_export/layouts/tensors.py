"""The tensor layout, of llama.cpp: columns in the model's own order, every tensor in one stock ggml type."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from mgptq_export.allocation import Allocation, FileTensor, TensorProblem
from mgptq_export.families import GroupModules
from mgptq_export.layouts.base import Allocated, Attempt, Calibration, Reach, SolvedGroup, check_delivered, decide
from mgptq_export.layouts.columns import by_rows, linear_problems, natural_orders
from mgptq_export.models import SourceModel
from mgptq_export.recipe import MIXED, Recipe
from mgptq_export.solver import best_rows, factorize, pack_tensor, solve_tensor, sub_block_order
from mgptq_runtime.errors import BudgetError
from mgptq_runtime.formats import GGML_FORMATS
from mgptq_runtime.quantized_model import InputGroup, QuantizedLinear

__all__ = ["TensorLayout"]

SUPER_BLOCK_COLUMNS = 256

# For embedding and head, by the recipe's format: types of as many bits, the better one first. A tensor has one type.
TABLE_TYPES = {
    "b1": ("q1_0",),
    "b2": ("q2_0",),
    "b3": ("q3_k", "q4_0"),
    "b4": ("q4_k", "q4_0"),
    "b8": ("q8_0",),
    MIXED: ("q4_k", "q4_0"),
}


class TensorLayout:
    """See :class:`mgptq_export.layouts.base.Layout`."""

    name = "tensors"
    folder = "quantized-tensors"

    def reach(self, source: SourceModel, recipe: Recipe) -> Reach:
        """A type needs rows of whole blocks."""
        lowest, highest, weights = 0.0, 0.0, 0
        formats, excluded = {}, {}
        types = types_of(source, recipe)
        columns = {name: module.in_features for group in source.groups() for name, module in group.modules.items()}
        rows = {name: module.out_features for group in source.groups() for name, module in group.modules.items()}
        for name, width in columns.items():
            kind = name.split(".")[-1]
            possible = types_for(width, types, name)
            formats[kind] = possible
            excluded[kind] = {
                other: _why_not(width, other) for other in (recipe.ggml_types or GGML_FORMATS) if other not in possible
            }
            weights += rows[name] * width
            lowest += rows[name] * width * GGML_FORMATS[possible[0]].bits_per_weight
            highest += rows[name] * width * GGML_FORMATS[possible[-1]].bits_per_weight
        return Reach(
            lowest=lowest / weights,
            highest=highest / weights,
            weights=weights,
            mixed=False,
            formats=formats,
            excluded=excluded,
            tables=_table_types(source, recipe),
        )

    def allocate(self, source: SourceModel, calibration: Calibration, recipe: Recipe, attempt: Attempt) -> Allocated:
        """Tensors compete."""
        orders = natural_orders(calibration)
        linears = list(linear_problems(source, calibration, orders, recipe))
        weights = sum(linear.rows * linear.columns for linear in linears)
        columns = {linear.name: linear.columns for linear in linears}
        tensors = file_tensors(columns, source.family.gguf_fused, types_of(source, recipe))
        problem = TensorProblem(linears, tensors, int(recipe.bits * weights), source.world)

        def check(formats: Allocation) -> None:
            check_delivered(problem.stored_bits(formats) / weights, recipe, "tensors")

        settled = partial(Allocated, orders=orders, tables=_table_types(source, recipe), bits=recipe.bits)
        return decide(problem, recipe, attempt, check, settled)

    def solve_group(
        self, group: GroupModules, hessian: torch.Tensor, allocated: Allocated, recipe: Recipe
    ) -> SolvedGroup:
        """Every linear on its type's own grid."""
        solver = _TensorsOfOneInput(group.name, hessian, recipe)
        linears = []
        for name, module in group.modules.items():
            (fmt,) = allocated.formats[name]
            linears.append(solver.solve(name, module.weight.detach().float(), fmt))
        return SolvedGroup(InputGroup(group.name, None, tuple(linears)), solver.damping)

    def solve_table(
        self, name: str, weight: torch.Tensor, hessian: torch.Tensor, formats: Sequence[str], recipe: Recipe
    ) -> QuantizedLinear:
        """One type throughout."""
        solver, (fmt,) = _TensorsOfOneInput(name, hessian, recipe), formats
        return by_rows(weight, lambda part: solver.solve(name, part, fmt))


def _table_types(source: SourceModel, recipe: Recipe) -> Allocation:
    """The type of embedding and head: as many bits as the recipe's format, or more where rows do not fit."""
    columns = source.model.get_input_embeddings().weight.shape[1]
    fmt = types_for(columns, TABLE_TYPES[recipe.embedding_format], "token_embd", sort=False)[0]
    return dict.fromkeys(source.tables(), (fmt,))


class _TensorsOfOneInput:
    """Solves matrices that read one activation; a factor is made once for every order of columns.

    The columns cannot move in the file, but nothing says in which order to solve them. Two orders are tried, and every
    row keeps the better one: most important blocks first, and most important columns first.

    Attributes:
        damping: the most that any order's factor needed.
    """

    def __init__(self, name: str, hessian: torch.Tensor, recipe: Recipe) -> None:
        self._name, self._hessian, self._damping = name, hessian, recipe.damping
        self.damping = recipe.damping
        self._factors: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def solve(self, name: str, weight: torch.Tensor, fmt: str) -> QuantizedLinear:
        """Quantize float32 [rows, columns] in one type."""
        solutions = []
        for width in (GGML_FORMATS[fmt].sub_columns, 1):
            order, upper = self._factor(width, fmt)
            solutions.append(solve_tensor(weight, upper, fmt, order=order))
        return pack_tensor(name, best_rows(*solutions), weight.shape[1])

    def _factor(self, width: int, fmt: str) -> tuple[torch.Tensor, torch.Tensor]:
        """An order that keeps runs of ``width`` columns together, and the inverse Hessian's factor in it."""
        if width not in self._factors:
            diagonal = self._hessian.diagonal()
            order = sub_block_order(diagonal, fmt) if width > 1 else diagonal.argsort(descending=True, stable=True)
            factor = factorize(self._hessian, order, self._damping, self._name)
            self._factors[width] = order, factor.upper
            self.damping = max(self.damping, factor.damping)
        return self._factors[width]


def types_of(source: SourceModel, recipe: Recipe) -> tuple[str, ...]:
    """The types that tensors may choose from: the recipe's, or those with one scale per block, and K-quants too where
    they fit every linear.

    Where K-quants fit some linears only, these draw bits that others need more; and llama.cpp rounds their inputs with
    one scale for 256 values instead of 32.
    """
    if recipe.ggml_types:
        return recipe.ggml_types
    widths = {group.columns for group in source.groups()}
    k_quants = all(width % SUPER_BLOCK_COLUMNS == 0 for width in widths)
    return tuple(name for name, fmt in GGML_FORMATS.items() if k_quants or fmt.block_columns < SUPER_BLOCK_COLUMNS)


def _why_not(columns: int, name: str) -> str:
    block = GGML_FORMATS[name].block_columns
    if columns % block:
        return f"rows of {columns} are not whole blocks of {block}"
    return "do not fit every linear; --ggml-types lets them in"


def types_for(columns: int, types: tuple[str, ...], name: str, *, sort: bool = True) -> tuple[str, ...]:
    """Those types whose blocks fill rows of ``columns``, fewest bits first.

    Raises:
        BudgetError: there are none.
    """
    possible = [fmt for fmt in types if columns % GGML_FORMATS[fmt].block_columns == 0]
    if not possible:
        blocks = sorted({GGML_FORMATS[fmt].block_columns for fmt in types})
        raise BudgetError(
            f"{name}: rows of {columns} weights are not whole blocks of any ggml type among {', '.join(types)} "
            f"(blocks of {', '.join(map(str, blocks))}), so llama.cpp cannot hold them; use another target"
        )
    return tuple(sorted(possible, key=lambda fmt: GGML_FORMATS[fmt].bits_per_weight) if sort else possible)


def file_tensors(
    columns: Mapping[str, int], fused: Mapping[str, tuple[str, ...]], types: tuple[str, ...]
) -> list[FileTensor]:
    """Group linears, in their order, into the tensors that the file will have.

    Args:
        columns: row length by linear.
        fused: kinds of linears that one tensor holds, by its name.
        types: ggml types to choose from.
    """
    tensor_of = {kind: name for name, kinds in fused.items() for kind in kinds}
    members: dict[tuple[str, str], list[int]] = {}
    for i, name in enumerate(columns):
        block, kind = name.rsplit(".", 1)
        members.setdefault((block, tensor_of.get(kind, kind)), []).append(i)
    widths = list(columns.values())
    return [FileTensor(tuple(m), types_for(widths[m[0]], types, f"{key[0]}.{key[1]}")) for key, m in members.items()]
