"""Coordinate descent after GPTQ, against the layer's error in float64, which is trusted."""

import itertools

import pytest
import torch
from test_solver import ALL_FORMATS, ROWS, activations, dequantized, hessian_of, natural, random_weight

from mgptq_export.solver import BlockwiseSolution, InverseFactor, descend, factorize, grid_of, solve_blockwise
from mgptq_runtime.formats import BLOCK_COLUMNS

DAMPING = 0.01


class Layer:
    """A weight, the Hessian of its inputs, and what GPTQ makes of them in a random order of the columns."""

    def __init__(self, columns: int, formats: list[str]) -> None:
        self.hessian = hessian_of(activations(columns)).float()
        self.order = torch.randperm(columns, generator=torch.Generator().manual_seed(2))
        self.weight = random_weight(columns)[:, self.order]
        self.formats = [(slice(0, ROWS // 2), formats), (slice(ROWS // 2, ROWS), formats[::-1])]
        self.factor: InverseFactor = factorize(self.hessian, self.order, DAMPING, "group")
        self.damped = (self.hessian.double() + DAMPING * self.hessian.double().diagonal().mean() * torch.eye(columns))[
            self.order
        ][:, self.order]

    def solve(self, sweeps: int) -> BlockwiseSolution:
        solution = solve_blockwise(self.weight, self.factor.upper, self.formats)
        descend(solution, self.weight, self.hessian, self.order, self.factor, self.formats, sweeps)
        return solution

    def errors(self, quantized: torch.Tensor) -> torch.Tensor:
        """Of every row."""
        error = self.weight.double() - quantized
        return ((error @ self.damped) * error).sum(1)


def quantized(solution: BlockwiseSolution, columns: int) -> torch.Tensor:
    return dequantized(solution.values, solution.scales, columns).double()


@pytest.mark.parametrize("columns, formats", [(192, ["b4", "b3", "b2"]), (150, ["b3", "b2", "b1"]), (40, ["b2"])])
def test_every_sweep_lowers_the_error_of_the_layer(columns, formats):
    layer = Layer(columns, formats)
    errors = [layer.errors(quantized(layer.solve(sweeps), columns)) for sweeps in range(5)]
    for before, after in itertools.pairwise(errors):
        assert (after <= before * (1 + 1e-5)).all()
    assert errors[1].sum() < 0.98 * errors[0].sum() and errors[4].sum() < errors[1].sum()


@pytest.mark.parametrize("columns, formats", [(128, ["b3", "b2"]), (70, ["b2", "b1"])])
def test_in_the_end_no_other_value_and_no_other_scale_is_better(columns, formats):
    layer = Layer(columns, formats)
    solution = layer.solve(60)
    least = layer.errors(quantized(solution, columns))
    for rows, names in layer.formats:
        for column in range(columns):
            grid = grid_of(names[column // BLOCK_COLUMNS])
            for code in range(grid.levels):
                values = solution.values.clone()
                values[rows, column] = grid.step * code + grid.offset
                errors = layer.errors(dequantized(values, solution.scales, columns).double())
                assert (errors[rows] >= least[rows] * (1 - 1e-5)).all()
    for block in range(len(formats)):
        for factor in (0.99, 1.01):
            scales = solution.scales.clone()
            scales[:, block] *= factor
            assert (layer.errors(dequantized(solution.values, scales, columns).double()) > least).all()


@pytest.mark.parametrize("fmt", ALL_FORMATS)
def test_values_stay_on_the_grid_and_scales_in_float16(fmt):
    solution = Layer(150, [fmt] * 3).solve(2)
    grid = grid_of(fmt)
    assert torch.equal(solution.values, grid.clip(grid.nearest(solution.values)))
    assert torch.equal(solution.scales, solution.scales.half().float()) and (solution.scales != 0).all()


def test_no_sweep_changes_nothing():
    layer = Layer(150, ["b3", "b2", "b1"])
    plain, same = solve_blockwise(layer.weight, layer.factor.upper, layer.formats), layer.solve(0)
    assert torch.equal(plain.values, same.values) and torch.equal(plain.scales, same.scales)


def test_columns_that_never_had_any_input_are_no_trouble():
    hessian, weight = hessian_of(activations(128)).float(), random_weight(128)
    dead = [3, 64, 127]
    hessian[dead], hessian[:, dead] = 0, 0
    factor, formats = factorize(hessian, natural(128), DAMPING, "group"), [(slice(0, ROWS), ["b3", "b2"])]
    solution = solve_blockwise(weight, factor.upper, formats)
    descend(solution, weight, hessian, natural(128), factor, formats, 3)
    assert torch.isfinite(quantized(solution, 128)).all()
