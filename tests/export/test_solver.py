"""The blockwise solver against textbook GPTQ in float64, which is trusted."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mgptq_export.solver import factorize, grid_of, pack_linear, search_scales, solve_blockwise
from mgptq_runtime.errors import NumericalError
from mgptq_runtime.formats import BLOCK_COLUMNS, FORMATS

ROWS = 24
ALL_FORMATS = list(FORMATS)


def activations(columns: int, seed: int = 0, samples: int = 600) -> torch.Tensor:
    """Correlated inputs, some of them much stronger than others: float64 [samples, columns]."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    mixing += torch.eye(columns, dtype=torch.float64)
    strength = torch.exp(torch.randn(columns, generator=generator, dtype=torch.float64))
    return torch.randn(samples, columns, generator=generator, dtype=torch.float64) @ mixing * strength


def hessian_of(inputs: torch.Tensor) -> torch.Tensor:
    return 2.0 / len(inputs) * inputs.t() @ inputs


def random_weight(columns: int, rows: int = ROWS, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1


def natural(columns: int) -> torch.Tensor:
    return torch.arange(columns)


def nearest(weight: torch.Tensor, scale: torch.Tensor, fmt: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The values of the format's grid that are nearest, and how clear the choice is, in units of the scale."""
    levels = torch.from_numpy(FORMATS[fmt].values()).double()
    distances = (weight[..., None] - scale[..., None] * levels).abs() / scale[..., None].abs()
    two = distances.topk(2, largest=False)
    return levels[two.indices[..., 0]], two.values[..., 1] - two.values[..., 0]


class LargestMade(TorchDispatchMode):
    """Notes how many bytes the two largest tensors have that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = [0, 0]

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):  # type: ignore[no-untyped-def]
        made = function(*arguments, **(keywords or {}))
        known = {one.untyped_storage().data_ptr() for one in arguments if isinstance(one, torch.Tensor)}
        for one in made if isinstance(made, tuple) else [made]:
            if isinstance(one, torch.Tensor) and one.untyped_storage().data_ptr() not in known:
                self.sizes = sorted([*self.sizes, one.untyped_storage().nbytes()])[-2:]
        return made


def textbook_gptq(
    weight: torch.Tensor, hessian: torch.Tensor, scales: torch.Tensor, formats: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """GPTQ as its paper derives it (arXiv 2210.17323, equations 2 and 3): one column at a time, then eliminate it.

    Returns:
        the grid values, float64 [rows, columns], and for every row its least clear choice, float64 [rows].
    """
    remaining, inverse = weight.double().clone(), torch.linalg.inv(hessian.double())
    values, clearest = torch.zeros_like(remaining), torch.full((len(weight),), torch.inf, dtype=torch.float64)
    for j in range(weight.shape[1]):
        scale = scales[:, j // BLOCK_COLUMNS].double()
        values[:, j], margin = nearest(remaining[:, j], scale, formats[j // BLOCK_COLUMNS])
        clearest = torch.minimum(clearest, margin)
        error = (remaining[:, j] - scale * values[:, j]) / inverse[j, j]
        remaining[:, j + 1 :] -= error[:, None] * inverse[j, j + 1 :]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return values, clearest


def dequantized(values: torch.Tensor, scales: torch.Tensor, columns: int) -> torch.Tensor:
    return (values * scales.repeat_interleave(BLOCK_COLUMNS, 1))[:, :columns]


@pytest.mark.parametrize(
    "columns, formats", [(192, ["b4", "b3", "b2"]), (128, ["b8", "b1"]), (150, ["b3", "b2", "b1"])]
)
def test_the_solution_is_textbook_gptqs(columns, formats):
    hessian, weight = hessian_of(activations(columns)).float(), random_weight(columns)
    damping = 0.01
    factor = factorize(hessian, natural(columns), damping, "group")
    solution = solve_blockwise(weight, factor.upper, [(slice(0, ROWS), formats)])
    damped = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(columns)
    expected, clearest = textbook_gptq(weight, damped, solution.scales, formats)
    # A row in which float32 and float64 may see different sides of a rounding boundary proves nothing.
    clear = clearest > 1e-3 if formats[0] != "b8" else clearest > 1e-4
    assert clear.sum() >= ROWS // 3
    assert torch.equal(solution.values[clear, :columns].double(), expected[clear])


@pytest.mark.parametrize("columns", [1, 256, 700])
def test_the_factor_is_that_of_the_damped_inverse_in_the_permuted_order(columns):
    hessian = hessian_of(activations(columns))
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(1))
    upper = factorize(hessian, order, 0.01, "group").upper.double()
    damped = (hessian + 0.01 * hessian.diagonal().mean() * torch.eye(columns))[order][:, order]
    assert torch.equal(upper, upper.triu())
    assert torch.allclose(upper.t() @ upper @ damped, torch.eye(columns, dtype=torch.float64), atol=1e-4)


def test_large_hessians_are_factorized_in_float32_as_well_as_in_float64(monkeypatch):
    hessian = hessian_of(activations(700)).float()
    double = factorize(hessian, natural(700), 0.01, "group").upper
    monkeypatch.setattr("mgptq_export.solver.factor.DOUBLE_COLUMNS", 699)
    single = factorize(hessian, natural(700), 0.01, "group").upper
    assert not torch.equal(single, double)
    assert torch.allclose(single, double, rtol=1e-3, atol=1e-5 * float(double.abs().max()))


def test_linears_of_a_group_are_solved_as_if_alone():
    hessian, weight = hessian_of(activations(128)).float(), random_weight(128)
    upper = factorize(hessian, natural(128), 0.01, "group").upper
    spans = [(slice(0, 8), ["b4", "b2"]), (slice(8, ROWS), ["b2", "b1"])]
    together = solve_blockwise(weight, upper, spans)
    for rows, formats in spans:
        alone = solve_blockwise(weight[rows], upper, [(slice(0, rows.stop - rows.start), formats)])
        assert torch.equal(together.values[rows], alone.values)
        assert torch.equal(together.scales[rows], alone.scales)


@pytest.mark.parametrize("columns", [128, 150])
@pytest.mark.parametrize("fmt", ["b1", "b2", "b4"])
def test_block_errors_add_up_to_the_error_of_the_layers_output(columns, fmt):
    inputs, weight = activations(columns), random_weight(columns)
    factor = factorize(hessian_of(inputs), natural(columns), 1e-9, "group")
    blocks = -(-columns // BLOCK_COLUMNS)
    solution = solve_blockwise(weight, factor.upper, [(slice(0, ROWS), [fmt] * blocks)])
    delta = weight.double() - dequantized(solution.values, solution.scales, columns).double()
    of_output = 2.0 / len(inputs) * (inputs @ delta.t()).square().sum(0)
    assert torch.allclose(solution.block_errors.sum(1), of_output, rtol=1e-3)


@pytest.mark.parametrize("fmt", ["b1", "b2", "b3", "b4"])
def test_compensation_beats_rounding(fmt):
    inputs, weight = activations(192), random_weight(192)
    upper = factorize(hessian_of(inputs), natural(192), 0.01, "group").upper
    rounded = solve_blockwise(weight, torch.eye(192), [(slice(0, ROWS), [fmt] * 3)])
    solved = solve_blockwise(weight, upper, [(slice(0, ROWS), [fmt] * 3)])

    def output_error(solution) -> float:
        delta = weight - dequantized(solution.values, solution.scales, 192)
        return float((inputs @ delta.double().t()).square().sum())

    assert output_error(solved) < 0.8 * output_error(rounded)


@pytest.mark.parametrize("fmt", ALL_FORMATS)
def test_padding_changes_nothing(fmt):
    """A last block of 6 real columns: its scales fit these alone, and the block before it never notices."""
    upper = factorize(hessian_of(activations(70)), natural(70), 0.01, "group").upper
    weight = random_weight(70)
    padded = solve_blockwise(weight, upper, [(slice(0, ROWS), [fmt] * 2)])
    assert padded.values.shape == (ROWS, 128)
    first = solve_blockwise(weight[:, :64], upper[:64, :64], [(slice(0, ROWS), [fmt])])
    assert torch.equal(padded.values[:, :64], first.values) and torch.equal(padded.scales[:, :1], first.scales)
    assert torch.equal(padded.block_errors[:, :1], first.block_errors)
    errors = (weight[:, :64] - dequantized(first.values, first.scales, 64)).double()
    scaled = torch.linalg.solve_triangular(upper[:64, :64].double(), errors, upper=True, left=False)
    compensated = (weight[:, 64:].double() - scaled @ upper[:64, 64:].double()).float()
    scales, _ = search_scales(compensated, upper.diagonal()[64:].pow(-2), grid_of(fmt))
    assert torch.allclose(padded.scales[:, 1], scales, rtol=2e-3)


def test_dead_columns_leave_the_others_alone():
    inputs = activations(128)
    inputs[:, [3, 77]] = 0.0
    hessian = hessian_of(inputs).float()
    factor = factorize(hessian, natural(128), 0.01, "group")
    assert factor.dead.nonzero().flatten().tolist() == [3, 77] and factor.attempts == 1
    off_diagonal = factor.upper - torch.diag(factor.upper.diagonal())
    assert not off_diagonal[[3, 77]].any() and not off_diagonal[:, [3, 77]].any()
    living = [j for j in range(128) if j not in (3, 77)]
    # Their own rounding error counts as much as an average column's.
    expected = 1.01 * hessian.diagonal()[living].mean().expand(2)
    assert torch.allclose(factor.upper.diagonal()[[3, 77]].pow(-2), expected, rtol=1e-4)
    diagonal = hessian.diagonal()[living].mean()
    alone = torch.linalg.inv(hessian[living][:, living].double() + 0.01 * diagonal * torch.eye(126))
    upper = factor.upper[living][:, living].double()
    assert torch.allclose(upper.t() @ upper, alone, rtol=1e-3, atol=1e-3 * float(alone.diagonal().max()))


def test_the_factor_is_of_the_permuted_damped_inverse():
    hessian = hessian_of(activations(96))
    order = torch.randperm(96, generator=torch.Generator().manual_seed(2))
    factor = factorize(hessian, order, 0.01, "group")
    damped = hessian[order][:, order] + 0.01 * hessian.diagonal().mean() * torch.eye(96)
    assert torch.equal(factor.upper, factor.upper.triu())
    upper = factor.upper.double()
    assert torch.allclose(upper.t() @ upper @ damped, torch.eye(96, dtype=torch.float64), atol=1e-3)
    assert (factor.damping, factor.attempts) == (0.01, 1)


def test_an_indefinite_hessian_is_damped_more_and_reported(caplog):
    column = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rank_one = torch.outer(column, column)
    factor = factorize(rank_one, natural(64), 1e-18, "blk.7.attn_qkv")
    assert factor.attempts > 1 and factor.damping > 1e-18
    [record] = caplog.records
    assert "blk.7.attn_qkv" in record.message and "damping raised to" in record.message
    damped = rank_one + factor.damping * rank_one.diagonal().mean() * torch.eye(64)
    upper = factor.upper.double()
    assert torch.allclose(upper.t() @ upper @ damped, torch.eye(64, dtype=torch.float64), atol=1e-2)


def test_a_definite_hessian_is_not_reported(caplog):
    factorize(hessian_of(activations(64)), natural(64), 0.01, "group")
    assert not caplog.records


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_hessian_with_nan_or_infinity_is_an_error(value):
    hessian = torch.eye(64)
    hessian[5, 6] = value
    with pytest.raises(NumericalError, match=r"blk\.3\.ffn_down: the Hessian holds NaN or infinity"):
        factorize(hessian, natural(64), 0.01, "blk.3.ffn_down")


def test_a_hopeless_hessian_is_an_error():
    hessian = torch.eye(64)
    hessian[0, 1] = hessian[1, 0] = 1e9
    with pytest.raises(NumericalError, match=r"blk\.3\.ffn_down: .* not positive definite even with damping \d"):
        factorize(hessian, natural(64), 0.01, "blk.3.ffn_down")


def brute_force_error(weight: torch.Tensor, importance: torch.Tensor, fmt: str) -> torch.Tensor:
    """The least error over 2000 scales, each improved in closed form for its grid values: float64 [rows]."""
    weight, importance = weight.double(), importance.double()
    largest = weight.abs().amax(-1)
    extreme = float(np.abs(FORMATS[fmt].values()).max())
    best = torch.full_like(largest, torch.inf)
    for ratio in torch.linspace(0.05, 1.6, 1000).double():
        for scale in (ratio * largest / extreme, -ratio * largest / extreme):
            values, _ = nearest(weight, scale[:, None].expand_as(weight), fmt)
            refined = (importance * weight * values).sum(-1) / (importance * values * values).sum(-1).clamp_min(1e-30)
            errors = (importance * (weight - refined[:, None] * values).square()).sum(-1)
            best = torch.minimum(best, errors)
    return best


def error_at(weight: torch.Tensor, importance: torch.Tensor, scales: torch.Tensor, fmt: str) -> torch.Tensor:
    values, _ = nearest(weight.double(), scales.double()[:, None].expand_as(weight), fmt)
    return (importance.double() * (weight.double() - scales.double()[:, None] * values).square()).sum(-1)


@pytest.mark.parametrize("fmt", ["b1", "b2", "b3", "b4"])
def test_searched_scales_lose_hardly_more_than_the_best(fmt):
    weight = random_weight(64, rows=40)
    importance = torch.exp(torch.randn(64, generator=torch.Generator().manual_seed(3)))
    scales, claimed = search_scales(weight, importance, grid_of(fmt))
    error = error_at(weight, importance, scales, fmt)
    assert error.sum() <= 1.02 * brute_force_error(weight, importance, fmt).sum()
    assert torch.allclose(claimed.double(), error, rtol=0.03)


def test_b8_scales_lose_next_to_nothing():
    """Too little for the last 2 % to matter, or to be more than float16 scales cost."""
    weight, importance = random_weight(64, rows=40), torch.ones(64)
    scales, claimed = search_scales(weight, importance, grid_of("b8"))
    error = error_at(weight, importance, scales, "b8")
    assert (error / weight.double().square().sum(-1)).max() < 1e-4
    assert torch.allclose(claimed.double(), error, rtol=0.15)


@pytest.mark.parametrize("fmt", ALL_FORMATS)
@pytest.mark.parametrize("magnitude", [0.0, 1e-30, 1e-6, 1.0, 1e6, 1e15])
def test_scales_are_float16_values_and_never_zero(fmt, magnitude):
    scales, errors = search_scales(random_weight(64) * magnitude, torch.ones(64), grid_of(fmt))
    assert torch.equal(scales, scales.half().float())
    assert torch.isfinite(scales).all() and (scales != 0).all()
    assert not errors.isnan().any()


@pytest.mark.parametrize("formats", [["b4", "b4", "b2"], ["b8", "b3", "b1"], ["b1", "b1", "b1"]])
def test_packed_linears_hold_the_solution_bit_for_bit(formats):
    columns = 150
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(5))
    upper = factorize(hessian_of(activations(columns)), order, 0.01, "group").upper
    solution = solve_blockwise(random_weight(columns)[:, order], upper, [(slice(0, ROWS), formats)])
    permutation = order.to(torch.int32).numpy()
    linear = pack_linear("blk.0.attn_q", solution.values, solution.scales, formats, columns, permutation)
    expected = np.empty((ROWS, columns), np.float32)
    expected[:, permutation] = dequantized(solution.values, solution.scales, columns).numpy()
    assert np.array_equal(linear.dequantize(), expected)
    runs = [fmt for i, fmt in enumerate(formats) if i == 0 or formats[i - 1] != fmt]
    assert [segment.format for segment in linear.segments] == runs


@pytest.mark.parametrize("columns", [400, 401])
def test_factorizing_takes_little_more_memory_than_the_factor(columns, monkeypatch):
    monkeypatch.setattr("mgptq_export.compute.CACHED_NUMBERS", 1 << 13)
    monkeypatch.setattr("mgptq_export.solver.factor.FACTOR_COLUMNS", 32)
    monkeypatch.setattr("mgptq_export.solver.factor.DOUBLE_COLUMNS", 0)
    hessian = hessian_of(activations(columns)).float()
    with LargestMade() as made:
        factorize(hessian, natural(columns).flip(0), 0.01, "x")
    assert made.sizes[1] == 4 * columns**2 and made.sizes[0] < columns**2


def test_solving_takes_little_more_memory_than_a_copy_of_the_weights():
    weight, upper = random_weight(512, rows=512), torch.eye(512)
    with LargestMade() as made:
        solution = solve_blockwise(weight, upper, [(slice(0, 512), ["b2"] * 8)])
    assert made.sizes[1] == 4 * weight.numel() and made.sizes[0] < 2 * weight.numel()
    assert torch.equal(weight, random_weight(512, rows=512)) and solution.values.shape == weight.shape
