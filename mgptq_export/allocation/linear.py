"""A linear as the allocators see it, and what an error of it costs the model."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from mgptq_export.compute import pieces
from mgptq_runtime.formats import BLOCK_COLUMNS, FORMATS, padded_columns

__all__ = ["InputColumns", "LinearProblem", "expected_loss", "strongest_edges"]

NEIGHBOURS = 8

# Hessians are twice the mean of products, and a divergence is half of what the Fisher information makes of an error.
NATS_OF_ERROR = 0.25
LARGE_ERROR_FACTOR = 5.0
# Weights whose errors are estimated together.
NUMBERS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class InputColumns:
    """What the allocators know of the columns that an input group's linears have in common, in permuted order.

    ``U`` is the inverse Hessian's factor, see :class:`mgptq_export.solver.factor.InverseFactor`.

    Attributes:
        diagonal: float32 [columns], that of U.
        received: float32 [columns], the sum of squares of U's column above the diagonal.
        passed_on: float32 [columns], the sum of squares of U's row behind the diagonal.
        edge_index: int64 [2, edges], from neighbour to column; see :func:`strongest_edges`.
        edge_weight: float32 [edges].
    """

    diagonal: torch.Tensor
    received: torch.Tensor
    passed_on: torch.Tensor
    edge_index: torch.Tensor
    edge_weight: torch.Tensor

    @classmethod
    def of_factor(cls, upper: torch.Tensor) -> "InputColumns":
        """Of ``U``, float32 [columns, columns]."""
        diagonal = upper.diagonal().clone()
        received, passed_on = torch.zeros_like(diagonal), torch.zeros_like(diagonal)
        for piece in pieces(upper):
            squares = upper[piece].square()
            received += squares.sum(0)
            passed_on[piece] = squares.sum(1)
        own = diagonal.square()
        edge_index, edge_weight = strongest_edges(upper, NEIGHBOURS)
        return cls(
            diagonal, (received - own).clamp_min(0), (passed_on - own).clamp_min(0), edge_index.cpu(), edge_weight.cpu()
        )

    @classmethod
    def apart(cls, importance: torch.Tensor) -> "InputColumns":
        """Of columns that do not compensate for one another, by their importance, float32 [columns]."""
        nothing = torch.zeros_like(importance)
        return cls(importance.rsqrt(), nothing, nothing, torch.empty(2, 0, dtype=torch.int64), torch.empty(0))

    @property
    def importance(self) -> torch.Tensor:
        """``1 / U_jj^2``, the weight of a column's rounding error: float32 [columns]."""
        return self.diagonal.pow(-2)


@dataclass(frozen=True)
class LinearProblem:
    """One linear of the allocation problem.

    Attributes:
        name: ``blk.0.attn_q``.
        layer, layers: position in the model.
        unordered: float [rows, columns], the model's own weight.
        order: int64 [columns], the number in the model of each permuted column.
        inputs: the same object for all linears of the group.
        sensitivity: float32 [rows], how much the model's loss minds an error of each output.
    """

    name: str
    layer: int
    layers: int
    unordered: torch.Tensor
    order: torch.Tensor
    inputs: InputColumns
    sensitivity: torch.Tensor

    @property
    def weight(self) -> torch.Tensor:
        """float32 [rows, columns], columns permuted; made anew each time."""
        return self.unordered[:, self.order].float()

    @property
    def kind(self) -> str:
        """What it is in every layer, such as ``attn_q``."""
        return self.name.split(".")[-1]

    @property
    def rows(self) -> int:
        return self.unordered.shape[0]

    @property
    def columns(self) -> int:
        return self.unordered.shape[1]

    @property
    def blocks(self) -> int:
        return padded_columns(self.columns) // BLOCK_COLUMNS

    def block_bits(self, fmt: str) -> int:
        """Stored bits of one block of 64 columns, all rows."""
        return self.rows * FORMATS[fmt].block_bytes * 8

    def in_blocks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """For some rows at a time: weight [rows, blocks, 64], column importance [blocks, 64], sensitivity [rows].

        The first two are zero where padded; float32. Weights are made anew.
        """
        missing = self.blocks * BLOCK_COLUMNS - self.columns
        importance = pad(self.inputs.importance, (0, missing)).view(self.blocks, BLOCK_COLUMNS)
        at_once = max(1, NUMBERS_AT_ONCE // self.columns)
        for rows, sensitivity in zip(self.unordered.split(at_once), self.sensitivity.split(at_once), strict=True):
            weight = pad(rows[:, self.order].float(), (0, missing))
            yield weight.view(len(rows), self.blocks, BLOCK_COLUMNS), importance, sensitivity


def strongest_edges(upper: torch.Tensor, neighbours: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The columns that compensate most for one another.

    ``|U_ij| / U_ii`` is how much of column ``i``'s rounding error is passed on to the later column ``j``; here
    ``c = |U_ij| / sqrt(U_ii U_jj)``, relative to the scales of both, weighs an edge as ``c / (1 + c)``. Every column
    keeps its strongest neighbours in either direction.

    Args:
        upper: float32 [columns, columns].
        neighbours: per column.

    Returns:
        edge_index int64 [2, columns * neighbours] and edge_weight float32.
    """
    roots = upper.diagonal().sqrt()
    k = min(neighbours, max(upper.shape[0] - 1, 1))
    # Kept small results would lie between the large ones that are freed, and hold their memory.
    weights = torch.empty(len(upper), k, device=upper.device)
    sources = torch.empty(len(upper), k, dtype=torch.int64, device=upper.device)
    for piece in pieces(upper):
        # Below the diagonal U is zero: a sum of both sides is the one that is not.
        coupling = (upper[piece].abs() + upper[:, piece].t().abs()) / (roots[piece, None] * roots)
        coupling.diagonal(piece.start).zero_()
        weights[piece], sources[piece] = coupling.topk(k, dim=1)
    targets = torch.arange(upper.shape[0], device=upper.device)[:, None].expand_as(sources)
    weights = weights / (1.0 + weights)
    return torch.stack([sources.flatten(), targets.flatten()]), weights.flatten()


def expected_loss(errors: torch.Tensor, energies: torch.Tensor) -> torch.Tensor:
    """KL(original || quantized) in nats per token, by the errors of single units: float64 [units, formats].

    The Fisher information is the curvature at the original weights; the further a block is moved, the more the loss
    exceeds it. Measured on a development text, the factor for that makes one-bit blocks as rare as they should be.

    Args:
        errors: ``sum_r F_r sum_c (w - q)^2 / U_cc^2``, float64 [units, formats].
        energies: the same, were a unit dropped: float64 [units].
    """
    return NATS_OF_ERROR * errors * (1.0 + LARGE_ERROR_FACTOR * errors / energies.clamp_min(1e-300)[:, None])
