"""The parameters of ggml blocks, fitted to weights.

A weight is ``d * scale * v - dmin * minimum`` for a value ``v`` of the type's grid; scales and minima are small
integers of a sub-block, ``d`` and ``dmin`` float16 numbers of a block. Types without sub-blocks have scales of 1,
types without minima have minima of 0. All fits minimize ``sum_c importance[c] * (w[c] - q[c])^2``.
"""

from dataclasses import dataclass, replace
from itertools import product

import torch

from mgptq_export.solver.affine_fit import fit_affine
from mgptq_export.solver.grids import Grid, grid_of
from mgptq_export.solver.scales import free_scales
from mgptq_runtime.formats import GGML_FORMATS, GgmlFormat

__all__ = ["BlockFit", "fit_blocks", "fit_sub_blocks"]


@dataclass(frozen=True)
class BlockFit:
    """Attributes:
    d, dmin: float32 [...], representable in float16.
    scales, mins: float32 [..., sub-blocks], integers.
    """

    d: torch.Tensor
    scales: torch.Tensor
    dmin: torch.Tensor
    mins: torch.Tensor

    @property
    def steps(self) -> torch.Tensor:
        """Distance of neighbouring values in each sub-block: float32 [..., sub-blocks]."""
        return self.d.unsqueeze(-1) * self.scales

    @property
    def minima(self) -> torch.Tensor:
        """What is subtracted in each sub-block: float32 [..., sub-blocks]."""
        return self.dmin.unsqueeze(-1) * self.mins

    def values(self, weight: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Nearest grid values: float32 [..., sub-blocks, sub_columns], like ``weight``."""
        return _nearest(weight, self.steps, self.minima, grid)

    def errors(self, weight: torch.Tensor, importance: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Error of every sub-block when ``weight`` [..., sub-blocks, sub_columns] is rounded: float32."""
        return _rounding_error(weight, importance, self.steps, self.minima, grid)


def half(numbers: torch.Tensor) -> torch.Tensor:
    """Float32 numbers rounded to float16, kept finite. Unlike container scales they may be zero."""
    limit = torch.finfo(torch.float16).max
    return numbers.nan_to_num(0.0).clamp(-limit, limit).half().float()


def _inverse(numbers: torch.Tensor) -> torch.Tensor:
    return torch.where(numbers == 0, 0.0, 1.0 / numbers)


def _nearest(weight: torch.Tensor, steps: torch.Tensor, minima: torch.Tensor, grid: Grid) -> torch.Tensor:
    return grid.round((weight + minima.unsqueeze(-1)) * _inverse(steps).unsqueeze(-1))


def _rounding_error(
    weight: torch.Tensor, importance: torch.Tensor, steps: torch.Tensor, minima: torch.Tensor, grid: Grid
) -> torch.Tensor:
    shifted = weight + minima.unsqueeze(-1)
    values = grid.round(shifted * _inverse(steps).unsqueeze(-1))
    return (importance * shifted.addcmul_(values, steps.unsqueeze(-1), value=-1.0).square_()).sum(-1)


def fit_blocks(
    weight: torch.Tensor, importance: torch.Tensor, format_name: str, candidates: int | None = None
) -> BlockFit:
    """Fit whole blocks.

    Args:
        weight: float32 [..., block_columns].
        importance: float32, broadcastable to ``weight``.
        format_name: a key of :data:`mgptq_runtime.formats.GGML_FORMATS`.
        candidates: how many first guesses to try for a sub-block; fewer are faster and worse.
    """
    fmt, grid = GGML_FORMATS[format_name], grid_of(format_name)
    weight = weight.unflatten(-1, (-1, fmt.sub_columns))
    importance = importance.unflatten(-1, (-1, fmt.sub_columns))
    # A sub-block of dead columns alone must not divide zero by zero.
    importance = importance.clamp_min(torch.finfo(torch.float32).tiny)
    if fmt.largest_min is not None:
        fit = _fit_with_minima(weight, importance, fmt, grid, candidates)
    elif fmt.scale_range is not None:
        fit = _fit_signed(weight, importance, fmt, grid, candidates)
    else:
        scales, _, _ = free_scales(weight, importance, grid, candidates)
        ones = torch.ones_like(scales)
        d = half(scales[..., 0])
        return BlockFit(d, ones, torch.zeros_like(d), torch.zeros_like(ones))
    for _ in range(2):
        fit = _refit_block(_polish(fit, weight, importance, fmt, grid), weight, importance, grid)
    return _polish(fit, weight, importance, fmt, grid)


def fit_sub_blocks(
    fit: BlockFit, weight: torch.Tensor, importance: torch.Tensor, format_name: str, candidates: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit scales and minima of some sub-blocks anew, ``d`` and ``dmin`` being settled.

    Args:
        fit: of the blocks; scales and mins are those of the sub-blocks in ``weight``, to start from.
        weight: float32 [..., sub-blocks, sub_columns].
        importance: float32, broadcastable to ``weight``.

    Returns:
        scales and mins, float32 [..., sub-blocks].
    """
    fmt, grid = GGML_FORMATS[format_name], grid_of(format_name)
    before = fit.errors(weight, importance, grid)
    d, dmin = _inverse(fit.d).unsqueeze(-1), _inverse(fit.dmin).unsqueeze(-1)
    if fmt.largest_min is not None:
        affine = fit_affine(weight, importance, grid.levels, candidates)
        scales, mins = _bounded_scales(affine.step * d, fmt), _bounded_mins(affine.minimum * dmin, fmt)
    else:
        steps, _, _ = free_scales(weight, importance, grid, candidates)
        scales, mins = _bounded_scales(steps * d, fmt), fit.mins
    again = _polish(replace(fit, scales=scales, mins=mins), weight, importance, fmt, grid)
    better = again.errors(weight, importance, grid) < before
    return torch.where(better, again.scales, fit.scales), torch.where(better, again.mins, fit.mins)


def _bounded_scales(scales: torch.Tensor, fmt: GgmlFormat) -> torch.Tensor:
    assert fmt.scale_range is not None
    return scales.round().clamp(*fmt.scale_range)


def _bounded_mins(mins: torch.Tensor, fmt: GgmlFormat) -> torch.Tensor:
    return mins.round().clamp(0, fmt.largest_min or 0)


def _fit_with_minima(
    weight: torch.Tensor, importance: torch.Tensor, fmt: GgmlFormat, grid: Grid, candidates: int | None
) -> BlockFit:
    """Round each sub-block's affine fit, trying several ``d`` and ``dmin``.

    The error of a sub-block whose codes stay is quadratic in step and minimum, so a candidate costs no look at the
    weights; the best minimum follows the rounded step.
    """
    assert fmt.scale_range is not None and fmt.largest_min is not None
    affine = fit_affine(weight, importance, grid.levels, candidates)
    best: BlockFit | None = None
    least = torch.empty(0)
    for divisor in _divisors(fmt.scale_range[1]):
        d = half(affine.step.amax(-1) / divisor)
        scales = _bounded_scales(affine.step * _inverse(d).unsqueeze(-1), fmt)
        minimum = affine.minimum_at(d.unsqueeze(-1) * scales)
        for other in _divisors(fmt.largest_min):
            dmin = half(minimum.amax(-1) / other)
            fit = BlockFit(d, scales, dmin, _bounded_mins(minimum * _inverse(dmin).unsqueeze(-1), fmt))
            error = affine.error_at(fit.steps, fit.minima).sum(-1)
            best, least = (fit, error) if best is None else _better(best, least, fit, error)
    assert best is not None
    return best


def _fit_signed(
    weight: torch.Tensor, importance: torch.Tensor, fmt: GgmlFormat, grid: Grid, candidates: int | None
) -> BlockFit:
    """Round each sub-block's best scale, trying several ``d`` of both signs."""
    assert fmt.scale_range is not None
    free, _, _ = free_scales(weight, importance, grid, candidates)
    zeros = torch.zeros_like(free)
    curvature = (importance * _nearest(weight, free, zeros, grid).square_()).sum(-1)
    largest = free.abs().amax(-1)
    best: BlockFit | None = None
    least = torch.empty(0)
    for divisor, sign in product(_divisors(-fmt.scale_range[0]), (-1.0, 1.0)):
        d = half(sign * largest / divisor)
        fit = BlockFit(d, _bounded_scales(free * _inverse(d).unsqueeze(-1), fmt), zeros[..., 0], zeros)
        error = (curvature * (fit.steps - free).square()).sum(-1)
        best, least = (fit, error) if best is None else _better(best, least, fit, error)
    assert best is not None
    return best


def _divisors(largest: int) -> list[float]:
    """The integers at which the largest scale may lie, a little beyond the end where it is cut included."""
    return [largest * ratio for ratio in (1.06, 1.0, 0.97, 0.94, 0.9, 0.86, 0.82, 0.76, 0.7)]


def _better(best: BlockFit, least: torch.Tensor, fit: BlockFit, error: torch.Tensor) -> tuple[BlockFit, torch.Tensor]:
    """The better of two fits, block by block, and its error."""
    better = error < least
    wide = better.unsqueeze(-1)
    chosen = BlockFit(
        torch.where(better, fit.d, best.d),
        torch.where(wide, fit.scales, best.scales),
        torch.where(better, fit.dmin, best.dmin),
        torch.where(wide, fit.mins, best.mins),
    )
    return chosen, torch.where(better, error, least)


def _polish(fit: BlockFit, weight: torch.Tensor, importance: torch.Tensor, fmt: GgmlFormat, grid: Grid) -> BlockFit:
    """Try the neighbours of every sub-block's scale and minimum, by the true error."""
    scales, mins = fit.scales, fit.mins
    least = fit.errors(weight, importance, grid)
    by_min = (-1, 0, 1) if fmt.largest_min is not None else (0,)
    for more_scale, more_min in product((-1, 0, 1), by_min):
        if not more_scale and not more_min:
            continue
        trial = replace(
            fit, scales=_bounded_scales(fit.scales + more_scale, fmt), mins=_bounded_mins(fit.mins + more_min, fmt)
        )
        error = trial.errors(weight, importance, grid)
        better = error < least
        least = torch.where(better, error, least)
        scales, mins = torch.where(better, trial.scales, scales), torch.where(better, trial.mins, mins)
    return replace(fit, scales=scales, mins=mins)


def _refit_block(fit: BlockFit, weight: torch.Tensor, importance: torch.Tensor, grid: Grid) -> BlockFit:
    """``d`` and ``dmin`` by least squares, values, scales and minima being settled."""
    products = fit.values(weight, grid).mul_(fit.scales.unsqueeze(-1))
    mins = fit.mins.unsqueeze(-1)
    weighted = importance * products

    def total(numbers: torch.Tensor) -> torch.Tensor:
        return numbers.expand_as(products).sum((-2, -1))

    with_weight, square = total(weighted * weight), total(weighted * products)
    min_weight, min_square = total(importance * mins * weight), total(importance * mins * mins)
    cross = total(weighted * mins)
    determinant = square * min_square - cross * cross
    solvable = determinant > 1e-6 * square * min_square
    d = torch.where(solvable, (with_weight * min_square - min_weight * cross) / determinant, with_weight / square)
    dmin = torch.where(solvable, (with_weight * cross - min_weight * square) / determinant, fit.dmin)
    again = replace(
        fit,
        d=half(torch.where(torch.isfinite(d), d, fit.d)),
        dmin=half(torch.where(torch.isfinite(dmin), dmin, fit.dmin)),
    )
    before = fit.errors(weight, importance, grid).sum(-1)
    return _better(fit, before, again, again.errors(weight, importance, grid).sum(-1))[0]
