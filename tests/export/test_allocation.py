"""Who gets how many bits. Brute force over all choices, and the solver in float64, are trusted."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch_geometric.utils import to_edge_index

from mgptq_export.allocation import (
    Allocation,
    BlockProblem,
    LinearProblem,
    TableProblem,
    Trial,
    allocate_by_gnn,
    allocate_by_hessian,
    allocate_uniformly,
    share_budget,
    training,
)
from mgptq_export.allocation import linear as linear_module
from mgptq_export.allocation.budget import cheapest_within, choose, price_for
from mgptq_export.allocation.column_graph import FEATURES, build_graphs
from mgptq_export.allocation.linear import InputColumns, expected_loss, strongest_edges
from mgptq_export.allocation.network import AllocatorNetwork
from mgptq_export.allocation.problem import COST_CANDIDATES
from mgptq_export.layouts.base import Allocated, decide
from mgptq_export.recipe import Recipe
from mgptq_export.solver import factorize, grid_of, search_scales
from mgptq_runtime.errors import BudgetError, NumericalError
from mgptq_runtime.formats import BLOCK_COLUMNS, FORMATS

ALL_FORMATS = tuple(FORMATS)
SHIPPED_LARGE_ERROR_FACTOR = linear_module.LARGE_ERROR_FACTOR


def random_linear(name: str, layer: int, rows: int, columns: int, seed: int, strength: float = 1.0) -> LinearProblem:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(3 * columns, columns, generator=generator)
    inputs *= torch.linspace(2.0, 0.2, columns)
    inputs[:, 1:] += 0.7 * inputs[:, :-1]
    factor = factorize(2 / len(inputs) * inputs.t() @ inputs, torch.arange(columns), 0.01, name)
    weight = 0.1 * torch.randn(rows, columns, generator=generator)
    sensitivity = strength * torch.rand(rows, generator=generator)
    return LinearProblem(
        name, layer, 2, weight, torch.arange(columns), InputColumns.of_factor(factor.upper), sensitivity
    )


@pytest.fixture(scope="module")
def linears() -> list[LinearProblem]:
    """Two layers of several widths, one of them no multiple of 64; a group of two shares its factor."""
    first = random_linear("blk.0.attn_q", 0, 48, 256, 0)
    second = random_linear("blk.0.attn_k", 0, 24, 256, 1, strength=30.0)
    return [
        first,
        replace(second, inputs=first.inputs),
        random_linear("blk.0.ffn_down", 0, 32, 200, 2),
        random_linear("blk.1.attn_q", 1, 48, 256, 3, strength=5.0),
        random_linear("blk.1.ffn_down", 1, 32, 200, 4, strength=0.1),
    ]


def problem_of(linears: list[LinearProblem], bits: float, formats: tuple[str, ...] = ALL_FORMATS) -> BlockProblem:
    return BlockProblem(linears, formats, int(bits * sum(x.rows * x.blocks * BLOCK_COLUMNS for x in linears)))


class Model:
    """What a model would lose if the estimated costs were off by a factor for every linear."""

    def __init__(self, problem: BlockProblem, factors: dict[str, float] | None = None) -> None:
        self.problem, self.factors = problem, factors or {}
        self.tried: list[Allocation] = []
        self.costs = problem.costs()

    def attempt(self, allocation: Allocation) -> Trial:
        """Trusted: nothing else adds to the loss."""
        self.tried.append(allocation)
        losses = {}
        for linear, costs in self.problem.split(self.costs):
            chosen = torch.tensor([self.problem.formats.index(fmt) for fmt in allocation[linear.name]])
            loss = self.factors.get(linear.name, 1.0) * costs.gather(1, chosen[:, None]).sum()
            losses[linear.name] = loss.expand(4)
        return Trial(float(sum(loss.mean() for loss in losses.values())), losses)

    def loss(self, allocation: Allocation) -> float:
        return self.attempt(allocation).divergence


def by_gnn(
    problem: BlockProblem, trials: int = 2, steps: int = 2, factors: dict[str, float] | None = None
) -> Allocation:
    return allocate_by_gnn(problem, Model(problem, factors).attempt, trials, steps, 0).formats


def by_hessian(problem: BlockProblem) -> Allocation:
    return allocate_by_hessian(problem).formats


def uniformly(problem: BlockProblem) -> Allocation:
    return allocate_uniformly(problem).formats


def bits_of(allocation: dict[str, tuple[str, ...]], linears: list[LinearProblem]) -> int:
    by_name = {linear.name: linear for linear in linears}
    return sum(by_name[name].rows * FORMATS[fmt].block_bytes * 8 for name, fmts in allocation.items() for fmt in fmts)


@pytest.fixture(autouse=True)
def _quick_and_quadratic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Constants of the method that are tuned on real models have neutral values here."""
    monkeypatch.setattr(linear_module, "LARGE_ERROR_FACTOR", 0.0)


# Embedding and head under the same budget


def table_of(name: str, strength: float, seed: int = 9) -> TableProblem:
    return TableProblem(name, (random_linear(name, 0, 40, 150, seed, strength),))


def test_what_tables_take_is_missing_for_the_linears(linears):
    problem = problem_of(linears, 3.0)
    tables = [table_of("token_embd", 1.0), table_of("output", 20.0, 10)]
    chosen, costs, left = share_budget(problem, tables)
    assert {name: len(blocks) for name, blocks in chosen.items()} == {"token_embd": 3, "output": 3}
    assert all(list(blocks) == sorted(blocks, key=ALL_FORMATS.index, reverse=True) for blocks in chosen.values())
    taken = sum(40 * FORMATS[fmt].block_bytes * 8 for blocks in chosen.values() for fmt in blocks)
    assert left == problem.budget - taken
    assert torch.equal(costs, problem.costs())
    assert by_hessian(replace(problem, budget=left, estimated=costs)) == by_hessian(replace(problem, budget=left))


def test_tables_get_as_many_bits_as_their_errors_are_worth(linears):
    bits = [
        sum(FORMATS[fmt].bits_per_weight for fmt in share_budget(problem_of(linears, 3.0), [table])[0]["token_embd"])
        for table in (table_of("token_embd", strength) for strength in (0.0, 0.1, 1.0, 10.0, 1e4))
    ]
    assert bits == sorted(bits) and len(set(bits)) >= 4
    assert (bits[0], bits[-1]) == (3 * FORMATS["b1"].bits_per_weight, 3 * FORMATS["b8"].bits_per_weight)


def test_shares_are_the_cheapest_with_a_table_counted_twice(linears):
    """As it is with the table as a linear of twice the sensitivity; brute force is trusted for those."""
    table = random_linear("token_embd", 0, 40, 150, 9, 2.0)
    problem = problem_of([*linears, table], 2.7)
    chosen, _, _ = share_budget(replace(problem, linears=linears), [table_of("token_embd", 1.0)])
    assert chosen["token_embd"] == by_hessian(problem)["token_embd"]


def test_a_matrix_of_two_uses_minds_the_errors_of_both():
    first, second = random_linear("token_embd", 0, 40, 150, 1), random_linear("token_embd", 0, 40, 150, 2)
    second = replace(second, inputs=InputColumns.apart(torch.rand(150)))
    together = TableProblem("token_embd", (first, second)).costs(ALL_FORMATS)
    alone = [TableProblem("token_embd", (use,)).costs(ALL_FORMATS) for use in (first, second)]
    assert torch.allclose(together, sum(alone))


def test_a_table_costs_what_a_linear_of_its_kind_costs(monkeypatch):
    """Large errors count for more in both."""
    monkeypatch.setattr(linear_module, "LARGE_ERROR_FACTOR", 5.0)
    matrix = random_linear("token_embd", 0, 40, 150, 1)
    costs = TableProblem("token_embd", (matrix,)).costs(ALL_FORMATS)
    assert torch.equal(costs, BlockProblem([matrix], ALL_FORMATS, 0).costs())


def test_an_error_counts_for_more_the_larger_it_is_beside_what_it_is_an_error_of(monkeypatch):
    """Of a tenth and two fifths of the energy, with the factor that docs/method.md has."""
    monkeypatch.setattr(linear_module, "LARGE_ERROR_FACTOR", SHIPPED_LARGE_ERROR_FACTOR)
    corrected = expected_loss(torch.tensor([[1.0, 4.0]]), torch.tensor([10.0]))
    assert torch.allclose(corrected, torch.tensor([[1.5, 12.0]]) / 4)


def test_costs_are_the_divergence_in_nats():
    """Of a softmax over a linear's outputs, whose columns do not compensate for one another."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(20_000, 64, generator=generator) * torch.linspace(0.5, 2.0, 64)
    weight = 0.1 * torch.randn(40, 64, generator=generator)
    probabilities = (inputs @ weight.t()).softmax(1)
    linear = LinearProblem(
        "output",
        0,
        1,
        weight,
        torch.arange(64),
        InputColumns.apart(2 * inputs.square().mean(0)),
        (probabilities * (1 - probabilities)).mean(0),
    )
    costs = BlockProblem([linear], ("b4",), 0).costs()
    grid = grid_of("b4")
    scales = search_scales(weight, linear.inputs.importance, grid, COST_CANDIDATES)[0][:, None]
    quantized = scales * grid.round(weight / scales)
    lost = probabilities * ((inputs @ weight.t()).log_softmax(1) - (inputs @ quantized.t()).log_softmax(1))
    assert float(costs) == pytest.approx(float(lost.sum(1).mean()), rel=0.05)


def test_columns_that_matter_nothing_may_lose_everything():
    use = replace(random_linear("token_embd", 0, 40, 128, 1), inputs=InputColumns.apart(torch.zeros(128)))
    assert not TableProblem("token_embd", (use,)).costs(ALL_FORMATS).any()


# Choosing under a budget


def small_problem(seed: int, units: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Costs that fall with size, and sizes of units of different row counts."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(1, 5, (units, 1), generator=generator)
    sizes = rows * torch.tensor([[10, 18, 26, 34]])
    steps = torch.rand(units, 4, generator=generator, dtype=torch.float64) * 10 ** torch.randn(
        units, 1, generator=generator, dtype=torch.float64
    )
    return steps.flip(1).cumsum(1).flip(1), sizes


def budget_between(sizes: torch.Tensor, share: float) -> int:
    """A share of the way from the smallest formats to the largest."""
    low, high = int(sizes.min(1).values.sum()), int(sizes.max(1).values.sum())
    return low + int(share * (high - low))


def cost_and_size(choice: torch.Tensor, costs: torch.Tensor, sizes: torch.Tensor) -> tuple[float, int]:
    unit = torch.arange(len(choice))
    return float(costs[unit, choice].sum()), int(sizes[unit, choice].sum())


def optimum(costs: torch.Tensor, sizes: torch.Tensor, budget: int) -> float:
    choices = torch.tensor(list(itertools.product(range(costs.shape[1]), repeat=len(costs))))
    unit = torch.arange(len(costs))
    fits = sizes[unit, choices].sum(1) <= budget
    return float(costs[unit, choices].sum(1)[fits].min())


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("share", [0.0, 0.1, 0.35, 0.7, 1.0])
def test_the_choice_fits_and_is_within_one_unit_of_the_optimum(seed, share):
    costs, sizes = small_problem(seed)
    budget = budget_between(sizes, share)
    choice = cheapest_within(costs, sizes, budget)
    cost, size = cost_and_size(choice, costs, sizes)
    assert size <= budget
    largest_upgrade = float((costs.max(1).values - costs.min(1).values).max())
    assert cost <= optimum(costs, sizes, budget) + largest_upgrade


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("share", [0.0, 0.1, 0.35, 0.7])
def test_what_is_left_over_buys_no_upgrade(seed, share):
    costs, sizes = small_problem(seed)
    budget = budget_between(sizes, share)
    choice = cheapest_within(costs, sizes, budget)
    left = budget - cost_and_size(choice, costs, sizes)[1]
    extra = sizes - sizes[torch.arange(len(choice)), choice][:, None]
    assert left < extra[extra > 0].min()


def descends(choice: torch.Tensor) -> torch.Tensor:
    """Whether no format is above the one before it, along :data:`RUNS`."""
    return torch.stack([(run[..., 1:] <= run[..., :-1]).all(-1) for run in choice.split(RUNS.tolist(), -1)]).all(0)


RUNS = torch.tensor([3, 1, 2])


@pytest.mark.parametrize("seed", range(12))
def test_along_a_run_the_choice_is_the_best_that_never_rises(seed):
    costs, sizes = small_problem(seed)
    every = torch.tensor(list(itertools.product(range(4), repeat=6)))
    allowed = every[descends(every)]
    unit = torch.arange(6)
    for price in (1e-4, 1e-2, 0.1, 1.0):
        values = costs + price * sizes
        choice = choose(costs, sizes, price, RUNS)
        assert descends(choice)
        assert float(values[unit, choice].sum()) == pytest.approx(float(values[unit, allowed].sum(1).min()), rel=1e-12)


def test_a_block_that_wants_more_than_the_one_before_it_draws_that_one_along():
    """Sorted after it was chosen, the format would go to the block that gains nothing by it."""
    sizes = torch.tensor([[1, 2]]).repeat(4, 1)
    costs = torch.tensor([[1.0, 1.0], [9.0, 0.0], [4.0, 0.0], [4.0, 0.0]], dtype=torch.float64)
    assert cheapest_within(costs, sizes, 6).tolist() == [0, 1, 1, 0]
    assert cheapest_within(costs, sizes, 6, torch.tensor([2, 2])).tolist() == [1, 1, 0, 0]
    assert cheapest_within(costs, sizes, 6, torch.tensor([4])).tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("share", [0.0, 0.1, 0.35, 0.7, 1.0])
def test_what_is_left_over_buys_no_upgrade_that_would_not_rise(seed, share):
    costs, sizes = small_problem(seed)
    budget = budget_between(sizes, share)
    choice = cheapest_within(costs, sizes, budget, RUNS)
    left = budget - cost_and_size(choice, costs, sizes)[1]
    assert descends(choice) and left >= 0
    for unit in range(6):
        for fmt in range(int(choice[unit]) + 1, 4):
            upgraded = choice.clone()
            upgraded[unit] = fmt
            assert int(sizes[unit, fmt] - sizes[unit, choice[unit]]) > left or not descends(upgraded)


@pytest.mark.parametrize("weights_at_once", [1, 1000])
def test_estimates_are_made_for_some_rows_at_a_time_which_changes_nothing(linears, weights_at_once, monkeypatch):
    problem = problem_of(linears, 2.5)
    whole = problem.costs(), problem.energies()
    monkeypatch.setattr("mgptq_export.allocation.linear.NUMBERS_AT_ONCE", weights_at_once)
    for found, expected in zip((problem.costs(), problem.energies()), whole, strict=True):
        assert torch.allclose(found, expected, rtol=1e-12)


def test_choices_are_mostly_optimal():
    gaps = []
    for seed in range(20):
        costs, sizes = small_problem(seed)
        budget = int(sizes.double().mean(1).sum())
        best = optimum(costs, sizes, budget)
        gaps.append(cost_and_size(cheapest_within(costs, sizes, budget), costs, sizes)[0] / best - 1)
    assert sum(gaps) / len(gaps) < 0.1


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_the_unit_of_costs_does_not_matter(factor):
    costs, sizes = small_problem(3)
    budget = int(sizes.double().mean(1).sum())
    assert torch.equal(cheapest_within(costs, sizes, budget), cheapest_within(costs * factor, sizes, budget))


def test_equal_costs_still_use_up_the_budget():
    sizes = torch.tensor([[10, 18, 26]]).repeat(5, 1)
    choice = cheapest_within(torch.ones(5, 3, dtype=torch.float64), sizes, 100)
    assert 100 - cost_and_size(choice, torch.ones(5, 3), sizes)[1] < 8


def test_a_budget_below_the_smallest_formats_is_an_error():
    costs, sizes = small_problem(0)
    smallest = int(sizes.min(1).values.sum())
    with pytest.raises(BudgetError, match=rf"take {smallest} bits, the budget is {smallest - 1}"):
        cheapest_within(costs, sizes, smallest - 1)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_scores_that_are_no_numbers_are_an_error(value):
    costs, sizes = small_problem(0)
    costs[2, 1] = value
    with pytest.raises(NumericalError, match="NaN or infinity"):
        price_for(costs, sizes, int(sizes.sum()))


def test_nan_sensitivities_are_an_error_for_every_scoring_allocator(linears):
    broken = [replace(linears[0], sensitivity=torch.full((48,), torch.nan)), *linears[1:]]
    for allocate in (by_hessian, by_gnn):
        with pytest.raises(NumericalError):
            allocate(problem_of(broken, 2.5))


# Allocators


@pytest.mark.parametrize("bits", [1.25, 1.9, 2.5, 3.0, 4.1, 6.0])
@pytest.mark.parametrize("allocator", ["uniform", "hessian", "gnn"])
def test_every_allocator_meets_the_budget_with_descending_formats(linears, allocator, bits):
    allocate = {
        "uniform": uniformly,
        "hessian": by_hessian,
        "gnn": by_gnn,
    }[allocator]
    problem = problem_of(linears, bits)
    allocation = allocate(problem)
    assert list(allocation) == [linear.name for linear in linears]
    for linear in linears:
        formats = allocation[linear.name]
        assert len(formats) == linear.blocks
        widths = [FORMATS[fmt].bits_per_weight for fmt in formats]
        assert widths == sorted(widths, reverse=True)
    assert problem.budget - 24 * 8 * 8 < bits_of(allocation, linears) <= problem.budget


@pytest.mark.parametrize("bits", [1.5, 2.25, 2.5, 3.0, 3.7, 5.0])
def test_uniform_gives_every_linear_the_same_bits(bits):
    """To within half a block, since blocks are whole, and one more that what is left of the budget buys."""
    linears = [random_linear(f"blk.{i}.x", 0, 16 * (i + 1), columns, i) for i, columns in enumerate((256, 512, 1024))]
    problem = problem_of(linears, bits)
    allocation = uniformly(problem)
    widths = [FORMATS[fmt].bits_per_weight for fmt in ALL_FORMATS]
    step = max(b - a for a, b in itertools.pairwise(widths) if a <= bits + 0.1)
    for linear in linears:
        mean = sum(FORMATS[fmt].bits_per_weight for fmt in allocation[linear.name]) / linear.blocks
        assert abs(mean - bits) <= 1.5 * step / linear.blocks, linear.name


@pytest.mark.parametrize("allocator", ["hessian", "gnn"])
def test_bits_go_where_the_loss_minds(linears, allocator):
    allocate = by_hessian if allocator == "hessian" else by_gnn
    twin = replace(linears[0], name="blk.1.attn_q", sensitivity=100 * linears[0].sensitivity)
    allocation = allocate(problem_of([linears[0], twin], 2.5))
    careless, careful = (bits_of({name: allocation[name]}, [linears[0], twin]) for name in allocation)
    assert careful > 1.3 * careless


@pytest.mark.parametrize("bits", [1.4, 2.5, 3.3])
def test_an_untrained_network_allocates_as_the_estimate_says(linears, bits):
    problem = problem_of(linears, bits)
    assert by_gnn(problem, trials=1) == by_gnn(problem, trials=2, steps=0) == by_hessian(problem)


def test_training_is_deterministic_and_leaves_the_global_generator_alone(linears):
    problem, factors = problem_of(linears, 2.4), {"blk.0.ffn_down": 9.0}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = by_gnn(problem, 3, 20, factors)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert by_gnn(problem, 3, 20, factors) == first


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("factor", [12.0, 1 / 12])
def test_the_network_learns_where_the_estimate_is_wrong(linears, factor, seed):
    """A linear's true loss is off by a factor: bits move to it or away from it, and the loss falls."""
    problem, factors = problem_of(linears, 2.4), {"blk.1.attn_q": factor}
    model = Model(problem, factors)
    estimated, learnt = by_hessian(problem), allocate_by_gnn(problem, model.attempt, 5, 60, seed).formats
    before, after = (bits_of({"blk.1.attn_q": one["blk.1.attn_q"]}, linears) for one in (estimated, learnt))
    assert after > before if factor > 1 else after < before
    assert model.loss(learnt) < 0.75 * model.loss(estimated)


def test_what_one_trial_says_of_a_tensor_is_proposed_next(linears):
    """Even before the network has learnt anything."""
    problem, factors = problem_of(linears, 2.4), {"blk.1.attn_q": 12.0}
    model = Model(problem, factors)
    allocate_by_gnn(problem, model.attempt, 2, 0, 0)
    first, second = (model.loss(allocation) for allocation in model.tried[:2])
    assert second < 0.8 * first


def test_a_first_proposal_goes_half_of_the_way_where_drift_stays(linears):
    problem, factors = problem_of(linears, 2.4), {"blk.1.attn_q": 12.0}

    def bits_proposed(drift_correction: float) -> float:
        model = Model(problem, factors)
        recipe = Recipe(drift_correction=drift_correction, training_steps=0)
        decide(
            problem,
            recipe,
            attempt=lambda allocated: model.attempt(allocated.decision.formats),
            check=lambda formats: None,
            settled=lambda decision: Allocated(decision, orders={}, tables={}, bits=2.4),
        )
        return bits_of({"blk.1.attn_q": model.tried[1]["blk.1.attn_q"]}, linears)

    first = bits_of({"blk.1.attn_q": by_hessian(problem)["blk.1.attn_q"]}, linears)
    assert first < bits_proposed(0.0) < bits_proposed(0.5)


UP_AND_DOWN = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)


def test_a_measurement_that_is_no_more_than_noise_moves_no_bits(linears):
    model = Model(problem_of(linears, 2.4), {"blk.1.attn_q": 12.0})

    def noisy(allocation: Allocation) -> Trial:
        trial = model.attempt(allocation)
        return replace(trial, losses={name: losses * (1 + 300 * UP_AND_DOWN) for name, losses in trial.losses.items()})

    allocate_by_gnn(model.problem, noisy, 2, 0, 0)
    assert len(model.tried) == 1


def corrections_of(problem: BlockProblem, trial: Trial, steps: int) -> dict[str, float]:
    """What the network learns of one trial of the estimates' choice: the logarithms' mean correction, by linear."""
    costs, sizes = problem.costs(), problem.sizes()
    choice = cheapest_within(costs, sizes, problem.budget, problem.runs())
    predictor = training._Predictor(problem, costs, sizes, choice, trial, 0)
    learnt = predictor.learn([training._Tried(choice, predictor.costs, trial)], steps)
    return {linear.name: float(of_linear.mean()) for linear, of_linear in problem.split(learnt)}


def trial_of(problem: BlockProblem, factors: dict[str, float], noisy: dict[str, float]) -> Trial:
    """Of the estimates' choice; some linears' losses are off by so many times themselves, up and down."""
    trial = Model(problem, factors).attempt(by_hessian(problem))
    losses = {name: loss * (1 + noisy.get(name, 0.0) * UP_AND_DOWN) for name, loss in trial.losses.items()}
    return replace(trial, losses=losses)


@pytest.fixture(scope="module")
def sixty() -> list[LinearProblem]:
    """Of two kinds, in thirty layers."""
    kinds = list(enumerate(("attn_q", "ffn_down")))
    return [random_linear(f"blk.{i}.{kind}", i, 16, 128, 2 * i + j) for i in range(30) for j, kind in kinds]


def test_of_a_tensor_that_could_not_be_measured_the_network_says_what_its_likes_have_in_common(sixty):
    """The trial itself says nothing of it."""
    problem = problem_of(sixty, 2.4)
    factors = {linear.name: 5.0 for linear in sixty if linear.kind == "attn_q"}
    trial = trial_of(problem, factors, {"blk.3.attn_q": 300.0, "blk.2.ffn_down": 300.0})
    untrained, trained = (corrections_of(problem, trial, steps) for steps in (0, 60))
    assert abs(untrained["blk.3.attn_q"] - untrained["blk.2.ffn_down"]) < 0.01
    assert trained["blk.3.attn_q"] - trained["blk.2.ffn_down"] > 0.1


def test_the_more_exact_a_measurement_the_further_it_is_followed(sixty):
    problem, name = problem_of(sixty, 2.4), "blk.2.attn_q"
    learnt = [corrections_of(problem, trial_of(problem, {name: 4.0}, {name: noise}), 0)[name] for noise in (0, 0.5, 2)]
    assert learnt[0] > 1.2 * learnt[1] > 1.2 * 1.2 * learnt[2] > 0


def test_what_one_sequence_says_may_be_off_by_all_of_it():
    samples = torch.tensor([[1.0, 3.0], [5.0, 5.0]], dtype=torch.float64)
    assert training._standard_error(samples).tolist() == pytest.approx([1.0, 0.0])
    assert training._standard_error(samples[:, :1]).tolist() == [1.0, 5.0]


def test_a_proposal_that_loses_more_than_the_estimates_is_not_taken(linears):
    problem = problem_of(linears, 2.4)
    model = Model(problem, {"blk.1.attn_q": 20.0})

    def worse_every_time(allocation: Allocation) -> Trial:
        trial = model.attempt(allocation)
        return replace(trial, divergence=float(len(model.tried)))

    assert allocate_by_gnn(problem, worse_every_time, 3, 30, 0).formats == by_hessian(problem)
    assert len(model.tried) == 3 and model.tried[0] != model.tried[1]


def test_no_trial_is_made_twice(linears):
    """Trials that confirm the estimates change nothing, and more of them are no use."""
    problem = problem_of(linears, 2.4)
    model = Model(problem)
    assert allocate_by_gnn(problem, model.attempt, 5, 0, 0).formats == by_hessian(problem)
    assert len(model.tried) == 1


def test_a_linear_that_the_loss_does_not_mind_at_all_is_no_error(linears):
    """The gradient at q and k is exactly zero where attention's output is projected by zeros."""
    unused = replace(linears[0], sensitivity=torch.zeros(48))
    problem = problem_of([unused, *linears[1:]], 2.5)
    allocation = by_gnn(problem)
    assert bits_of(allocation, linears) <= problem.budget
    assert set(allocation[unused.name]) <= {"b1", "b2"}


@pytest.mark.parametrize("formats, bits", [(("b2",), 2.25), (("b1", "b2"), 2.25), (ALL_FORMATS, 8.25)])
def test_the_network_copes_with_a_budget_that_leaves_no_choice(linears, formats, bits):
    problem = problem_of(linears, bits, formats)
    assert by_gnn(problem) == {linear.name: (formats[-1],) * linear.blocks for linear in linears}


# The graph and the network


def test_edges_join_the_columns_that_compensate_for_one_another():
    upper = torch.diag(torch.tensor([1.0, 2.0, 4.0, 1.0]))
    upper[0, 1], upper[0, 2], upper[1, 3], upper[2, 3] = -0.5, 0.1, 1.2, 0.2
    # Relative to sqrt(U_ii U_jj): 0-1 0.354, 0-2 0.05, 1-3 0.849, 2-3 0.1, all others 0.
    edge_index, edge_weight = strongest_edges(upper, 2)
    found = {(int(s), int(t)): float(w) for (s, t), w in zip(edge_index.t(), edge_weight, strict=True)}
    strengths = {(1, 0): 0.5 / 2**0.5, (2, 0): 0.05, (3, 1): 1.2 / 2**0.5, (0, 1): 0.5 / 2**0.5}
    strengths |= {(3, 2): 0.1, (0, 2): 0.05, (1, 3): 1.2 / 2**0.5, (2, 3): 0.1}
    assert found == pytest.approx({edge: s / (1 + s) for edge, s in strengths.items()}, abs=1e-6)


def test_linears_of_one_group_share_edges_and_stay_apart(linears):
    graph = build_graphs(problem_of(linears, 2.5))
    columns = [linear.weight.shape[1] for linear in linears]
    assert graph.features.shape == (sum(columns), FEATURES + 3)  # q, k and down
    assert torch.isfinite(graph.features).all()
    linear_of_node = torch.repeat_interleave(torch.arange(len(linears)), torch.tensor(columns))
    (target, source), _ = to_edge_index(graph.adjacency)
    assert torch.equal(linear_of_node[source], linear_of_node[target])
    first, second = (torch.stack([source, target])[:, linear_of_node[target] == i] for i in (0, 1))
    assert torch.equal(first, second - 256)
    assert graph.tensor_of_unit.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4
    per_unit = torch.bincount(graph.unit_of_node).tolist()
    assert per_unit == [64] * 4 + [64] * 4 + [64, 64, 64, 8] + [64] * 4 + [64, 64, 64, 8]


def test_tensors_are_joined_within_a_layer_and_to_their_likes_in_the_next(linears):
    edges = {tuple(edge) for edge in build_graphs(problem_of(linears, 2.5)).tensor_edges.t().tolist()}
    one_way = {(0, 1), (0, 2), (1, 2), (3, 4), (0, 3), (2, 4)}
    assert edges == one_way | {(b, a) for a, b in one_way}


def test_one_network_runs_on_models_of_any_size():
    torch.manual_seed(0)
    network = AllocatorNetwork(FEATURES + 1, 5)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for columns in (64, 200, 640):
        linears = [random_linear(f"blk.{i}.x", i, 8, columns, i) for i in range(2)]
        graph = build_graphs(problem_of(linears, 2.5))
        units = len(graph.tensor_of_unit)
        log_costs = torch.randn(units, 5, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            corrections = network(graph, log_costs)
        assert corrections.shape == (units,)
        assert torch.isfinite(corrections).all() and corrections.std() > 0


def test_features_do_not_depend_on_the_scale_of_weights_and_activations():
    linear = random_linear("blk.0.x", 0, 32, 192, 7)
    inputs = linear.inputs
    quieter = {name: getattr(inputs, name) / 50**2 for name in ("received", "passed_on")}
    louder = replace(
        linear, unordered=1000 * linear.unordered, inputs=replace(inputs, diagonal=inputs.diagonal / 50, **quieter)
    )
    assert torch.allclose(
        build_graphs(problem_of([linear], 2.5)).features, build_graphs(problem_of([louder], 2.5)).features, atol=1e-4
    )


def test_a_decision_says_what_each_linear_costs_and_what_bits_would_change(linears):
    problem = problem_of(linears, 2.4)
    costs, factors = problem.costs(), {"blk.0.ffn_down": 9.0}
    for decision in (allocate_by_hessian(problem), allocate_by_gnn(problem, Model(problem, factors).attempt, 4, 60, 0)):
        assert set(decision.losses) == {linear.name for linear in linears}
        for losses in decision.losses.values():
            assert losses["with_most_bits"] <= losses["decisive"] <= losses["with_fewest_bits"]
    learnt = allocate_by_gnn(problem, Model(problem, factors).attempt, 4, 60, 0)
    assert learnt.divergences and min(learnt.divergences) == Model(problem, factors).loss(learnt.formats)
    assert learnt.losses["blk.0.ffn_down"]["measured"] > 0
    total = sum(losses["estimated"] for losses in allocate_by_hessian(problem).losses.values())
    choice = cheapest_within(costs, problem.sizes(), problem.budget)
    assert total == pytest.approx(float(costs.gather(1, choice[:, None]).sum()))
    assert not allocate_uniformly(problem).losses
