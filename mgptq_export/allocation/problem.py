"""The allocation problem: every 64-column block of every linear wants bits, and one budget feeds them all."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from mgptq_export.solver import InverseFactor, column_importance, grid_of, pad_columns, search_scales
from mgptq_runtime.formats import BLOCK_COLUMNS, FORMATS, padded_columns
from mgptq_runtime.progress import track

__all__ = ["Allocation", "AllocationProblem", "LinearProblem"]

Allocation = dict[str, tuple[str, ...]]
"""The format of every block, by linear."""

COST_CANDIDATES = 6
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


@dataclass(frozen=True)
class AllocationProblem:
    """Attributes:
    linears: all that compete, in forward order.
    formats: what may be chosen, fewest bits first.
    budget: bits that all blocks together may take, permutations already subtracted.
    """

    linears: Sequence[LinearProblem]
    formats: tuple[str, ...]
    budget: int

    def block_sizes(self) -> torch.Tensor:
        """Stored bits of every block in every format: int64 [units, formats], blocks of a linear adjacent."""
        return torch.tensor(
            [[linear.block_bits(fmt) for fmt in self.formats] for linear in self.linears for _ in range(linear.blocks)]
        )

    def split(self, units: torch.Tensor) -> Iterator[tuple[LinearProblem, torch.Tensor]]:
        """Cut a tensor [units, ...] into one [blocks, ...] per linear."""
        yield from zip(self.linears, units.split([linear.blocks for linear in self.linears]), strict=True)

    def allocation(self, choice: torch.Tensor) -> Allocation:
        """Name the chosen formats; along a linear they descend, so that it has one segment per format.

        Args:
            choice: int64 [units], indices into :attr:`formats`.
        """
        return {
            linear.name: tuple(self.formats[i] for i in chosen.sort(descending=True).values.tolist())
            for linear, chosen in self.split(choice)
        }

    def stored_bits(self, allocation: Allocation) -> int:
        """Bits that all blocks take."""
        return sum(linear.block_bits(fmt) for linear in self.linears for fmt in allocation[linear.name])

    def energies(self) -> torch.Tensor:
        """What every block would lose if it were dropped, on the scale of :meth:`costs`: float64 [units]."""
        table = []
        for linear in self.linears:
            weight, _, importance = linear.padded()
            weighted = (weight.square() * importance).view(linear.rows, linear.blocks, BLOCK_COLUMNS).double().sum(-1)
            table.append((weighted * linear.sensitivity.double()[:, None]).sum(0).cpu())
        return torch.cat(table)

    def costs(self) -> torch.Tensor:
        """Estimated increase of the model's loss by every block in every format: float64 [units, formats].

        ``sum_r F_r sum_c (w - q)^2 / U_cc^2`` over the rows and columns of a block, rounding to nearest: GPTQ's
        error of the layer, its rows weighted by the Fisher information of the linear's outputs; then
        :func:`beyond_quadratic`.
        """
        table = []
        with track("Estimating what each block loses", len(self.linears)) as advance:
            for linear in self.linears:
                weight, _, importance = linear.padded()
                blocks = weight.view(linear.rows, linear.blocks, BLOCK_COLUMNS)
                columns = importance.view(linear.blocks, BLOCK_COLUMNS)
                errors = [search_scales(blocks, columns, grid_of(fmt), COST_CANDIDATES)[1] for fmt in self.formats]
                weighted = torch.stack(errors, -1).double() * linear.sensitivity.double()[:, None, None]
                table.append(weighted.sum(0).cpu())
                advance()
        return beyond_quadratic(torch.cat(table), self.energies())


def beyond_quadratic(errors: torch.Tensor, energies: torch.Tensor) -> torch.Tensor:
    """Correct quadratic estimates for errors that are large beside the block itself.

    The Fisher information is the curvature at the original weights; the further a block is moved, the more the loss
    exceeds it. Measured on a development text, this factor makes one-bit blocks as rare as they should be.

    Args:
        errors: float64 [units, formats].
        energies: float64 [units], see :meth:`AllocationProblem.energies`.
    """
    return errors * (1.0 + LARGE_ERROR_FACTOR * errors / energies.clamp_min(1e-300)[:, None])
