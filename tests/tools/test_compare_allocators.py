"""What the allocator network gains is told from trials as it makes them."""

from dataclasses import replace

from ablation import Bench
from compare_allocators import WITHOUT, table, trials_of

from mgptq_export.layouts import COLUMNS
from mgptq_export.quantize import try_allocation


def test_the_first_trial_is_what_hessian_assigns(bench: Bench) -> None:
    trials = trials_of(bench, 2.6, seed=1, samples=8, trials=2, recovery_steps=2)
    assert len(trials) == 2
    assert all(trial["recovered"]["text"] != trial["perplexity"]["text"] for trial in trials)
    assert trials[0] != trials[1]
    recipe = replace(bench.recipe, bits=2.6, seed=1, samples=8, allocator="hessian", **WITHOUT)
    calibration = bench.calibration(recipe)
    allocated = COLUMNS.allocate(bench.source, calibration, recipe, lambda allocated: None)
    trial, _, _ = try_allocation(bench.source, calibration, recipe, COLUMNS, allocated)
    assert trial.divergence == trials[0]["divergence"]


def test_the_table_compares_with_the_same_seed() -> None:
    def result(steps: int, *figures: tuple[float, float, float]) -> dict:
        trials = [
            {"divergence": kl, "perplexity": {"A": score}, "recovered": {"A": again}} for kl, score, again in figures
        ]
        return {"bits": 2.5, "recovery_steps": steps, "trials": trials}

    results = {
        "2.5/0": result(30, (1.0, 40.0, 30.0), (0.9, 38.0, 24.0)),
        "2.5/1": result(0, (1.0, 50.0, 0.0), (1.1, 60.0, 0.0)),
    }
    made = table(results, ["A"])
    assert "| 2.5 | 0 | 2 | A | 45.00 ± 7.07 | 44.00 ± 8.49 | 0.975 ± 0.035 | 1.075 ± 0.177 |" in made
    assert "| 2.5 | 30 | 1 | A | 30.00 | 24.00 | 0.800 | 0.800 |" in made
