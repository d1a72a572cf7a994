"""The allocators that the graph network is measured against."""

from mgptq_export.allocation.budget import cheapest_within
from mgptq_export.allocation.decision import Decision, losses_of_linears
from mgptq_export.allocation.problem import AllocationProblem

__all__ = ["allocate_by_hessian", "allocate_uniformly"]


def allocate_by_hessian(problem: AllocationProblem) -> Decision:
    """Greedy: bits go where the estimated loss falls most per bit, all layers competing."""
    costs = problem.costs()
    choice = cheapest_within(costs, problem.sizes(), problem.budget, problem.runs())
    return Decision(problem.allocation(choice), losses_of_linears(problem, choice, costs, costs))


def allocate_uniformly(problem: AllocationProblem) -> Decision:
    """The same bits for every linear; what does not come out even goes to the first units."""
    sizes, weights = problem.sizes(), problem.weights()[:, None].double()
    # A convex cost per weight that all linears share, tilted towards the first units to order the upgrades.
    tilt = 1.0 + 0.1 * (1.0 - problem.positions()[:, None].double())
    costs = weights * 4.0 ** -(sizes / weights) * tilt
    return Decision(problem.allocation(cheapest_within(costs, sizes, problem.budget, problem.runs())))
