"""The allocation problem: one budget, and units that want bits of it.

A unit is what gets a format of its own: a 64-column block of a linear, or a whole tensor (see
:mod:`mgptq_export.allocation.tensors`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from mgptq_export.allocation.linear import LinearProblem, expected_loss
from mgptq_export.distributed import ALONE, World
from mgptq_export.solver import grid_of, search_scales
from mgptq_runtime.formats import BLOCK_COLUMNS
from mgptq_runtime.progress import track

__all__ = ["Allocation", "AllocationProblem", "BlockProblem", "energies_of", "errors_of"]

Allocation = dict[str, tuple[str, ...]]
"""The format of every block, by linear; a single one where the whole linear has it."""

COST_CANDIDATES = 6


class AllocationProblem(Protocol):
    """What the allocators need of a problem."""

    @property
    def linears(self) -> Sequence[LinearProblem]:
        """All that compete, in forward order."""
        ...

    @property
    def budget(self) -> int:
        """Bits that all units together may take."""
        ...

    @property
    def world(self) -> World:
        """The processes that work on it together."""
        ...

    def weights(self) -> torch.Tensor:
        """Weights of every unit, padding included: int64 [units]."""
        ...

    def sizes(self) -> torch.Tensor:
        """Stored bits of every unit in every format: int64 [units, formats]."""
        ...

    def costs(self) -> torch.Tensor:
        """Estimated KL(original || quantized) by every unit, nats per token: float64 [units, formats]."""
        ...

    def positions(self) -> torch.Tensor:
        """Where a unit lies, 0 to 1, for upgrades that nothing else puts in order: float32 [units]."""
        ...

    def unit_of_columns(self, linear: int) -> torch.Tensor:
        """The unit that each column of a linear belongs to: int64 [columns]."""
        ...

    def tensor_of_unit(self) -> torch.Tensor:
        """The tensor that each unit is a part of, or is: int64 [units]."""
        ...

    def runs(self) -> torch.Tensor:
        """Units next to each other along which formats must not rise, how many in each run: int64 [runs]."""
        ...

    def tensor_of_linear(self) -> torch.Tensor:
        """The tensor that holds each linear: int64 [linears]."""
        ...

    def allocation(self, choice: torch.Tensor) -> Allocation:
        """Name the chosen formats, int64 [units]."""
        ...

    def stored_bits(self, allocation: Allocation) -> int:
        """Bits that all units take."""
        ...


@dataclass(frozen=True)
class BlockProblem:
    """Every 64-column block of every linear is a unit.

    Attributes:
        linears: all that compete, in forward order, columns permuted.
        formats: what may be chosen, fewest bits first.
        budget: bits that all blocks together may take, permutations already subtracted.
        world: who estimates costs.
        estimated: :meth:`costs`, where they are known already.
    """

    linears: Sequence[LinearProblem]
    formats: tuple[str, ...]
    budget: int
    world: World = ALONE
    estimated: torch.Tensor | None = None

    def weights(self) -> torch.Tensor:
        """Weights of every block, padding included: int64 [units]."""
        return torch.cat([torch.full((linear.blocks,), linear.rows * BLOCK_COLUMNS) for linear in self.linears])

    def sizes(self) -> torch.Tensor:
        """Stored bits of every block in every format: int64 [units, formats], blocks of a linear adjacent."""
        return torch.tensor(
            [[linear.block_bits(fmt) for fmt in self.formats] for linear in self.linears for _ in range(linear.blocks)]
        )

    def positions(self) -> torch.Tensor:
        """Where along its linear a block lies, 0 to 1: float32 [units]."""
        return torch.cat([(torch.arange(linear.blocks) + 0.5) / linear.blocks for linear in self.linears])

    def unit_of_columns(self, linear: int) -> torch.Tensor:
        """The block that each column of a linear belongs to: int64 [columns]."""
        first = sum(before.blocks for before in self.linears[:linear])
        return torch.arange(self.linears[linear].columns) // BLOCK_COLUMNS + first

    def tensor_of_unit(self) -> torch.Tensor:
        """The linear that each block is a part of: int64 [units]."""
        return torch.repeat_interleave(self.runs())

    def runs(self) -> torch.Tensor:
        """A linear's blocks, so that it has one segment per format: int64 [linears]."""
        return torch.tensor([linear.blocks for linear in self.linears])

    def tensor_of_linear(self) -> torch.Tensor:
        """Every linear is a tensor of its own: int64 [linears]."""
        return torch.arange(len(self.linears))

    def split(self, units: torch.Tensor) -> Iterator[tuple[LinearProblem, torch.Tensor]]:
        """Cut a tensor [units, ...] into one [blocks, ...] per linear."""
        yield from zip(self.linears, units.split(self.runs().tolist()), strict=True)

    def allocation(self, choice: torch.Tensor) -> Allocation:
        """Name the chosen formats, int64 [units]."""
        return {linear.name: tuple(self.formats[i] for i in chosen.tolist()) for linear, chosen in self.split(choice)}

    def stored_bits(self, allocation: Allocation) -> int:
        """Bits that all blocks take."""
        return sum(linear.block_bits(fmt) for linear in self.linears for fmt in allocation[linear.name])

    def energies(self) -> torch.Tensor:
        """Errors of blocks that are dropped, see :func:`expected_loss`: float64 [units]."""
        return torch.cat(list(map(energies_of, self.linears)))

    def costs(self) -> torch.Tensor:
        """Estimated KL(original || quantized) by every block, nats per token: float64 [units, formats].

        ``sum_r F_r sum_c (w - q)^2 / U_cc^2`` over the rows and columns of a block, rounding to nearest: GPTQ's
        error of the layer, its rows weighted by the Fisher information of the linear's outputs; then
        :func:`expected_loss`.
        """
        if self.estimated is not None:
            return self.estimated
        table = []
        with track("Estimating what each block loses", len(self.linears)) as advance:
            for costs in self.world.map(partial(errors_of, formats=self.formats), self.linears):
                table.append(costs)
                advance()
        return expected_loss(torch.cat(table), self.energies())


def energies_of(linear: LinearProblem) -> torch.Tensor:
    """:meth:`BlockProblem.energies` of one linear's blocks: float64 [blocks]."""
    total = torch.zeros(linear.blocks, dtype=torch.float64, device=linear.unordered.device)
    for weight, importance, sensitivity in linear.in_blocks():
        weighted = weight.square_().mul_(importance).double().sum(-1)
        total += (weighted * sensitivity.double()[:, None]).sum(0)
    return total.cpu()


def errors_of(linear: LinearProblem, formats: Sequence[str]) -> torch.Tensor:
    """Errors of one linear's blocks, see :func:`expected_loss`: float64 [blocks, formats]."""
    device = linear.unordered.device
    total = torch.zeros(linear.blocks, len(formats), dtype=torch.float64, device=device)
    for weight, importance, sensitivity in linear.in_blocks():
        errors = [search_scales(weight, importance, grid_of(x), COST_CANDIDATES)[1] for x in formats]
        total += (torch.stack(errors, -1).double() * sensitivity.double()[:, None, None]).sum(0)
    return total.cpu()
