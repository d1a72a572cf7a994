"""The Cholesky factor of the inverse Hessian, which drives both the column graph and the error compensation."""

import logging
import math
from dataclasses import dataclass

import torch

from mgptq_export.compute import pieces
from mgptq_runtime.errors import NumericalError

__all__ = ["InverseFactor", "factor_bytes", "factorize"]

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 6
FACTOR_COLUMNS = 256
# Larger Hessians are factorized in float32: rounding is far below the damping, and they are what takes most memory.
DOUBLE_COLUMNS = 4096


@dataclass(frozen=True)
class InverseFactor:
    """Attributes:
    upper: float32 [columns, columns], ``U`` with ``inv(H) = U^T U``, columns in the permuted order.
    damping: what was added to the diagonal, relative to its mean.
    diagonal: float32 [columns], the Hessian's with what was added, permuted.
    attempts: 1, or more where the Hessian was not positive definite with less damping.
    dead: bool [columns], columns whose input was always zero.
    """

    upper: torch.Tensor
    damping: float
    diagonal: torch.Tensor
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
    if not _is_finite(hessian):
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
            return InverseFactor(upper.float(), damping, (diagonal + damping * mean).float(), attempt, dead)
        damping = max(damping, 1e-4) * 10
    raise NumericalError(
        f"{name}: the Hessian is not positive definite even with damping {damping / 10:g}; "
        "use more calibration text (--samples) or check the model"
    )


def factor_bytes(columns: int) -> int:
    """What :func:`factorize` holds at most: the factor, and in float32 what it came of in float64."""
    return columns**2 * (8 + 4 if columns <= DOUBLE_COLUMNS else 4)


def _is_finite(matrix: torch.Tensor) -> bool:
    """Whether there is neither NaN nor infinity. ``torch.isfinite`` takes more memory than the matrix."""
    return all(math.isfinite(extreme) for extreme in matrix.aminmax())


def _permuted(matrix: torch.Tensor, permutation: torch.Tensor) -> torch.Tensor:
    """Rows and columns in another order, in the type to factorize in; without a copy on the way."""
    dtype = torch.float64 if len(matrix) <= DOUBLE_COLUMNS else torch.float32
    permuted = torch.empty(matrix.shape, dtype=dtype, device=matrix.device)
    for piece in pieces(matrix):
        permuted[piece] = matrix[permutation[piece]][:, permutation]
    return permuted


def _inverse_upper_factor(matrix: torch.Tensor) -> torch.Tensor | None:
    """``U`` with ``inv(M) = U^T U``, in the place of ``M`` [columns, columns]; None if it is not positive.

    With ``R = inv(U)``, which is upper triangular, too, ``M = R R^T``: a Cholesky factorization that begins at the last
    column. So neither the inverse is ever formed, nor a second factor, and nothing needs the room of a second matrix.
    """
    starts = range(0, len(matrix), FACTOR_COLUMNS)
    for start in reversed(starts):
        own = slice(start, start + FACTOR_COLUMNS)
        reversed_factor, info = torch.linalg.cholesky_ex(matrix[own, own].flip(0, 1))
        if info:
            return None
        matrix[own, own] = corner = reversed_factor.flip(0, 1)
        above = matrix[:start, own]
        above.copy_(torch.linalg.solve_triangular(corner.T, above, upper=False, left=False))
        for before in range(0, start, FACTOR_COLUMNS):
            stop = before + FACTOR_COLUMNS
            matrix[:stop, before:stop].addmm_(above[:stop], above[before:stop].T, alpha=-1)
    matrix.triu_()
    for start in starts:
        own = slice(start, start + FACTOR_COLUMNS)
        identity = torch.eye(len(matrix[own]), dtype=matrix.dtype, device=matrix.device)
        corner = torch.linalg.solve_triangular(matrix[own, own], identity, upper=True)
        matrix[:start, own] = matrix[:start, :start] @ matrix[:start, own] @ -corner
        matrix[own, own] = corner
    return matrix if _is_finite(matrix) else None
