"""Training the allocator network: quantization error under a budget, through an approximate gradient."""

import logging
from dataclasses import dataclass

import torch

from mgptq_export.allocation.budget import cheapest_within, price_for
from mgptq_export.allocation.column_graph import build_graphs
from mgptq_export.allocation.network import AllocatorNetwork
from mgptq_export.allocation.problem import Allocation, BlockProblem
from mgptq_runtime.errors import NumericalError
from mgptq_runtime.progress import track

__all__ = ["allocate_by_gnn"]

logger = logging.getLogger(__name__)

ROWS_PER_LINEAR = 16
LEARNING_RATE = 3e-3
TEMPERATURE_BITS = 0.3


@dataclass(frozen=True)
class _Assignment:
    hard: torch.Tensor  # int64 [units]
    soft: torch.Tensor  # float64 [units, formats], one-hot forward, probabilities backward


def allocate_by_gnn(problem: BlockProblem, steps: int, seed: int) -> Allocation:
    """Train the network on this model, and allocate as it says.

    At every step the network's costs are priced so that the cheapest assignment meets the budget; an assignment is
    drawn (Gumbel noise), the solver runs with it on sampled rows, and reports what each block loses in each format
    in that context. The assignment has no gradient; the probabilities that it was drawn from stand in for it
    (straight-through).

    Args:
        steps: of Adam.
        seed: of the network, the rows and the noise.

    Raises:
        NumericalError: a score became NaN or infinite.
    """
    generator = torch.Generator().manual_seed(seed)
    costs, sizes = problem.costs(), problem.sizes()
    if int(sizes.max(1).values.sum()) <= problem.budget:  # enough for all: nothing competes, and bits have no price
        return problem.allocation(cheapest_within(costs, sizes, problem.budget))
    reference = price_for(costs, sizes, problem.budget)
    weights = problem.weights()[:, None].double()
    log_costs = _normalized(costs, sizes, reference)
    graph = build_graphs(problem)
    rollout = problem.rollout(ROWS_PER_LINEAR, generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = AllocatorNetwork(sizes.shape[1])
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    with track("Training the allocator", steps) as advance:
        for _ in range(steps):
            corrected = costs * network(graph, log_costs).double().exp()
            assignment = _draw(corrected, sizes, weights, problem.budget, generator)
            errors = rollout.errors(assignment.hard)
            loss = _lagrangian(assignment.soft, errors, sizes, reference, problem.budget)
            if not torch.isfinite(loss):
                raise NumericalError(
                    "the allocator's loss is NaN or infinite; are weights huge or all zero? try another --allocator"
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            logger.debug("allocator loss %.6g", loss.item())
            advance()
    with torch.no_grad():
        corrected = costs * network(graph, log_costs).double().exp()
    return problem.allocation(cheapest_within(corrected, sizes, problem.budget))


def _normalized(costs: torch.Tensor, sizes: torch.Tensor, price: float) -> torch.Tensor:
    """Logarithms of costs in units of what a block's bits are worth: float32 [units, formats]."""
    return (costs / (price * sizes)).clamp_min(1e-8).log().float() / 4.0


def _draw(
    costs: torch.Tensor, sizes: torch.Tensor, weights: torch.Tensor, budget: int, generator: torch.Generator
) -> _Assignment:
    """Draw an assignment from the network's costs, priced to meet the budget."""
    detached = costs.detach()
    price = price_for(detached, sizes, budget)
    # In bits per weight: what a format's loss is worth, and what the format takes of the budget.
    logits = -(costs / (price * weights) + sizes / weights) / TEMPERATURE_BITS
    noise = -torch.empty_like(logits).exponential_(generator=generator).log()
    probabilities = torch.softmax(logits, -1)
    hard = (logits.detach() + noise).argmax(-1)
    one_hot = torch.nn.functional.one_hot(hard, costs.shape[1]).double()
    return _Assignment(hard, one_hot + probabilities - probabilities.detach())


def _lagrangian(
    soft: torch.Tensor, errors: torch.Tensor, sizes: torch.Tensor, price: float, budget: int
) -> torch.Tensor:
    """Quantization error plus priced bits beyond the budget, relative to what the budget is worth."""
    bits = (soft * sizes).sum()
    return ((soft * errors).sum() + price * (bits - budget)) / (price * budget)
