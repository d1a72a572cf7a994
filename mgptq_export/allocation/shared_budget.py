"""One budget for linears, embedding and head: how much of it the latter two get."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mgptq_export.allocation.budget import cheapest_within
from mgptq_export.allocation.linear import LinearProblem, expected_loss
from mgptq_export.allocation.problem import Allocation, BlockProblem, energies_of, errors_of

__all__ = ["TableProblem", "share_budget"]

# What an estimate of a table is worth beside one of a linear, of which less is left in the end: later layers make up
# for the errors of earlier ones, and behind the head there are none.
TABLE_WEIGHT = 2.0


@dataclass(frozen=True)
class TableProblem:
    """Embedding or head, or the one matrix that is both.

    Attributes:
        name: ``token_embd`` or ``output``.
        uses: the matrix as each of its uses minds errors, columns in the model's order.
    """

    name: str
    uses: tuple[LinearProblem, ...]

    def costs(self, formats: Sequence[str]) -> torch.Tensor:
        """As :meth:`mgptq_export.allocation.problem.BlockProblem.costs`: float64 [blocks, formats]."""
        errors = torch.stack([errors_of(use, formats) for use in self.uses]).sum(0)
        return expected_loss(errors, torch.stack([energies_of(use) for use in self.uses]).sum(0))


def share_budget(problem: BlockProblem, tables: Sequence[TableProblem]) -> tuple[Allocation, torch.Tensor, int]:
    """Let the blocks of tables compete with those of all linears, by their estimates.

    Args:
        problem: the linears, with the budget of both.

    Returns:
        formats of every block of the tables, none after a smaller one; the linears' costs, as they are known now; and
        what is left to the linears, in bits.
    """
    formats, costs, sizes = problem.formats, problem.costs(), problem.sizes()
    of_tables = list(problem.world.map(lambda table: table.costs(formats), tables))
    matrices = [table.uses[0] for table in tables]
    in_tables = [[matrix.block_bits(fmt) for fmt in formats] for matrix in matrices for _ in range(matrix.blocks)]
    together = torch.cat([costs, *(TABLE_WEIGHT * costs_of_one for costs_of_one in of_tables)])
    blocks = [matrix.blocks for matrix in matrices]
    runs = torch.cat([problem.runs(), torch.tensor(blocks)])
    choice = cheapest_within(together, torch.cat([sizes, torch.tensor(in_tables)]), problem.budget, runs)[len(costs) :]
    chosen: Allocation = {}
    left = problem.budget
    for table, matrix, of_table in zip(tables, matrices, choice.split(blocks), strict=True):
        chosen[table.name] = tuple(formats[i] for i in of_table.tolist())
        left -= sum(map(matrix.block_bits, chosen[table.name]))
    return chosen, costs, left
