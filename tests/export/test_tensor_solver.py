"""Linears solved in one ggml type: against llama.cpp's own quantizer, and on weights that break careless fits."""

import numpy as np
import pytest
import torch
from llama_cpp import quantize_rows

from mgptq_export.solver import (
    TensorSolution,
    best_rows,
    factorize,
    grid_of,
    pack_tensor,
    search_scales,
    solve_tensor,
    sub_block_order,
    tensor_error,
)
from mgptq_runtime.formats import GGML_FORMATS, GgmlFormat

ROWS, COLUMNS = 24, 512
ALL_TYPES = list(GGML_FORMATS)
K_TYPES = ["q2_k", "q3_k", "q4_k", "q6_k"]


def correlated_hessian(columns: int = COLUMNS) -> torch.Tensor:
    """Of correlated inputs, some of them much stronger than others: float64 [columns, columns]."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    mixing += torch.eye(columns, dtype=torch.float64)
    strength = torch.exp(torch.randn(columns, generator=generator, dtype=torch.float64))
    inputs = torch.randn(2 * columns, columns, generator=generator, dtype=torch.float64) @ mixing * strength
    return 2.0 / len(inputs) * inputs.t() @ inputs


def random_weight(rows: int = ROWS, columns: int = COLUMNS) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * 0.1


def factor_of(hessian: torch.Tensor, order: torch.Tensor | None = None) -> torch.Tensor:
    natural = torch.arange(len(hessian))
    return factorize(hessian, natural if order is None else order, 0.01, "linear").upper


def output_error(weight: torch.Tensor, quantized: torch.Tensor, hessian: torch.Tensor) -> float:
    """``tr((W - Q) H (W - Q)^T)``."""
    delta = (weight - quantized).double()
    return float((delta @ hessian * delta).sum())


@pytest.fixture(scope="module")
def hessian() -> torch.Tensor:
    return correlated_hessian()


@pytest.fixture(scope="module")
def upper(hessian) -> torch.Tensor:
    return factor_of(hessian)


def quantized_by_llama(fmt: GgmlFormat, weight: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    row_bytes = weight.shape[1] // fmt.block_columns * fmt.block_bytes
    data = quantize_rows(fmt.ggml_type, weight.numpy(), row_bytes, importance.float().numpy())
    return torch.from_numpy(fmt.dequantize(data))


@pytest.mark.parametrize("name", ALL_TYPES)
def test_the_solved_error_is_far_below_llama_cpps(hessian, upper, name):
    weight = random_weight()
    theirs = quantized_by_llama(GGML_FORMATS[name], weight, hessian.diagonal())
    ours = solve_tensor(weight, upper, name).dequantize()
    assert output_error(weight, ours, hessian) < 0.8 * output_error(weight, theirs, hessian)


@pytest.mark.parametrize("name", ALL_TYPES)
def test_without_compensation_the_fit_alone_beats_llama_cpps(hessian, name):
    weight, importance = random_weight(), hessian.diagonal().float()
    theirs = quantized_by_llama(GGML_FORMATS[name], weight, importance)
    errors = ((weight - theirs).square() * importance).sum(1)
    assert tensor_error(weight, importance, name).sum() < 0.97 * errors.sum()


@pytest.mark.parametrize("name", ALL_TYPES)
def test_packed_tensors_hold_the_solution_bit_for_bit(upper, name):
    solution = solve_tensor(random_weight(), upper, name)
    linear = pack_tensor("blk.0.attn_q", solution, COLUMNS)
    assert linear.permutation is None and [segment.format for segment in linear.segments] == [name]
    assert linear.stored_bytes * 8 == ROWS * COLUMNS * GGML_FORMATS[name].bits_per_weight
    assert np.array_equal(linear.dequantize(), solution.dequantize().numpy())


@pytest.mark.parametrize("name", ALL_TYPES)
def test_compensation_beats_rounding(hessian, upper, name):
    weight = random_weight()
    rounded = solve_tensor(weight, torch.diag(upper.diagonal()), name).dequantize()
    solved = solve_tensor(weight, upper, name).dequantize()
    assert output_error(weight, solved, hessian) < 0.85 * output_error(weight, rounded, hessian)


@pytest.mark.parametrize("name", ["q2_0", "q4_k", "q3_k"])
@pytest.mark.parametrize("way", ["storage", "sub-blocks", "columns"])
def test_block_errors_add_up_to_the_error_of_the_layers_output(hessian, name, way):
    weight, diagonal = random_weight(), hessian.diagonal()
    orders = {"sub-blocks": sub_block_order(diagonal, name), "columns": diagonal.argsort(descending=True)}
    order = orders.get(way)
    solution = solve_tensor(weight, factor_of(hessian, order), name, order=order)
    damped = hessian + 0.01 * diagonal.mean() * torch.eye(COLUMNS)
    expected = output_error(weight, solution.dequantize(), damped)
    assert float(solution.block_errors.sum()) == pytest.approx(expected, rel=2e-3)
    assert solution.block_errors.shape == (ROWS, COLUMNS // GGML_FORMATS[name].block_columns)


@pytest.mark.parametrize("name", ["q2_k", "q4_0"])
def test_storage_order_may_be_given_or_left_out(upper, name):
    implied = solve_tensor(random_weight(), upper, name)
    given = solve_tensor(random_weight(), upper, name, order=torch.arange(COLUMNS))
    assert float(given.block_errors.sum()) == pytest.approx(float(implied.block_errors.sum()), rel=0.01)


@pytest.mark.parametrize("name", ALL_TYPES)
def test_important_sub_blocks_first_loses_less(name):
    hessian, weight = correlated_hessian(), random_weight()
    order = sub_block_order(hessian.diagonal(), name)
    assert torch.equal(order.sort().values, torch.arange(COLUMNS))
    natural = solve_tensor(weight, factor_of(hessian), name).dequantize()
    ordered = solve_tensor(weight, factor_of(hessian, order), name, order=order).dequantize()
    assert output_error(weight, ordered, hessian) < 0.98 * output_error(weight, natural, hessian)


@pytest.mark.parametrize("name", K_TYPES)
def test_refitted_sub_blocks_lose_less(hessian, upper, name):
    weight = random_weight()
    settled = solve_tensor(weight, upper, name, refit=False).dequantize()
    refitted = solve_tensor(weight, upper, name).dequantize()
    assert output_error(weight, refitted, hessian) < output_error(weight, settled, hessian)


def test_the_best_rows_of_two_solutions_are_a_solution(hessian, upper):
    order = hessian.diagonal().argsort(descending=True)
    natural = solve_tensor(random_weight(), upper, "q3_k")
    ordered = solve_tensor(random_weight(), factor_of(hessian, order), "q3_k", order=order)
    best = best_rows(natural, ordered)
    rows = [solution.block_errors.sum(1) for solution in (natural, ordered, best)]
    assert torch.equal(rows[2], torch.minimum(rows[0], rows[1]))
    chosen = torch.where((rows[1] < rows[0])[:, None], ordered.dequantize(), natural.dequantize())
    assert torch.equal(best.dequantize(), chosen)
    with pytest.raises(ValueError, match="one type are needed, got q3_k and q2_0"):
        best_rows(natural, solve_tensor(random_weight(), upper, "q2_0"))


@pytest.mark.parametrize("name", ALL_TYPES)
def test_errors_are_those_of_rounding_and_fall_with_the_bits(name):
    weight, importance = random_weight(), torch.ones(COLUMNS)
    solution = solve_tensor(weight, torch.eye(COLUMNS), name, refit=False)
    assert torch.allclose(tensor_error(weight, importance, name).double(), solution.block_errors.sum(1), rtol=1e-4)


def test_more_bits_cost_less():
    weight, importance = random_weight(), correlated_hessian().diagonal().float()
    errors = [float(tensor_error(weight, importance, name).sum()) for name in ALL_TYPES if name != "q4_0"]
    assert errors == sorted(errors, reverse=True)


def test_errors_compare_with_those_of_container_scales():
    weight, importance = random_weight(columns=64), torch.rand(64, generator=torch.Generator().manual_seed(2))
    _, expected = search_scales(weight, importance, grid_of("b2"))
    assert torch.allclose(tensor_error(weight, importance, "q2_0"), expected, rtol=0.01)


def odd_weight(kind: str) -> torch.Tensor:
    weight = random_weight(rows=6)
    if kind == "zero":
        return torch.zeros_like(weight)
    if kind == "some zero":
        weight[1] = 0
        weight[2, 256:] = 0
        weight[3, :16] = 0
    elif kind == "outlier":
        weight[0, 5], weight[1, 300], weight[2, 7] = 1e4, -1e4, 1e6
    elif kind == "tiny":
        weight *= 1e-8
    elif kind == "minute":
        weight *= 1e-30
    elif kind == "huge":
        weight *= 1e12
    elif kind == "constant":
        weight = torch.full_like(weight, 0.05) * torch.tensor([1, -1, 1, -1, 1, -1])[:, None]
    return weight


def solved(weight: torch.Tensor, upper: torch.Tensor, name: str) -> tuple[TensorSolution, torch.Tensor]:
    solution = solve_tensor(weight, upper, name)
    linear = pack_tensor("odd", solution, COLUMNS)
    quantized = torch.from_numpy(linear.dequantize())
    assert torch.isfinite(quantized).all() and torch.equal(quantized, solution.dequantize())
    return solution, quantized


@pytest.mark.parametrize("name", ALL_TYPES)
@pytest.mark.parametrize("kind", ["zero", "some zero", "outlier", "tiny", "minute", "huge", "constant"])
def test_odd_weights_stay_finite_and_lose_no_more_than_zeros(name, kind):
    weight = odd_weight(kind)
    _, quantized = solved(weight, torch.eye(COLUMNS), name)
    lost, energy = (weight - quantized).double().square().sum(1), weight.double().square().sum(1)
    # A number below half of float16's least, 2^-25, is rounded to nothing.
    assert (lost <= 1.001 * energy).all()
    assert not quantized[(weight == 0).all(1)].any()
    estimate = tensor_error(weight, torch.ones(COLUMNS), name)
    assert not estimate.isnan().any()


@pytest.mark.parametrize("name", [name for name in ALL_TYPES if name != "q1_0"])
def test_an_outlier_does_not_drown_other_blocks(name):
    weight = random_weight(rows=4)
    weight[:, 300] = 50.0
    _, quantized = solved(weight, torch.eye(COLUMNS), name)
    first = slice(0, 256)
    lost = (weight - quantized)[:, first].square().sum() / weight[:, first].square().sum()
    assert lost < 0.2
    assert torch.allclose(quantized[:, 300], weight[:, 300], rtol=0.05)


@pytest.mark.parametrize("name", ALL_TYPES)
@pytest.mark.parametrize("kind", ["zero", "some zero", "outlier", "tiny"])
def test_odd_weights_survive_compensation(upper, name, kind):
    weight = odd_weight(kind)
    solution, quantized = solved(weight, upper, name)
    assert torch.isfinite(solution.block_errors).all()
    assert not quantized[(weight == 0).all(1)].any()


@pytest.mark.parametrize("name", ["q2_0", "q2_k", "q3_k"])
def test_dead_columns_leave_the_others_alone(name):
    hessian, weight = correlated_hessian(), random_weight()
    dead = torch.arange(16, 36)
    hessian[dead], hessian[:, dead] = 0, 0
    _, quantized = solved(weight, factor_of(hessian), name)
    assert output_error(weight, quantized, hessian) < 0.3 * output_error(weight, torch.zeros_like(weight), hessian)
    importance = hessian.diagonal().float()
    assert (tensor_error(weight, importance, name) < (importance * weight.square()).sum(1)).all()


def test_columns_that_are_no_whole_blocks_are_refused():
    with pytest.raises(ValueError, match="q4_k: 96 columns are not whole blocks of 256"):
        solve_tensor(random_weight(columns=96), torch.eye(96), "q4_k")
    with pytest.raises(ValueError, match="q2_0: 96 columns are not whole blocks of 64"):
        tensor_error(random_weight(columns=96), torch.ones(96), "q2_0")
