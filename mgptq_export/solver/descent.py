"""Coordinate descent on a solution of GPTQ: scales and codes are chosen again, one after the other, all others known.

GPTQ settles a column's codes while the later columns are still free. Once all are settled, the layer's error is a
quadratic function of every code and every scale, and the best value of each follows in closed form (QuantEase,
arXiv 2309.01885, for codes); to take it never raises the error.
"""

from collections.abc import Sequence

import torch

from mgptq_export.solver.blockwise import BlockwiseSolution
from mgptq_export.solver.factor import InverseFactor
from mgptq_export.solver.grids import Grid, grid_of
from mgptq_export.solver.scales import representable
from mgptq_runtime.formats import BLOCK_COLUMNS

__all__ = ["descend"]


def descend(
    solution: BlockwiseSolution,
    weight: torch.Tensor,
    hessian: torch.Tensor,
    order: torch.Tensor,
    factor: InverseFactor,
    formats: Sequence[tuple[slice, Sequence[str]]],
    sweeps: int,
) -> None:
    """Lower ``sum_r (w_r - q_r) H (w_r - q_r)^T``, H damped, by changing values and scales of a solution in place.

    Args:
        solution: what :func:`mgptq_export.solver.blockwise.solve_blockwise` made of these weights and formats. Its
            ``block_errors`` stay as they were.
        weight: float32 [rows, columns], permuted.
        hessian: float32 [columns, columns], natural order.
        order: int64 [columns], the permutation.
        factor: of that Hessian in that order.
        formats: for each linear its rows and the format of every block.
        sweeps: how often to pass over all blocks.
    """
    if not sweeps:
        return
    columns = weight.shape[1]
    spans = [slice(start, min(start + BLOCK_COLUMNS, columns)) for start in range(0, columns, BLOCK_COLUMNS)]
    error = torch.empty_like(weight)

    def measure(block: int, rows: slice = slice(None)) -> None:
        span = spans[block]
        product = solution.values[rows, span] * solution.scales[rows, block, None]
        torch.sub(weight[rows, span], product, out=error[rows, span])

    for block in range(len(spans)):
        measure(block)
    for _ in range(sweeps):
        for block, span in enumerate(spans):
            coupling = hessian[order[span]][:, order]
            own = coupling[:, span].contiguous()
            own.diagonal().copy_(factor.diagonal[span])
            coupling[:, span] = own
            gradient = error @ coupling.t()
            for rows, names in formats:
                values, scales = solution.values[rows, span], solution.scales[rows, block]
                towards = _fit_scales(values, scales, gradient[rows], own)
                _fit_values(values, scales, towards, own, grid_of(names[block]))
                measure(block, rows)


def _fit_scales(values: torch.Tensor, scales: torch.Tensor, gradient: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """The best scales for the values as they are, in place.

    Args:
        values: float32 [rows, columns of the block].
        scales: float32 [rows].
        gradient: ``E H`` at the block's columns, [rows, columns of the block], E being the error of all columns.
        own: H of the block's columns.

    Returns:
        the gradient at the new scales.
    """
    through = values @ own
    along, curvature = (gradient * values).sum(-1), (through * values).sum(-1).clamp_min(1e-30)
    fitted = representable(scales + along / curvature, scales)
    step = fitted - scales
    gains = step * (2 * along - step * curvature) > 0  # float16 may round a small step to one that is too long
    scales.copy_(torch.where(gains, fitted, scales))
    return gradient - torch.where(gains, step, 0.0).unsqueeze(-1) * through


def _fit_values(
    values: torch.Tensor, scales: torch.Tensor, gradient: torch.Tensor, own: torch.Tensor, grid: Grid
) -> None:
    """The best value of one column after the other, in place; arguments as for :func:`_fit_scales`."""
    # Columns are rows here: each step of the loop then touches contiguous memory.
    current, towards = values.t().contiguous(), gradient.t().contiguous()
    per_scale = scales.reciprocal()
    for j, curvature in enumerate(own.diagonal().tolist()):
        best = grid.round(torch.addcmul(current[j], towards[j], per_scale, value=1 / curvature))
        towards[j + 1 :].addr_(own[j, j + 1 :], (best - current[j]).mul_(scales), alpha=-1.0)
        current[j] = best
    values.copy_(current.t())
