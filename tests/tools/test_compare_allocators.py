"""What the allocator network gains is told from trials as it makes them."""

from dataclasses import replace

from ablation import Bench
from compare_allocators import table, trials_of

from mgptq_export.layouts import COLUMNS
from mgptq_export.quantize import try_allocation


def test_the_first_trial_is_what_hessian_assigns(bench: Bench) -> None:
    trials = trials_of(bench, 2.6, seed=1, samples=8, trials=2)
    assert len(trials) == 2
    assert trials[0] != trials[1]
    less = {"samples": 8, "own_samples": 0, "descent_sweeps": 0, "recovery_steps": 0}
    recipe = replace(bench.recipe, bits=2.6, seed=1, allocator="hessian", **less)
    calibration = bench.calibration(recipe)
    allocated = COLUMNS.allocate(bench.source, calibration, recipe, lambda allocated: None)
    trial, _ = try_allocation(bench.source, calibration, recipe, COLUMNS, allocated)
    assert trial.divergence == trials[0]["divergence"]


def test_the_table_compares_with_the_same_seed() -> None:
    def trials(*figures: tuple[float, float]) -> dict:
        return {"bits": 2.5, "trials": [{"divergence": kl, "perplexity": {"A": score}} for kl, score in figures]}

    results = {"2.5/0": trials((1.0, 40.0), (0.9, 38.0)), "2.5/1": trials((1.0, 50.0), (1.1, 60.0))}
    assert "| 2.5 | 2 | A | 45.00 ± 7.07 | 44.00 ± 8.49 | 0.975 ± 0.035 | 1.075 ± 0.177 |" in table(results, ["A"])
