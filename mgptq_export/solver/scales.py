"""The search for a block's scales."""

import torch

from mgptq_export.solver.grids import Grid

__all__ = ["free_scales", "search_scales"]

# By levels of the grid: the lowest and the highest candidate, relative to the scale at which the largest weight just
# fits, and how many to try between them. The fewer levels, the more of the largest weights are better cut.
_RANGES = {2: (0.2, 0.9, 12), 4: (0.4, 1.15, 12), 8: (0.6, 1.25, 12), 16: (0.7, 1.3, 12), 64: (0.9, 1.1, 9)}
_RANGES[255] = (0.98, 1.02, 3)


def search_scales(
    weight: torch.Tensor, importance: torch.Tensor, grid: Grid, candidates: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the scale of each row that loses least when its weights are rounded.

    Minimizes ``sum_c importance[c] * (w[c] - d * v[c])^2`` over ``d`` rounded to float16, ``v`` being the nearest
    grid values: candidates relative to the largest weight fix ``v``, and ``d`` follows in closed form.

    Args:
        weight: float32 [..., rows, columns], a block.
        importance: float32, broadcastable to ``weight``; zero for padding.
        grid: the format's grid.
        candidates: how many candidate scales to try, for each sign where the grid is not symmetric.

    Returns:
        scales, float32 [..., rows] with values representable in float16, never zero; and the error at them,
        float32 [..., rows].
    """
    best_scale, best_gain, energy = free_scales(weight, importance, grid, candidates)
    scales = representable(best_scale, _fitting(weight, grid))
    return scales, (energy - best_gain).clamp_min_(0.0)


def free_scales(
    weight: torch.Tensor, importance: torch.Tensor, grid: Grid, candidates: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The search of :func:`search_scales` before anything is rounded.

    Returns:
        float32 [..., rows] each: scales, the error that they save, and the error of zeros.
    """
    low, high, default = _RANGES[grid.levels]
    if grid.levels == 2 and grid.symmetric:  # signs, whatever the scale
        candidates = 1
    weighted = importance * weight
    energy = (weighted * weight).sum(-1)
    largest = _fitting(weight, grid)
    best_gain = torch.full_like(energy, -1.0)
    best_scale = largest.clone()
    for ratio in torch.linspace(low, high, candidates or default).tolist():
        nearest = grid.nearest(weight / (largest * ratio).unsqueeze(-1))
        # A negative scale is the mirrored grid.
        for sign in (1.0,) if grid.symmetric else (1.0, -1.0):
            values = grid.clip(nearest, mirrored=sign < 0)
            cross = (weighted * values).sum(-1)
            norm = (importance * values.square_()).sum(-1).clamp_min_(1e-30)
            scale = cross / norm
            gain = cross * scale
            better = gain > best_gain
            best_gain = torch.where(better, gain, best_gain)
            best_scale = torch.where(better, scale * sign, best_scale)
    return best_scale, best_gain, energy


def _fitting(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The scale at which the largest weight just fits."""
    return weight.abs().amax(-1).clamp_min(1e-7) / grid.extreme


def representable(scales: torch.Tensor, fallback: torch.Tensor) -> torch.Tensor:
    """Scales rounded to float16, kept finite and away from zero."""
    scales = torch.where(torch.isfinite(scales), scales, fallback)
    limit = torch.finfo(torch.float16)
    magnitude = scales.abs().clamp(limit.smallest_normal, limit.max)
    return torch.copysign(magnitude, scales).half().float()
