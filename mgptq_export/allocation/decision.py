"""What an allocator decided, and why."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from mgptq_export.allocation.problem import Allocation, AllocationProblem

__all__ = ["Decision", "losses_of_linears"]


@dataclass(frozen=True)
class Decision:
    """Attributes:
    formats: of every block of every linear.
    losses: by linear, what it was thought to cost the model, see :func:`losses_of_linears`; none where the allocator
        does not look at losses.
    divergences: KL(original || quantized) of every trial, in their order, in nats per token.
    """

    formats: Allocation
    losses: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    divergences: tuple[float, ...] = ()


def losses_of_linears(
    problem: AllocationProblem,
    choice: torch.Tensor,
    estimated: torch.Tensor,
    decisive: torch.Tensor,
    measured: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, dict[str, float]]:
    """By linear, what its error costs the model in nats per token; of several in one tensor, what the tensor costs.

    Args:
        choice: int64 [units].
        estimated: float64 [units, formats], before anything was learnt.
        decisive: float64 [units, formats], by which the choice was the cheapest.
        measured: in the trial of this choice, by linear: float64 [batches].

    Returns:
        ``estimated`` and ``decisive``: as chosen; ``with_fewest_bits``, ``with_most_bits``: by the decisive costs, were
        all its units of the first or the last format; ``measured``, where it was.
    """
    columns = {
        "estimated": estimated.gather(1, choice[:, None]).squeeze(1),
        "decisive": decisive.gather(1, choice[:, None]).squeeze(1),
        "with_fewest_bits": decisive[:, 0],
        "with_most_bits": decisive[:, -1],
    }
    tensor_of_unit, tensor_of_linear = problem.tensor_of_unit(), problem.tensor_of_linear()

    def by_tensor(tensors: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(int(tensor_of_linear.max()) + 1, dtype=torch.float64)
        return total.index_add_(0, tensors, values.double())

    sums = {name: by_tensor(tensor_of_unit, column) for name, column in columns.items()}
    if measured is not None:
        means = torch.stack([measured[linear.name].mean() for linear in problem.linears])
        sums["measured"] = by_tensor(tensor_of_linear, means)
    return {
        linear.name: {name: float(values[tensor]) for name, values in sums.items()}
        for linear, tensor in zip(problem.linears, tensor_of_linear.tolist(), strict=True)
    }
