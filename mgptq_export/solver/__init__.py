"""The blockwise solver: GPTQ's error compensation over blocks of columns, each block in its own format."""

from mgptq_export.solver.blockwise import (
    BlockwiseSolution,
    column_importance,
    pack_linear,
    pad_columns,
    solve_blockwise,
)
from mgptq_export.solver.factor import InverseFactor, factorize
from mgptq_export.solver.grids import Grid, grid_of
from mgptq_export.solver.scales import search_scales

__all__ = [
    "BlockwiseSolution",
    "Grid",
    "InverseFactor",
    "column_importance",
    "factorize",
    "grid_of",
    "pack_linear",
    "pad_columns",
    "search_scales",
    "solve_blockwise",
]
