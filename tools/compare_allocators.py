"""What the allocator network gains over the estimates that it starts from, over seeds.

    python tools/compare_allocators.py --calibration c4-calibration.jsonl \
        --text WikiText-2=wikitext2-test.txt --text C4=c4-evaluation.jsonl -o allocators

``gnn`` tries assignments and takes the solution that lost least on text held out; the first has ``hessian``'s
assignment. Here every trial's model is scored on other texts, too. Trials are those of the recipe, on less text,
without sweeps and without recovery, so that a seed takes minutes and not hours; for the recipe as a whole see
ablation.py. Writes OUT.json after every seed and bits, and skips those that it holds already; OUT.md is the table.
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
    perplexity_of,
    read_results,
    settings_of,
    spread,
    write_results,
)
from demo import smollm2_file

from mgptq_export.allocation import Trial
from mgptq_export.layouts import COLUMNS, Allocated
from mgptq_export.quantize import try_allocation

Trials = list[dict[str, Any]]
"""In the order that they were made: ``divergence`` on text held out, and ``perplexity`` by text."""


def trials_of(bench: Bench, bits: float, seed: int, samples: int, trials: int) -> Trials:
    """Let the network make its trials, and score each."""
    less = {"samples": samples, "own_samples": 0, "descent_sweeps": 0, "recovery_steps": 0}
    recipe = replace(bench.recipe, bits=bits, seed=seed, trials=trials, **less)
    calibration = bench.calibration(recipe)
    made: Trials = []

    def attempt(allocated: Allocated) -> Trial:
        trial, quantized = try_allocation(bench.source, calibration, recipe, COLUMNS, allocated)
        scores = {name: perplexity_of(quantized.model, text, name) for name, text in bench.windows.items()}
        made.append({"divergence": trial.divergence, "perplexity": scores})
        print(f"{bits} bits, seed {seed}: {json.dumps(made[-1])}", file=sys.stderr, flush=True)
        return trial

    COLUMNS.allocate(bench.source, calibration, recipe, attempt)
    return made


def table(results: Mapping[str, Any], texts: Sequence[str]) -> str:
    """Markdown: means over seeds with their spread, and what ``gnn`` has over ``hessian`` with the same seed."""
    lines = [
        "| stored bits | seeds | text | hessian | gnn | gnn / hessian | second trial / hessian |",
        "|---|---|---|---|---|---|---|",
    ]
    by_bits: dict[float, list[Trials]] = {}
    for result in results.values():
        by_bits.setdefault(result["bits"], []).append(result["trials"])
    for bits, seeds in by_bits.items():
        for text in texts:
            tried = [[trial["perplexity"][text] for trial in trials] for trials in seeds]
            best = [min(trials, key=lambda trial: trial["divergence"])["perplexity"][text] for trials in seeds]
            first = [scores[0] for scores in tried]
            columns = [spread(first, 2), spread(best, 2), _ratios(best, first)]
            columns.append(_ratios([scores[min(1, len(scores) - 1)] for scores in tried], first))
            lines.append(f"| {bits} | {len(seeds)} | {text} | " + " | ".join(columns) + " |")
    return "\n".join(lines) + "\n"


def _ratios(values: Sequence[float], yardsticks: Sequence[float]) -> str:
    return spread([value / yardstick for value, yardstick in zip(values, yardsticks, strict=True)], 3)


@click.command()
@measured_over_seeds
@click.option("--samples", default=64, show_default=True, help="Calibration sequences, an eighth of them held out.")
@click.option("--trials", default=2, show_default=True, help="Assignments that are tried.")
def main(
    model: str | None,
    calibration: str,
    texts: dict[str, Path],
    windows: int,
    samples: int,
    trials: int,
    seeds: int,
    out: Path,
) -> None:
    """Measure what the allocator network gains, and write one table."""
    model = model or str(smollm2_file())
    settings = settings_of(model, calibration, texts, windows) | {"samples": samples, "trials": trials}
    results_file = out.with_name(f"{out.name}.json")
    results = read_results(results_file, settings)
    bench = Bench(model, calibration, texts, windows)
    for seed in range(seeds):
        for bits in STORED_BITS:
            key = f"{bits}/{seed}"
            if key not in results:
                made = trials_of(bench, bits, seed, samples, trials)
                results[key] = {"bits": bits, "seed": seed, "trials": made}
                write_results(results_file, settings, results)
                out.with_name(f"{out.name}.md").write_text(table(results, list(texts)), encoding="utf-8")
    print(table(results, list(texts)))


if __name__ == "__main__":
    main()
