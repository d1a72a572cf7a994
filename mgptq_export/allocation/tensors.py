"""Allocation among whole tensors: in stock ggml types every tensor of a file has one."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from mgptq_export.allocation.linear import LinearProblem, expected_loss
from mgptq_export.allocation.problem import Allocation
from mgptq_export.distributed import ALONE, World
from mgptq_export.solver import tensor_error
from mgptq_runtime.formats import GGML_FORMATS
from mgptq_runtime.progress import track

__all__ = ["FileTensor", "TensorProblem"]

COST_CANDIDATES = 6


@dataclass(frozen=True)
class FileTensor:
    """One tensor of the file.

    Attributes:
        linears: positions, in the problem, of the linears that it holds; they share its type.
        formats: types that its row length allows, fewest bits first.
    """

    linears: tuple[int, ...]
    formats: tuple[str, ...]


@dataclass(frozen=True)
class TensorProblem:
    """Every tensor is a unit; see :class:`mgptq_export.allocation.problem.AllocationProblem`.

    Where a tensor has fewer types than another its last one is repeated, so that tables are rectangular.

    Attributes:
        linears: all that compete, in forward order, columns in the model's own order.
        tensors: cover all linears, in their order.
        budget: bits that all tensors together may take.
        world: who estimates costs.
    """

    linears: Sequence[LinearProblem]
    tensors: Sequence[FileTensor]
    budget: int
    world: World = ALONE

    @cached_property
    def options(self) -> tuple[tuple[str, ...], ...]:
        """The types of every tensor, all tuples of one length."""
        longest = max(len(tensor.formats) for tensor in self.tensors)
        return tuple(t.formats + t.formats[-1:] * (longest - len(t.formats)) for t in self.tensors)

    def _members(self, tensor: FileTensor) -> list[LinearProblem]:
        return [self.linears[i] for i in tensor.linears]

    def weights(self) -> torch.Tensor:
        """Weights of every tensor: int64 [units]."""
        return torch.tensor([sum(linear.rows * linear.columns for linear in self._members(t)) for t in self.tensors])

    def sizes(self) -> torch.Tensor:
        """Stored bits of every tensor in every type: int64 [units, types]."""
        return torch.tensor(
            [
                [sum(_tensor_bits(linear, name) for linear in self._members(tensor)) for name in options]
                for tensor, options in zip(self.tensors, self.options, strict=True)
            ]
        )

    def positions(self) -> torch.Tensor:
        """Where in the model a tensor lies, 0 to 1: float32 [units]."""
        return (torch.arange(len(self.tensors)) + 0.5) / len(self.tensors)

    def unit_of_columns(self, linear: int) -> torch.Tensor:
        """All columns of a linear belong to its tensor: int64 [columns]."""
        return self.tensor_of_linear()[linear].expand(self.linears[linear].columns)

    def tensor_of_unit(self) -> torch.Tensor:
        """Units are tensors: int64 [units]."""
        return torch.arange(len(self.tensors))

    def runs(self) -> torch.Tensor:
        """Every tensor by itself: int64 [units]."""
        return torch.ones(len(self.tensors), dtype=torch.int64)

    def tensor_of_linear(self) -> torch.Tensor:
        """The tensor that holds each linear: int64 [linears]."""
        return torch.repeat_interleave(torch.tensor([len(tensor.linears) for tensor in self.tensors]))

    def allocation(self, choice: torch.Tensor) -> Allocation:
        """Name the chosen types, int64 [units]."""
        chosen = [options[i] for options, i in zip(self.options, choice.tolist(), strict=True)]
        return {
            linear.name: (name,)
            for tensor, name in zip(self.tensors, chosen, strict=True)
            for linear in self._members(tensor)
        }

    def stored_bits(self, allocation: Allocation) -> int:
        """Bits that all tensors take."""
        return sum(_tensor_bits(linear, allocation[linear.name][0]) for linear in self.linears)

    def energies(self) -> torch.Tensor:
        """Errors of tensors that are dropped, see :func:`expected_loss`: float64 [units]."""
        return torch.tensor([sum(_energy(linear) for linear in self._members(t)) for t in self.tensors]).double()

    def costs(self) -> torch.Tensor:
        """Estimated KL(original || quantized) by every tensor, nats per token: float64 [units, types].

        As :meth:`mgptq_export.allocation.problem.BlockProblem.costs`, summed over the tensor.
        """
        table = []
        with track("Estimating what each tensor loses", len(self.tensors)) as advance:
            for known, options in zip(self.world.map(self._costs_of, self.tensors), self.options, strict=True):
                table.append([known[name] for name in options])
                advance()
        return expected_loss(torch.tensor(table, dtype=torch.float64), self.energies())

    def _costs_of(self, tensor: FileTensor) -> dict[str, float]:
        """Errors by type, see :func:`expected_loss`."""
        return {name: sum(_rounding_loss(x, name) for x in self._members(tensor)) for name in tensor.formats}


def _tensor_bits(linear: LinearProblem, name: str) -> int:
    fmt = GGML_FORMATS[name]
    return linear.rows * linear.columns // fmt.block_columns * fmt.block_bytes * 8


def _energy(linear: LinearProblem) -> float:
    return float(
        ((linear.weight.square() * linear.inputs.importance).sum(1).double() * linear.sensitivity.double()).sum()
    )


def _rounding_loss(linear: LinearProblem, name: str) -> float:
    errors = tensor_error(linear.weight, linear.inputs.importance, name, COST_CANDIDATES)
    return float((errors.double() * linear.sensitivity.double()).sum())
