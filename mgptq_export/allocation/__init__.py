"""Who gets how many bits."""

from mgptq_export.allocation.baselines import allocate_by_hessian, allocate_uniformly
from mgptq_export.allocation.problem import Allocation, AllocationProblem, LinearProblem
from mgptq_export.allocation.training import allocate_by_gnn

__all__ = [
    "Allocation",
    "AllocationProblem",
    "LinearProblem",
    "allocate_by_gnn",
    "allocate_by_hessian",
    "allocate_uniformly",
]
