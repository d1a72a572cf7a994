"""What the allocator network gains over the estimates that it starts from, over seeds.

    python tools/compare_allocators.py --calibration c4-calibration.jsonl \
        --text WikiText-2=wikitext2-test.txt --text C4=c4-evaluation.jsonl -o allocators

``gnn`` tries assignments and takes the solution that lost least on text held out; the first has ``hessian``'s
assignment. Here every trial's model is scored on other texts, too. Trials are those of the recipe, on less text and
without sweeps, so that a seed takes minutes and not hours; for the recipe as a whole see ablation.py. With
--recovery-steps both models are recovered and scored again. Writes OUT.json after every seed and bits, and skips those
that it holds already; OUT.md is the table.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from ablation import (
    STORED_BITS,
    Bench,
    measured_over_seeds,
    read_results,
    settings_of,
    spread,
    write_results,
)
from demo import smollm2_file

from mgptq_export.allocation import Trial
from mgptq_export.layouts import COLUMNS, Allocated
from mgptq_export.quantize import try_allocation
from mgptq_export.recovery import recover

# What the recipe has and trials go without here.
WITHOUT = {"own_samples": 0, "descent_sweeps": 0, "recovery_steps": 0}

Trials = list[dict[str, Any]]
"""In the order that they were made: ``divergence`` on text held out, ``perplexity`` by text, and ``recovered``, the
same after recovery, where there was one."""


def trials_of(bench: Bench, bits: float, seed: int, samples: int, trials: int, recovery_steps: int = 0) -> Trials:
    """Let the network make its trials, and score each, after so many steps of recovery again."""
    recipe = replace(bench.recipe, bits=bits, seed=seed, samples=samples, trials=trials, **WITHOUT)
    calibration = bench.calibration(recipe)
    made: Trials = []

    def attempt(allocated: Allocated) -> Trial:
        trial, source, model = try_allocation(bench.source, calibration, recipe, COLUMNS, allocated)
        made.append({"divergence": trial.divergence, "perplexity": bench.perplexities(source)})
        if recovery_steps:
            recover(source, bench.source, model, calibration.text, steps=recovery_steps, seed=seed)
            made[-1]["recovered"] = bench.perplexities(source)
        print(f"{bits} bits, seed {seed}: {json.dumps(made[-1])}", file=sys.stderr, flush=True)
        return trial

    COLUMNS.allocate(bench.source, calibration, recipe, attempt)
    return made


def table(results: Mapping[str, Any], texts: Sequence[str]) -> str:
    """Markdown: means over seeds with their spread, and what ``gnn`` has over ``hessian`` with the same seed."""
    lines = [
        "| stored bits | steps of recovery | seeds | text | hessian | gnn | gnn / hessian | second trial / hessian |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[float, int], list[Trials]] = {}
    for result in results.values():
        groups.setdefault((result["bits"], 0), []).append(result["trials"])
        if steps := result["recovery_steps"]:
            groups.setdefault((result["bits"], steps), []).append(result["trials"])
    for (bits, steps), seeds in sorted(groups.items()):
        scored = "recovered" if steps else "perplexity"
        for text in texts:
            tried = [[trial[scored][text] for trial in trials] for trials in seeds]
            best = [min(trials, key=lambda trial: trial["divergence"])[scored][text] for trials in seeds]
            first = [scores[0] for scores in tried]
            columns = [spread(first, 2), spread(best, 2), _ratios(best, first)]
            columns.append(_ratios([scores[min(1, len(scores) - 1)] for scores in tried], first))
            lines.append(f"| {bits} | {steps} | {len(seeds)} | {text} | " + " | ".join(columns) + " |")
    return "\n".join(lines) + "\n"


def _ratios(values: Sequence[float], yardsticks: Sequence[float]) -> str:
    return spread([value / yardstick for value, yardstick in zip(values, yardsticks, strict=True)], 3)


@click.command()
@measured_over_seeds
@click.option("--samples", default=64, show_default=True, help="Calibration sequences, an eighth of them held out.")
@click.option("--trials", default=2, show_default=True, help="Assignments that are tried.")
@click.option("--recovery-steps", default=0, show_default=True, help="Recover every trial's model, too.")
def main(
    model: str | None,
    calibration: str,
    texts: dict[str, Path],
    windows: int,
    samples: int,
    trials: int,
    recovery_steps: int,
    seeds: int,
    only: tuple[int, ...],
    bits: tuple[float, ...],
    out: Path,
) -> None:
    """Measure what the allocator network gains, and write one table."""
    model = model or str(smollm2_file())
    settings = settings_of(model, calibration, texts, windows) | WITHOUT | {"samples": samples, "trials": trials}
    results_file = out.with_name(f"{out.name}.json")
    results = read_results(results_file, settings)
    bench = Bench(model, calibration, texts, windows)
    for seed in only or range(seeds):
        for stored in bits or STORED_BITS:
            key = f"{stored}/{seed}"
            if key not in results or results[key]["recovery_steps"] < recovery_steps:
                made = trials_of(bench, stored, seed, samples, trials, recovery_steps)
                results[key] = {"bits": stored, "seed": seed, "recovery_steps": recovery_steps, "trials": made}
                write_results(results_file, settings, results)
                out.with_name(f"{out.name}.md").write_text(table(results, list(texts)), encoding="utf-8")
    print(table(results, list(texts)))


if __name__ == "__main__":
    main()
