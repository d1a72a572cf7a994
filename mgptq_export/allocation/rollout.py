"""The blockwise solver on a sample of every linear's rows, all linears at once: the training signal.

Rows are solved independently of one another, so a sample of them estimates a linear's error without bias.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mgptq_export.allocation.linear import LinearProblem, beyond_quadratic
from mgptq_export.solver import grid_of, search_scales
from mgptq_runtime.formats import BLOCK_COLUMNS

__all__ = ["Rollout"]

SCALE_CANDIDATES = 4


@dataclass
class _Stack:
    """Linears of equal width: weights [linears, rows, columns], factors [factors, columns, columns]."""

    units: torch.Tensor  # int64 [linears, blocks], allocation units
    factor_of: torch.Tensor  # int64 [linears]
    uppers: torch.Tensor
    importance: torch.Tensor  # float32 [linears, columns]
    weights: list[torch.Tensor]  # all rows of each linear
    sensitivities: list[torch.Tensor]


class Rollout:
    """Runs the solver on row samples under given formats.

    Args:
        linears, formats: of the problem.
        energies: float64 [units], see :meth:`BlockProblem.energies`.
        rows: sampled from every linear at each run.
        generator: draws the rows.
    """

    def __init__(
        self,
        linears: Sequence[LinearProblem],
        formats: tuple[str, ...],
        energies: torch.Tensor,
        rows: int,
        generator: torch.Generator,
    ) -> None:
        self._formats = formats
        self._rows = rows
        self._generator = generator
        self._energies = energies
        self._units = sum(linear.blocks for linear in linears)
        self._stacks = [_stack(linears, width) for width in sorted({x.weight.shape[1] for x in linears})]

    def errors(self, choice: torch.Tensor) -> torch.Tensor:
        """What every block would lose in every format, the blocks before it being quantized as chosen.

        Args:
            choice: int64 [units], the formats under which errors are compensated.

        Returns:
            float64 [units, formats], on the scale of :meth:`BlockProblem.costs`.
        """
        result = torch.zeros(self._units, len(self._formats), dtype=torch.float64)
        for stack in self._stacks:
            result[stack.units] = self._run(stack, choice[stack.units])
        return beyond_quadratic(result, self._energies)

    def _sample(self, stack: _Stack) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [linears, rows, columns] and what their errors count for [linears, rows]."""
        weights, sensitivities = [], []
        for weight, sensitivity in zip(stack.weights, stack.sensitivities, strict=True):
            drawn = torch.randint(weight.shape[0], (self._rows,), generator=self._generator)
            weights.append(weight[drawn])
            sensitivities.append(sensitivity[drawn] * (weight.shape[0] / self._rows))
        return torch.stack(weights), torch.stack(sensitivities)

    def _run(self, stack: _Stack, choice: torch.Tensor) -> torch.Tensor:
        weight, sensitivity = self._sample(stack)
        choice = choice.to(weight.device)
        linears, _, columns = weight.shape
        blocks = columns // BLOCK_COLUMNS
        result = torch.zeros(linears, blocks, len(self._formats), dtype=torch.float64)
        grids = [grid_of(name) for name in self._formats]
        levels, steps, offsets = (
            torch.tensor([float(getattr(grid, key)) for grid in grids], device=weight.device)[choice]
            for key in ("levels", "step", "offset")
        )
        for block in range(blocks):
            span = slice(block * BLOCK_COLUMNS, (block + 1) * BLOCK_COLUMNS)
            current = weight[:, :, span]
            found = [search_scales(current, stack.importance[:, None, span], grid, SCALE_CANDIDATES) for grid in grids]
            losses = torch.stack([error for _, error in found], -1).double() * sensitivity[..., None]
            result[:, block] = losses.sum(1).cpu()
            chosen = choice[:, block, None, None].expand(-1, self._rows, 1)
            scales = torch.stack([scale for scale, _ in found], -1).gather(-1, chosen).squeeze(-1)
            grid = [value[:, block, None] for value in (levels, steps, offsets)]
            factors = stack.uppers[:, span, span][stack.factor_of]
            errors = _solve_block(current, factors, scales, *grid)
            rest = stack.uppers[:, span, span.stop :][stack.factor_of]
            weight[:, :, span.stop :].baddbmm_(errors, rest, alpha=-1.0)
        return result


def _solve_block(
    weight: torch.Tensor,
    upper: torch.Tensor,
    scales: torch.Tensor,
    levels: torch.Tensor,
    step: torch.Tensor,
    offset: torch.Tensor,
) -> torch.Tensor:
    """Scaled rounding errors of a block: float32 [linears, rows, 64]; every linear has its own grid [linears, 1]."""
    remaining = weight.permute(2, 0, 1).contiguous()
    errors = torch.empty_like(remaining)
    coupling = upper.permute(1, 2, 0).contiguous()
    for j in range(BLOCK_COLUMNS):
        codes = ((remaining[j] / scales - offset) / step).round_().clamp_min_(0.0)
        rounded = torch.minimum(codes, levels - 1.0).mul_(step).add_(offset).mul_(scales)
        errors[j] = (remaining[j] - rounded) / coupling[j, j, :, None]
        remaining[j + 1 :].addcmul_(coupling[j, j + 1 :, :, None], errors[j], value=-1.0)
    return errors.permute(1, 2, 0)


def _stack(linears: Sequence[LinearProblem], width: int) -> _Stack:
    units: list[torch.Tensor] = []
    factor_of: list[int] = []
    uppers: list[torch.Tensor] = []
    importance: list[torch.Tensor] = []
    weights: list[torch.Tensor] = []
    sensitivities: list[torch.Tensor] = []
    known: dict[int, int] = {}
    first = 0
    for linear in linears:
        if linear.weight.shape[1] == width:
            weight, upper, columns = linear.padded()
            if id(linear.factor) not in known:
                known[id(linear.factor)] = len(uppers)
                uppers.append(upper)
            units.append(torch.arange(first, first + linear.blocks))
            factor_of.append(known[id(linear.factor)])
            importance.append(columns)
            weights.append(weight)
            sensitivities.append(linear.sensitivity)
        first += linear.blocks
    stacked = [torch.stack(parts) for parts in (units, uppers, importance)]
    return _Stack(stacked[0], torch.tensor(factor_of), stacked[1], stacked[2], weights, sensitivities)
