"""The best step and minimum of small groups of weights, before either is rounded."""

from dataclasses import dataclass
from itertools import product

import torch

__all__ = ["AffineFit", "fit_affine"]


@dataclass(frozen=True)
class AffineFit:
    """Weights ``step * c - minimum`` with codes ``c`` from 0 and neither number negative.

    Attributes:
        step, minimum: float32 [...].
        energy, weight, code_weight, one, code, code_square: sums of the importance times ``w^2``, ``w``, ``c w``, 1,
            ``c`` and ``c^2`` over the group: float32 [...]. They make up the error while the codes stay.
    """

    step: torch.Tensor
    minimum: torch.Tensor
    energy: torch.Tensor
    weight: torch.Tensor
    code_weight: torch.Tensor
    one: torch.Tensor
    code: torch.Tensor
    code_square: torch.Tensor

    def minimum_at(self, step: torch.Tensor) -> torch.Tensor:
        """The best minimum for another step, the codes being settled."""
        return ((step * self.code - self.weight) / self.one).clamp_min_(0.0)

    def error_at(self, step: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
        """The error at another step and minimum, the codes being settled."""
        linear = step * self.code_weight - minimum * self.weight
        square = step.square() * self.code_square - 2 * step * minimum * self.code + minimum.square() * self.one
        return self.energy - 2 * linear + square


# How much of the weights' range may be cut off below and above, by levels of the grid.
_CUTS = {4: (-0.12, -0.04, 0.04, 0.12, 0.2), 16: (-0.02, 0.02, 0.06, 0.1)}


def fit_affine(weight: torch.Tensor, importance: torch.Tensor, levels: int, candidates: int | None = None) -> AffineFit:
    """Find step and minimum of each group: first guesses from the range, then codes and least squares in turn.

    Args:
        weight: float32 [..., columns].
        importance: float32, broadcastable to ``weight``, positive.
        levels: number of codes.
        candidates: how much of the range to cut, so many choices at either end.
    """
    low, high = weight.amin(-1).clamp_max(0.0), weight.amax(-1)
    weighted = importance * weight
    sums = (weighted * weight).sum(-1), weighted.sum(-1), importance.expand_as(weight).sum(-1)
    best: AffineFit | None = None
    for below, above in product(_cuts(levels, candidates), repeat=2):
        start = (low + below * (high - low)).clamp_max(0.0)
        step = (high - above * (high - low) - start) / (levels - 1)
        fit = _least_squares(weight, importance, step, -start, levels, sums)
        best = fit if best is None else _better(best, fit)
    assert best is not None
    for _ in range(2):
        best = _better(best, _least_squares(weight, importance, best.step, best.minimum, levels, sums))
    return best


def _cuts(levels: int, candidates: int | None) -> list[float]:
    """The cuts nearest the middle first, as many as are wanted."""
    cuts = _CUTS[levels]
    return sorted(cuts, key=lambda cut: abs(cut - sum(cuts) / len(cuts)))[:candidates]


def _least_squares(
    weight: torch.Tensor,
    importance: torch.Tensor,
    step: torch.Tensor,
    minimum: torch.Tensor,
    levels: int,
    sums: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> AffineFit:
    """The best step and minimum for the codes that are nearest at the given ones."""
    inverse = torch.where(step > 0, 1.0 / step, 0.0)
    codes = ((weight + minimum.unsqueeze(-1)) * inverse.unsqueeze(-1)).round_().clamp_(0, levels - 1)
    energy, total, one = sums
    counted = importance * codes
    code, code_weight, code_square = counted.sum(-1), (counted * weight).sum(-1), (counted * codes).sum(-1)
    determinant = one * code_square - code * code
    best_step = ((one * code_weight - code * total) / determinant).clamp_min_(0.0)
    best_minimum = (best_step * code - total) / one
    # Where the best offset is positive, which a minimum cannot be, and where all codes are the same.
    through_zero = (best_minimum < 0) | (determinant <= 1e-6 * one * code_square)
    scaled = (code_weight / code_square).nan_to_num(0.0, 0.0, 0.0).clamp_min_(0.0)
    best_step = torch.where(through_zero, scaled, best_step)
    best_minimum = torch.where(through_zero, 0.0, best_minimum)
    return AffineFit(best_step, best_minimum, energy, total, code_weight, one, code, code_square)


def _better(best: AffineFit, fit: AffineFit) -> AffineFit:
    better = fit.error_at(fit.step, fit.minimum) < best.error_at(best.step, best.minimum)
    return AffineFit(
        *(torch.where(better, getattr(fit, name), getattr(best, name)) for name in AffineFit.__dataclass_fields__)
    )
