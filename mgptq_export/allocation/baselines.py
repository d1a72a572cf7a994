"""The allocators that the graph network is measured against."""

import torch

from mgptq_export.allocation.budget import cheapest_within
from mgptq_export.allocation.problem import Allocation, AllocationProblem

__all__ = ["allocate_by_hessian", "allocate_uniformly"]


def allocate_by_hessian(problem: AllocationProblem) -> Allocation:
    """Greedy: bits go where the estimated loss falls most per bit, all layers competing."""
    return problem.allocation(cheapest_within(problem.costs(), problem.block_sizes(), problem.budget))


def allocate_uniformly(problem: AllocationProblem) -> Allocation:
    """The same bits for every linear; within a linear the first blocks get what does not come out even."""
    sizes = problem.block_sizes()
    position = torch.cat([(torch.arange(linear.blocks) + 0.5) / linear.blocks for linear in problem.linears])
    # A convex cost per weight that all linears share, tilted towards the first blocks to order the upgrades.
    weights = torch.cat([torch.full((linear.blocks,), float(linear.rows)) for linear in problem.linears])
    step = torch.arange(len(problem.formats), 0, -1, dtype=torch.float64)
    costs = weights[:, None].double() * (2.0**step) * (1.0 + 0.1 * (1.0 - position[:, None].double()))
    return problem.allocation(cheapest_within(costs, sizes, problem.budget))
