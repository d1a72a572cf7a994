"""Who gets how many bits."""

from mgptq_export.allocation.baselines import allocate_by_hessian, allocate_uniformly
from mgptq_export.allocation.decision import Decision
from mgptq_export.allocation.linear import InputColumns, LinearProblem
from mgptq_export.allocation.problem import Allocation, AllocationProblem, BlockProblem
from mgptq_export.allocation.shared_budget import TableProblem, share_budget
from mgptq_export.allocation.tensors import FileTensor, TensorProblem
from mgptq_export.allocation.training import Trial, allocate_by_gnn

__all__ = [
    "Allocation",
    "AllocationProblem",
    "BlockProblem",
    "Decision",
    "FileTensor",
    "InputColumns",
    "LinearProblem",
    "TableProblem",
    "TensorProblem",
    "Trial",
    "allocate_by_gnn",
    "allocate_by_hessian",
    "allocate_uniformly",
    "share_budget",
]
