"""One linear in one stock ggml type: codes solved on the type's own grid."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from mgptq_export.solver.block_fit import BlockFit, fit_blocks, fit_sub_blocks
from mgptq_export.solver.grids import Grid, grid_of
from mgptq_runtime.formats import GGML_FORMATS, BlockParameters, GgmlFormat
from mgptq_runtime.quantized_model import QuantizedLinear, Segment

__all__ = ["TensorSolution", "best_rows", "pack_tensor", "solve_tensor", "sub_block_order", "tensor_error"]

ERROR_CHUNK_WEIGHTS = 1 << 21
STATIC_CHUNK_COLUMNS = 64


@dataclass(frozen=True)
class TensorSolution:
    """Attributes:
    format: a key of :data:`mgptq_runtime.formats.GGML_FORMATS`.
    values: float32 [rows, columns], integers on the type's grid, columns in storage order.
    fit: the blocks' parameters: ``d`` and ``dmin`` [rows, blocks], ``scales`` and ``mins`` [rows, sub-blocks].
    block_errors: float64 [rows, blocks], ``sum ((w - q) / U_jj)^2`` over a block's columns: the error of the layer's
        output that GPTQ minimizes, up to a factor.
    """

    format: str
    values: torch.Tensor
    fit: BlockFit
    block_errors: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """The quantized weights: float32 [rows, columns], bit for bit what the packed tensor means."""
        fmt = GGML_FORMATS[self.format]
        sub_blocks = fmt.block_columns // fmt.sub_columns
        steps = self.fit.d.repeat_interleave(sub_blocks, 1) * self.fit.scales
        minima = self.fit.dmin.repeat_interleave(sub_blocks, 1) * self.fit.mins
        weight = steps.unsqueeze(-1) * self.values.unflatten(1, (-1, fmt.sub_columns))
        return (weight - minima.unsqueeze(-1)).flatten(1) if fmt.largest_min is not None else weight.flatten(1)


def sub_block_order(importance: torch.Tensor, format_name: str) -> torch.Tensor:
    """The most important sub-blocks first, and in each its most important columns: int64 [columns].

    Args:
        importance: float [columns], of columns in storage order; the Hessian's diagonal, say.
        format_name: a key of :data:`mgptq_runtime.formats.GGML_FORMATS`.
    """
    parts = importance.unflatten(0, (-1, GGML_FORMATS[format_name].sub_columns))
    within = parts.argsort(dim=1, descending=True, stable=True)
    columns = within + torch.arange(len(parts), device=parts.device).unsqueeze(1) * parts.shape[1]
    return columns[parts.sum(1).argsort(dim=0, descending=True, stable=True)].flatten()


def solve_tensor(
    weight: torch.Tensor,
    upper: torch.Tensor,
    format_name: str,
    *,
    order: torch.Tensor | None = None,
    refit: bool = True,
    candidates: int | None = None,
) -> TensorSolution:
    """Quantize a linear by GPTQ (arXiv 2210.17323, algorithm 1) on the grid of one ggml type.

    Where the order keeps the columns of every sub-block together, as storage order and :func:`sub_block_order` do, a
    block's parameters are searched when the block is reached, so that they fit the weights as compensated so far. In
    any other order all parameters are fitted to the original weights first ("static groups").

    Args:
        weight: float32 [rows, columns], columns in storage order, whole blocks.
        upper: float32 [columns, columns], see :class:`mgptq_export.solver.factor.InverseFactor`; columns in the order
            in which they are quantized.
        format_name: a key of :data:`mgptq_runtime.formats.GGML_FORMATS`.
        order: int64 [columns], the storage column that is quantized first, second, ...; None for storage order.
        refit: fit every sub-block again when it is reached, its block's ``d`` and ``dmin`` being settled.
        candidates: see :func:`mgptq_export.solver.block_fit.fit_blocks`.

    Raises:
        ValueError: columns that are not whole blocks.
    """
    fmt = GGML_FORMATS[format_name]
    _check_columns(weight, fmt)
    if order is None:
        return _TensorSolver(weight, upper, fmt, None, candidates).solve(refit)
    sub_blocks = (order // fmt.sub_columns).unflatten(0, (-1, fmt.sub_columns))
    if torch.equal(sub_blocks, sub_blocks[:, :1].expand_as(sub_blocks)):
        return _TensorSolver(weight, upper, fmt, order, candidates).solve(refit)
    return _solve_static(weight, upper, fmt, order, candidates)


def _check_columns(weight: torch.Tensor, fmt: GgmlFormat) -> None:
    if weight.shape[1] % fmt.block_columns:
        raise ValueError(f"{fmt.name}: {weight.shape[1]} columns are not whole blocks of {fmt.block_columns}")


class _TensorSolver:
    """Solves sub-block after sub-block; holds weights, values and errors in that order, parameters in storage order."""

    def __init__(
        self,
        weight: torch.Tensor,
        upper: torch.Tensor,
        fmt: GgmlFormat,
        order: torch.Tensor | None,
        candidates: int | None,
    ) -> None:
        rows, columns = weight.shape
        self._fmt, self._grid, self._upper, self._candidates = fmt, grid_of(fmt.name), upper, candidates
        # In storage order the columns after a block can wait until the block is done.
        self._batch = fmt.block_columns if order is None else fmt.sub_columns
        self._order = torch.arange(columns, device=weight.device) if order is None else order
        self._position = self._order.argsort()
        self._remaining = weight[:, self._order]
        self._importance = upper.diagonal().pow(-2)
        self._values, self._errors = torch.empty_like(self._remaining), torch.empty_like(self._remaining)
        per_block = weight.new_zeros(rows, columns // fmt.block_columns)
        per_sub_block = weight.new_zeros(rows, columns // fmt.sub_columns)
        self._fit = BlockFit(per_block, per_sub_block, per_block.clone(), per_sub_block.clone())
        self._fitted: set[int] = set()

    def solve(self, refit: bool) -> TensorSolution:
        """Solve everything; ``refit`` as in :func:`solve_tensor`."""
        columns = len(self._order)
        for start in range(0, columns, self._batch):
            batch = slice(start, start + self._batch)
            for first in range(start, batch.stop, self._fmt.sub_columns):
                span = slice(first, first + self._fmt.sub_columns)
                self._solve_sub_block(span, refit)
                self._compensate(span, slice(span.stop, batch.stop))
            self._compensate(batch, slice(batch.stop, columns))
        errors = self._errors[:, self._position].double().square()
        return TensorSolution(
            self._fmt.name,
            self._values[:, self._position],
            self._fit,
            errors.unflatten(1, (-1, self._fmt.block_columns)).sum(-1),
        )

    def _compensate(self, done: slice, later: slice) -> None:
        self._remaining[:, later].addmm_(self._errors[:, done], self._upper[done, later], alpha=-1.0)

    def _solve_sub_block(self, span: slice, refit: bool) -> None:
        column = int(self._order[span.start])
        block, index = column // self._fmt.block_columns, column // self._fmt.sub_columns
        if block not in self._fitted:
            self._fit_block(block)
        if refit and self._fmt.scale_range is not None:
            self._refit(block, index, span)
        width = self._fmt.sub_columns
        values, errors = _quantize_columns(
            self._remaining[:, span].t().contiguous(),
            self._upper[span, span],
            (self._fit.d[:, block] * self._fit.scales[:, index]).expand(width, -1),
            (self._fit.dmin[:, block] * self._fit.mins[:, index]).expand(width, -1),
            self._grid,
        )
        self._values[:, span], self._errors[:, span] = values.t(), errors.t()

    def _fit_block(self, block: int) -> None:
        width = self._fmt.block_columns
        at = self._position[block * width : (block + 1) * width]
        found = fit_blocks(self._remaining[:, at], self._importance[at], self._fmt.name, self._candidates)
        sub_blocks = width // self._fmt.sub_columns
        inside = slice(block * sub_blocks, (block + 1) * sub_blocks)
        self._fit.d[:, block], self._fit.dmin[:, block] = found.d, found.dmin
        self._fit.scales[:, inside], self._fit.mins[:, inside] = found.scales, found.mins
        self._fitted.add(block)

    def _refit(self, block: int, index: int, span: slice) -> None:
        fit, one = self._fit, slice(index, index + 1)
        part = BlockFit(fit.d[:, block], fit.scales[:, one], fit.dmin[:, block], fit.mins[:, one])
        weight, importance = self._remaining[:, span].unsqueeze(1), self._importance[span]
        fit.scales[:, one], fit.mins[:, one] = fit_sub_blocks(
            part, weight, importance, self._fmt.name, self._candidates
        )


def _quantize_columns(
    remaining: torch.Tensor, upper: torch.Tensor, steps: torch.Tensor, minima: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """GPTQ's inner loop. Columns are rows here: each turn then touches contiguous memory.

    Args:
        remaining: float32 [columns, rows], overwritten.
        upper: float32 [columns, columns].
        steps, minima: float32 [columns, rows]; a value ``v`` means ``steps * v - minima``.

    Returns:
        grid values and errors over ``U_jj``, float32 [columns, rows] each.
    """
    values = torch.empty_like(remaining)
    errors = torch.empty_like(remaining)
    inverse = torch.where(steps == 0, 0.0, 1.0 / steps)
    for j in range(len(remaining)):
        values[j] = grid.round((remaining[j] + minima[j]) * inverse[j])
        errors[j] = (remaining[j] - (values[j] * steps[j] - minima[j])) / upper[j, j]
        remaining[j + 1 :].addr_(upper[j, j + 1 :], errors[j], alpha=-1.0)
    return values, errors


def _solve_static(
    weight: torch.Tensor, upper: torch.Tensor, fmt: GgmlFormat, order: torch.Tensor, candidates: int | None
) -> TensorSolution:
    importance = torch.empty_like(upper.diagonal())
    importance[order] = upper.diagonal().pow(-2)
    fit = _fit_rows(weight, importance, fmt, candidates)
    steps = fit.steps.flatten(1).t()
    minima = fit.minima.flatten(1).t()
    sub_block = order // fmt.sub_columns
    remaining = weight.t()[order]
    values, errors = torch.empty_like(remaining), torch.empty_like(remaining)
    for start in range(0, len(order), STATIC_CHUNK_COLUMNS):
        span = slice(start, start + STATIC_CHUNK_COLUMNS)
        found, scaled = _quantize_columns(
            remaining[span], upper[span, span], steps[sub_block[span]], minima[sub_block[span]], grid_of(fmt.name)
        )
        values[order[span]], errors[order[span]] = found, scaled
        remaining[span.stop :].addmm_(upper[span, span.stop :].t(), scaled, alpha=-1.0)
    block_errors = errors.double().square().unflatten(0, (-1, fmt.block_columns)).sum(1).t()
    flat = replace(fit, scales=fit.scales.flatten(1), mins=fit.mins.flatten(1))
    return TensorSolution(fmt.name, values.t().contiguous(), flat, block_errors)


def _fit_rows(weight: torch.Tensor, importance: torch.Tensor, fmt: GgmlFormat, candidates: int | None) -> BlockFit:
    """All blocks of whole rows: ``d`` [rows, blocks], ``scales`` [rows, blocks, sub-blocks of a block]."""
    blocks = (-1, fmt.block_columns)
    return fit_blocks(weight.unflatten(1, blocks), importance.unflatten(0, blocks), fmt.name, candidates)


def tensor_error(
    weight: torch.Tensor, importance: torch.Tensor, format_name: str, candidates: int | None = None
) -> torch.Tensor:
    """Estimate what a type costs a linear: its error with parameters fitted and nothing compensated.

    Args:
        weight: float32 [rows, columns], columns in storage order, whole blocks.
        importance: float32 [columns], see :func:`mgptq_export.solver.blockwise.column_importance`.
        format_name: a key of :data:`mgptq_runtime.formats.GGML_FORMATS`.
        candidates: see :func:`mgptq_export.solver.block_fit.fit_blocks`.

    Returns:
        ``sum_c importance[c] * (w[c] - q[c])^2`` of every row, float32 [rows]; to be compared with the errors of
        :func:`mgptq_export.solver.scales.search_scales`.

    Raises:
        ValueError: columns that are not whole blocks.
    """
    fmt = GGML_FORMATS[format_name]
    _check_columns(weight, fmt)
    sub_blocks = importance.unflatten(0, (-1, fmt.block_columns)).unflatten(1, (-1, fmt.sub_columns))
    errors = []
    for rows in weight.split(max(1, ERROR_CHUNK_WEIGHTS // weight.shape[1])):
        fit = _fit_rows(rows, importance, fmt, candidates)
        parts = rows.unflatten(1, (-1, fmt.block_columns)).unflatten(2, (-1, fmt.sub_columns))
        errors.append(fit.errors(parts, sub_blocks, grid_of(format_name)).sum((-2, -1)))
    return torch.cat(errors)


def best_rows(first: TensorSolution, second: TensorSolution) -> TensorSolution:
    """Of two solutions of one linear in one type, each row from the one with the smaller error.

    Rows do not know of each other, so this is a solution too. No order of columns is best everywhere.

    Raises:
        ValueError: solutions in different types.
    """
    if first.format != second.format:
        raise ValueError(f"solutions of one type are needed, got {first.format} and {second.format}")
    better = (second.block_errors.sum(1) < first.block_errors.sum(1)).unsqueeze(1)
    one, other = first.fit, second.fit
    fit = BlockFit(
        torch.where(better, other.d, one.d),
        torch.where(better, other.scales, one.scales),
        torch.where(better, other.dmin, one.dmin),
        torch.where(better, other.mins, one.mins),
    )
    return TensorSolution(
        first.format,
        torch.where(better, second.values, first.values),
        fit,
        torch.where(better, second.block_errors, first.block_errors),
    )


def pack_tensor(name: str, solution: TensorSolution, columns: int) -> QuantizedLinear:
    """Pack a solution into a linear of one segment, columns in the model's own order.

    Args:
        name: ``blk.0.attn_q`` and the like.
        columns: of the linear; the solution's.
    """
    fmt, fit = GGML_FORMATS[solution.format], solution.fit
    codes = ((solution.values - fmt.offset) / fmt.step).round().to(torch.uint8).cpu().numpy()
    parameters = BlockParameters(
        _floats(fit.d),
        None if fmt.scale_range is None else _integers(fit.scales),
        None if fmt.largest_min is None else _floats(fit.dmin),
        None if fmt.largest_min is None else _integers(fit.mins),
    )
    segment = Segment(solution.format, fmt.pack(codes, parameters))
    return QuantizedLinear(name, len(codes), columns, (segment,), None)


def _floats(numbers: torch.Tensor) -> np.ndarray:
    return numbers.cpu().numpy().astype(np.float16)


def _integers(numbers: torch.Tensor) -> np.ndarray:
    return numbers.cpu().numpy().astype(np.int16)
