"""The Cholesky factor of the inverse Hessian, which drives both the column graph and the error compensation."""

import logging
from dataclasses import dataclass

import torch

from mgptq_export.compute import pieces
from mgptq_runtime.errors import NumericalError

__all__ = ["InverseFactor", "factorize"]

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 6


@dataclass(frozen=True)
class InverseFactor:
    """Attributes:
    upper: float32 [columns, columns], ``U`` with ``inv(H) = U^T U``, columns in the permuted order.
    damping: what was added to the diagonal, relative to its mean.
    attempts: 1, or more where the Hessian was not positive definite with less damping.
    dead: bool [columns], columns whose input was always zero.
    """

    upper: torch.Tensor
    damping: float
    attempts: int
    dead: torch.Tensor


def factorize(hessian: torch.Tensor, permutation: torch.Tensor, damping: float, name: str) -> InverseFactor:
    """Factorize a damped, permuted Hessian: ``inv(H) = U^T U`` with ``U`` upper triangular.

    ``U`` is what GPTQ (arXiv 2210.17323, section 3.3) calls the Cholesky form of the inverse: its row ``j``, divided
    by ``U[j, j]``, says how the rounding error of column ``j`` is compensated by the later columns.

    Args:
        hessian: float [columns, columns], ``2 X X^T`` over the calibration tokens, natural order.
        permutation: int64 [columns], the order in which columns are quantized.
        damping: added to the diagonal, relative to its mean; ten times more at each retry.
        name: of the input group, for messages.

    Raises:
        NumericalError: the Hessian holds NaN or infinity, or is not positive definite with any damping tried.
    """
    if not torch.isfinite(hessian).all():
        raise NumericalError(f"{name}: the Hessian holds NaN or infinity; the model's activations overflow")
    diagonal = hessian.diagonal()[permutation].double()
    dead = diagonal <= 0
    mean = diagonal[~dead].mean() if (~dead).any() else torch.ones_like(diagonal[0])
    diagonal[dead] = mean
    for attempt in range(1, MAX_ATTEMPTS + 1):
        damped = _permuted(hessian, permutation)
        damped.diagonal().copy_(diagonal + damping * mean)
        upper = _inverse_upper_factor(damped)
        del damped
        if upper is not None:
            if attempt > 1:
                logger.warning("%s: Hessian not positive definite, damping raised to %g", name, damping)
            return InverseFactor(upper.float(), damping, attempt, dead)
        damping = max(damping, 1e-4) * 10
    raise NumericalError(
        f"{name}: the Hessian is not positive definite even with damping {damping / 10:g}; "
        "use more calibration text (--samples) or check the model"
    )


def _permuted(matrix: torch.Tensor, permutation: torch.Tensor) -> torch.Tensor:
    """Rows and columns in another order, float64; without a copy on the way."""
    permuted = torch.empty(matrix.shape, dtype=torch.float64, device=matrix.device)
    for piece in pieces(matrix):
        permuted[piece] = matrix[permutation[piece]][:, permutation].double()
    return permuted


def _inverse_upper_factor(matrix: torch.Tensor) -> torch.Tensor | None:
    """Of float64 [columns, columns], which is overwritten."""
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix, out=(matrix, info))
    if info:
        return None
    torch.cholesky_inverse(matrix, out=matrix)
    torch.linalg.cholesky_ex(matrix, upper=True, out=(matrix, info))
    return None if info or not torch.isfinite(matrix).all() else matrix
