"""Blockwise quantization with error compensation, every block in its own format."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mgptq_export.solver.grids import Grid, grid_of
from mgptq_export.solver.scales import search_scales
from mgptq_runtime.formats import BLOCK_COLUMNS, FORMATS
from mgptq_runtime.quantized_model import QuantizedLinear, Segment

__all__ = ["BlockwiseSolution", "column_importance", "pack_linear", "pad_columns", "solve_blockwise"]


@dataclass(frozen=True)
class BlockwiseSolution:
    """Attributes:
    values: float32 [rows, blocks * 64], integers on each block's grid.
    scales: float32 [rows, blocks], representable in float16.
    block_errors: float64 [rows, blocks], ``sum ((w - q) / U_jj)^2`` over a block's columns: the error of the
        layer's output that GPTQ minimizes, up to a factor.
    """

    values: torch.Tensor
    scales: torch.Tensor
    block_errors: torch.Tensor


def pad_columns(weight: torch.Tensor, upper: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad to whole blocks: zero weights that no other column is coupled to. Whole ones come back as they are.

    Args:
        weight: float32 [rows, columns].
        upper: float32 [columns, columns].
    """
    columns = weight.shape[1]
    missing = -columns % BLOCK_COLUMNS
    if not missing:
        return weight, upper
    padded = torch.eye(columns + missing, dtype=upper.dtype, device=upper.device)
    padded[:columns, :columns] = upper
    return torch.nn.functional.pad(weight, (0, missing)), padded


def column_importance(upper: torch.Tensor, columns: int) -> torch.Tensor:
    """``1 / U_jj^2``, the weight of a column's rounding error; zero for padding. float32 [blocks * 64]."""
    importance = upper.diagonal().pow(-2)
    importance[columns:] = 0
    return importance


def solve_blockwise(
    weight: torch.Tensor, upper: torch.Tensor, formats: Sequence[tuple[slice, Sequence[str]]]
) -> BlockwiseSolution:
    """Quantize the stacked linears of an input group, columns in the order of ``upper``.

    GPTQ (arXiv 2210.17323, algorithm 1), with scales searched when a block is reached, so that they fit
    the weights as compensated so far.

    Args:
        weight: float32 [rows, columns], permuted; rows of all linears of the group.
        upper: float32 [columns, columns], see :class:`mgptq_export.solver.factor.InverseFactor`.
        formats: for each linear its rows and the format of every block.
    """
    columns = weight.shape[1]
    weight, upper = pad_columns(weight.clone(), upper)
    importance = column_importance(upper, columns)
    blocks = weight.shape[1] // BLOCK_COLUMNS
    scales = torch.zeros(weight.shape[0], blocks, device=weight.device)
    errors = torch.zeros(weight.shape[0], blocks, dtype=torch.float64, device=weight.device)
    for block in range(blocks):
        span = slice(block * BLOCK_COLUMNS, (block + 1) * BLOCK_COLUMNS)
        values, scaled_errors = torch.empty(2, len(weight), BLOCK_COLUMNS, device=weight.device)
        for rows, names in formats:
            grid = grid_of(names[block])
            scales[rows, block], _ = search_scales(weight[rows, span], importance[span], grid)
            values[rows], scaled_errors[rows] = _solve_block(
                weight[rows, span], upper[span, span], scales[rows, block], grid
            )
        weight[:, span] = values  # no later block needs what it was
        weight[:, span.stop :].addmm_(scaled_errors, upper[span, span.stop :], alpha=-1)
        errors[:, block] = (scaled_errors * (importance[span] > 0)).square_().sum(-1, dtype=torch.float64)
    return BlockwiseSolution(weight, scales, errors)


def _solve_block(
    weight: torch.Tensor, upper: torch.Tensor, scales: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    # Columns are rows here: each step of the loop then touches contiguous memory.
    remaining = weight.t().contiguous()
    values = torch.empty_like(remaining)
    errors = torch.empty_like(remaining)
    for j in range(BLOCK_COLUMNS):
        values[j] = grid.round(remaining[j] / scales)
        errors[j] = (remaining[j] - values[j] * scales) / upper[j, j]
        remaining[j + 1 :].addr_(upper[j, j + 1 :], errors[j], alpha=-1.0)
    return values.t(), errors.t()


def pack_linear(
    name: str,
    values: torch.Tensor,
    scales: torch.Tensor,
    formats: Sequence[str],
    columns: int,
    permutation: np.ndarray | None,
) -> QuantizedLinear:
    """Pack a linear's solution into segments, one per run of blocks in one format.

    Args:
        values: float32 [rows, blocks * 64], see :class:`BlockwiseSolution`.
        scales: float32 [rows, blocks].
        formats: the format of every block.
        columns: without padding.
        permutation: int32 [columns], or None.
    """
    segments = []
    start = 0
    for end in range(1, len(formats) + 1):
        if end == len(formats) or formats[end] != formats[start]:
            codes = grid_of(formats[start]).codes(values[:, start * BLOCK_COLUMNS : end * BLOCK_COLUMNS])
            packed = FORMATS[formats[start]].pack(
                codes.cpu().numpy(), scales[:, start:end].cpu().numpy().astype(np.float16)
            )
            segments.append(Segment(formats[start], packed))
            start = end
    return QuantizedLinear(name, values.shape[0], columns, tuple(segments), permutation)
