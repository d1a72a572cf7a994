"""GPTQ's error compensation: blocks of columns each in its own format, or a tensor in one stock ggml type."""

from mgptq_export.solver.blockwise import (
    BlockwiseSolution,
    pack_linear,
    solve_blockwise,
)
from mgptq_export.solver.descent import descend
from mgptq_export.solver.factor import InverseFactor, factor_bytes, factorize
from mgptq_export.solver.grids import Grid, grid_of
from mgptq_export.solver.scales import search_scales
from mgptq_export.solver.tensor import (
    TensorSolution,
    best_rows,
    pack_tensor,
    solve_tensor,
    sub_block_order,
    tensor_error,
)

__all__ = [
    "BlockwiseSolution",
    "Grid",
    "InverseFactor",
    "TensorSolution",
    "best_rows",
    "descend",
    "factor_bytes",
    "factorize",
    "grid_of",
    "pack_linear",
    "pack_tensor",
    "search_scales",
    "solve_blockwise",
    "solve_tensor",
    "sub_block_order",
    "tensor_error",
]
