"""A linear as the allocators see it, and what an error of it costs the model."""

from dataclasses import dataclass

import torch

from mgptq_export.solver import InverseFactor, column_importance, pad_columns
from mgptq_runtime.formats import BLOCK_COLUMNS, FORMATS, padded_columns

__all__ = ["LinearProblem", "beyond_quadratic"]

LARGE_ERROR_FACTOR = 5.0


@dataclass(frozen=True)
class LinearProblem:
    """One linear of the allocation problem.

    Attributes:
        name: ``blk.0.attn_q``.
        layer, layers: position in the model.
        weight: float32 [rows, columns], columns permuted.
        factor: of the group's permuted Hessian; the same object for all linears of the group.
        sensitivity: float32 [rows], how much the model's loss minds an error of each output.
    """

    name: str
    layer: int
    layers: int
    weight: torch.Tensor
    factor: InverseFactor
    sensitivity: torch.Tensor

    @property
    def kind(self) -> str:
        """What it is in every layer, such as ``attn_q``."""
        return self.name.split(".")[-1]

    @property
    def rows(self) -> int:
        return self.weight.shape[0]

    @property
    def blocks(self) -> int:
        return padded_columns(self.weight.shape[1]) // BLOCK_COLUMNS

    def block_bits(self, fmt: str) -> int:
        """Stored bits of one block of 64 columns, all rows."""
        return self.rows * FORMATS[fmt].block_bytes * 8

    def padded(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Weight [rows, padded], factor [padded, padded] and column importance [padded]: float32, not to be changed."""
        weight, upper = pad_columns(self.weight, self.factor.upper)
        return weight, upper, column_importance(upper, self.weight.shape[1])


def beyond_quadratic(errors: torch.Tensor, energies: torch.Tensor) -> torch.Tensor:
    """Correct quadratic estimates for errors that are large beside the block itself.

    The Fisher information is the curvature at the original weights; the further a block is moved, the more the loss
    exceeds it. Measured on a development text, this factor makes one-bit blocks as rare as they should be.

    Args:
        errors: float64 [units, formats].
        energies: float64 [units], see :meth:`AllocationProblem.energies`.
    """
    return errors * (1.0 + LARGE_ERROR_FACTOR * errors / energies.clamp_min(1e-300)[:, None])
