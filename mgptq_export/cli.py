"""The command ``mgptq-export``: thin shells over importable functions."""

import json
import logging
import math
import shlex
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mgptq_export import reporting
from mgptq_export.launch import launched
from mgptq_export.memory_errors import typed_memory_errors
from mgptq_export.recipe import ALLOCATORS, FAST, MIXED, Recipe
from mgptq_export.sizes import format_size, parse_size
from mgptq_runtime.errors import MgptqError
from mgptq_runtime.formats import GGML_FORMATS
from mgptq_runtime.messages import error_line, printable, replace_unprintable_output
from mgptq_runtime.signals import exit_at_once, exit_on_signals, ignore_signals

__all__ = ["cli", "main"]

logger = logging.getLogger(__name__)

TARGET_NAMES = ("container", "onnx", "llama.cpp")
# What processes that torchrun started can do together.
SHARED_COMMANDS = ("run", "quantize")


def _split(context: click.Context, parameter: click.Parameter, value: str) -> list[str]:
    names = [name.strip() for name in value.split(",") if name.strip()]
    unknown = [name for name in names if name not in TARGET_NAMES]
    if unknown or not names:
        raise click.BadParameter(f"{', '.join(unknown) or 'nothing'} given; choose from {', '.join(TARGET_NAMES)}")
    return list(dict.fromkeys(names))


def _types(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip().lower() for name in value.split(",") if name.strip()))


def _bytes(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    try:
        return None if value is None else parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _recipe(targets: list[str], bits: float | None, size: int | None, fast: bool = False, **others: Any) -> Recipe:
    if bits is not None and size is not None:
        raise click.UsageError("--bits and --size exclude each other: bits are what a size has room for; give one")
    if _is_given("recovery_steps") and _is_given("recovery_minutes"):
        raise click.UsageError("--recovery-steps and --recover exclude each other: minutes stand for steps; give one")
    if fast:  # what was asked for by name stays
        others |= {name: value for name, value in FAST.items() if not _is_given(name)}
    others["embedding_format"] = others["embedding_format"] or Recipe.default_embedding_format(size)
    recipe = Recipe(bits=Recipe.bits if bits is None else bits, size=size, **others)
    _warn_of_options_without_effect(recipe, targets)
    return recipe


def _is_given(name: str) -> bool:
    """Whether the user wrote this option of the command."""
    return click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE


def _warn_of_options_without_effect(recipe: Recipe, targets: list[str]) -> None:
    for name, is_without_effect, reason in (
        ("own_samples", recipe.calibration == "self", "with --calibration self all --samples are the model's own"),
        ("trials", recipe.allocator != "gnn", f"the {recipe.allocator} allocator makes none"),
        ("ggml_types", "llama.cpp" not in targets, "they are llama.cpp's, which is not among --targets"),
    ):
        if is_without_effect and _is_given(name):
            logger.warning("--%s has no effect: %s", name.replace("_", "-"), reason)


def _finite(context: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} given; give a number such as {Recipe.bits}")
    return value


def _budgets(context: click.Context, parameter: click.Parameter, value: str) -> list[float]:
    try:
        budgets = [float(part) for part in value.split(",") if part.strip()]
    except ValueError as error:
        raise click.BadParameter(f"{error}; give numbers such as 2.25,2.5,3") from error
    if not budgets or not all(map(math.isfinite, budgets)):
        raise click.BadParameter(f"{value or 'nothing'} given; give numbers such as 2.25,2.5,3")
    return budgets


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def _count(name: str, least: int, text: str) -> Callable[[Any], Any]:
    """An option for a whole number of the recipe, its default being the recipe's."""
    default = getattr(Recipe, name.removeprefix("--").replace("-", "_"))
    return click.option(name, type=click.IntRange(least), default=default, show_default=True, help=text)


def _reporting(function: Callable[..., None]) -> Callable[..., None]:
    """The options that say what a command tells while it works; they go next to the function."""

    @click.option("-v", "--verbose", is_flag=True, help="Log what happens inside, on stderr.")
    @click.option("-q", "--quiet", is_flag=True, help="Nothing on stderr but warnings and errors.")
    @click.option(
        "--log-file",
        type=click.Path(path_type=Path),
        help="Append everything that happens, with the time, to this file; with --quiet, too.",
    )
    @wraps(function)
    def command(*arguments: Any, verbose: bool, quiet: bool, log_file: Path | None, **options: Any) -> None:
        context = click.get_current_context()
        inherited: dict[str, Any] = context.parent.params if context.parent else {}
        _check_outside(log_file or inherited.get("log_file"), options)
        is_first = launched().rank == 0
        if log_file and is_first:
            context.with_resource(reporting.logged_to(log_file))
        if verbose and is_first and not inherited.get("verbose"):
            context.with_resource(reporting.verbose())
        if quiet or not is_first:
            context.with_resource(reporting.quiet())
        function(*arguments, **options)

    return command


def _check_outside(log_file: Path | None, options: dict[str, Any]) -> None:
    """A log in a package would be listed in its manifest, and replaced with it."""
    for folder in map(options.get, ("out", "package", "a", "b")):
        if log_file and folder and log_file.resolve().is_relative_to(folder.resolve()):
            raise click.UsageError(f"log file {log_file} lies in {folder}, which is a package; put it elsewhere")


OUT = click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder of the package.")
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace OUT, once the new package is complete.")
RESUME = click.option(
    "--resume",
    is_flag=True,
    help="Go on where a run with the same options was stopped. To start anew instead, --overwrite.",
)
TARGETS = click.option(
    "--targets", default="container,onnx", show_default=True, callback=_split, help="Comma-separated targets."
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else.")
DEVICE = click.option("--device", default="cpu", show_default=True, help="Torch device, such as cpu or cuda.")
THREADS = click.option("--threads", type=click.IntRange(1, 256), help="CPU threads. [default: all cores]")


def _max_memory(text: str) -> Callable[[Any], Any]:
    return click.option("--max-memory", callback=_bytes, help=f"Such as 8GB. {text} [default: 80 % of what is free]")


MAX_MEMORY = _max_memory(
    "Where a model does not fit several times, weights and hidden states lie in files beside OUT; where it is low, "
    "fewer tokens go through the model at once. Under torchrun, of each process."
)
TRUST = click.option("--trust-remote-code", is_flag=True, help="Run code that the model's folder brings.")
JOB_OPTIONS = ("device", "overwrite", "resume", "max_memory", "trust_remote_code")


def _job(function: Callable[..., None]) -> Callable[..., None]:
    """The options that say how a model is worked on, whatever becomes of it; the function takes them as ``job``."""

    @_options(DEVICE, THREADS, OVERWRITE, RESUME, MAX_MEMORY, TRUST)
    @wraps(function)
    def command(*arguments: Any, threads: int | None, **options: Any) -> None:
        _set_threads(threads)
        job = {name: options.pop(name) for name in JOB_OPTIONS}
        function(*arguments, job=job, **options)

    return command


EMBEDDING_FORMATS = ("b3", "b4", "b8")
EMBEDDING_FORMAT = click.option(
    "--embedding-format",
    type=click.Choice([*EMBEDDING_FORMATS, MIXED]),
    help="Of embedding and head. mixed: their blocks share the budget of --size with those of all linears; for "
    f"llama.cpp as b4. [default: {Recipe.embedding_format}; with --size {Recipe.default_embedding_format(1)}]",
)
GGML_TYPES = click.option(
    "--ggml-types",
    default="",
    callback=_types,
    help=f"Comma-separated tensor types for llama.cpp, of {', '.join(GGML_FORMATS)}. [default: what suits the model]",
)
TEXT = _options(
    click.option("--window", type=click.IntRange(2), default=512, show_default=True, help="Tokens per window."),
    click.option("--windows", type=click.IntRange(1), default=30, show_default=True, help="Windows to score."),
)
BUDGET = _options(
    click.option(
        "--bits",
        type=float,
        callback=_finite,
        help=f"Stored bits per linear weight, all overheads counted. [default: {Recipe.bits}]",
    ),
    click.option(
        "--size",
        callback=_bytes,
        help="Instead of --bits: what the model file of every target may take, everything in it counted, such as 50MB, "
        "48MiB or a number of bytes. Of ONNX that is model.onnx and model.onnx.data.",
    ),
)
FAST_OPTIONS = ", ".join(f"--{name.replace('_', '-')} {FAST[name]:g}" for name in FAST if name != "training_steps")
METHOD = _options(
    click.option(
        "--allocator",
        type=click.Choice(ALLOCATORS),
        default=Recipe.allocator,
        show_default=True,
        help="Who gets which bits: gnn learns from trials of the whole model; hessian goes by estimates, and is "
        "quicker; uniform gives all the same.",
    ),
    click.option(
        "--calibration",
        default=Recipe.calibration,
        show_default=True,
        help="'self' (sampled from the model), a .txt or .jsonl file, or a hub data set OWNER/NAME: column text of "
        "split train in its default configuration, the first 1000 documents.",
    ),
    _count("--samples", 1, "Calibration sequences."),
    _count("--own-samples", 0, "Calibration sequences that the model writes itself, beside those of a text."),
    _count("--sequence-length", 2, "Tokens per calibration sequence."),
    click.option("--seed", type=int, default=Recipe.seed, show_default=True, help="Of everything random."),
    GGML_TYPES,
    _count(
        "--trials",
        1,
        "Quantizations of the whole model that the gnn allocator compares, and learns from; with 1 it is hessian.",
    ),
    click.option(
        "--drift-correction",
        type=click.FloatRange(0, 1),
        default=Recipe.drift_correction,
        show_default=True,
        help="Share of what quantized layers have changed that the linears after them make up for.",
    ),
    _count("--descent-sweeps", 0, "How often codes and scales are chosen again when all are known; 4 settle most."),
    _count(
        "--recovery-steps",
        0,
        "Steps of end-to-end training of scales and norms on the calibration text; 0 leaves it out.",
    ),
    click.option(
        "--recover",
        "recovery_minutes",
        type=click.FloatRange(0, min_open=True),
        metavar="MINUTES",
        help="Train that long instead, for each layout of weights; the package records the steps taken.",
    ),
    click.option("--fast", is_flag=True, help=f"For a first look: {FAST_OPTIONS}, where they are not given."),
)
RECIPE = _options(BUDGET, METHOD, EMBEDDING_FORMAT)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mgptq-export")
@_reporting
def cli() -> None:
    """Quantize language models below 3 bits, export them to edge devices, and prove the result there.

    MODEL is a Hugging Face folder or hub id (OWNER/NAME or OWNER/NAME@REVISION), or a GGUF file. PACKAGE is a folder
    written by 'run' or 'quantize'.
    """
    context, launch = click.get_current_context(), launched()
    if launch.size > 1 and context.invoked_subcommand not in SHARED_COMMANDS:
        raise click.UsageError(
            f"torchrun started {launch.size} processes, {context.invoked_subcommand} is for one; commands that several "
            f"share: {', '.join(SHARED_COMMANDS)}"
        )
    reporting.log_to_stderr(logging.ERROR if launch.rank else logging.WARNING)


@cli.command()
@click.argument("model")
@OUT
@RECIPE
@TARGETS
@click.option("--evaluate", "text", type=click.Path(path_type=Path), help="Text file to compare with the original on.")
@TEXT
@_job
@JSON
@_reporting
def run(
    model: str,
    out: Path,
    targets: list[str],
    text: Path | None,
    window: int,
    windows: int,
    job: dict[str, Any],
    as_json: bool,
    **recipe: Any,
) -> None:
    """Quantize MODEL and export it: everything in one go. Exit code 1 where the result fails its own check.

    Processes that torchrun starts ('torchrun --nproc-per-node 4 -m mgptq_export run ...') share the work.
    """
    with exit_at_once():
        from mgptq_export import pipeline

    manifest = pipeline.run(
        model,
        out,
        _recipe(targets, **recipe),
        targets,
        text=pipeline.EvaluationText(text, window, windows) if text else None,
        **job,
    )
    _print_manifest(manifest, out, as_json)
    _exit_if_failed(manifest)


@cli.command()
@click.argument("model")
@OUT
@RECIPE
@TARGETS
@_job
@JSON
@_reporting
def quantize(
    model: str,
    out: Path,
    targets: list[str],
    job: dict[str, Any],
    as_json: bool,
    **recipe: Any,
) -> None:
    """Quantize MODEL for the targets without writing them; 'export' does.

    Processes that torchrun starts share the work, as with 'run'.
    """
    with exit_at_once():
        from mgptq_export import pipeline

    manifest = pipeline.run(
        model,
        out,
        _recipe(targets, **recipe),
        targets,
        export_targets=False,
        **job,
    )
    _print_manifest(manifest, out, as_json)


@cli.command()
@click.argument("model")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder of the packages and of sweep.json."
)
@click.option(
    "--bits",
    "budgets",
    default="2.25,2.5,3,4",
    show_default=True,
    callback=_budgets,
    help="Comma-separated budgets of stored bits per linear weight, all overheads counted.",
)
@click.option("--evaluate", "text", type=click.Path(path_type=Path), required=True, help="Text file to score all on.")
@click.option(
    "--against",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE.gguf",
    help="Another program's quantization of MODEL to score, too. May be repeated.",
)
@METHOD
@click.option(
    "--embedding-format",
    type=click.Choice(EMBEDDING_FORMATS),
    default=Recipe.embedding_format,
    show_default=True,
    help="Of embedding and head.",
)
@click.option(
    "--targets", default="container", show_default=True, callback=_split, help="Comma-separated targets to write."
)
@TEXT
@_job
@JSON
@_reporting
def sweep(
    model: str,
    out: Path,
    budgets: list[float],
    targets: list[str],
    text: Path,
    window: int,
    windows: int,
    against: tuple[Path, ...],
    job: dict[str, Any],
    as_json: bool,
    **recipe: Any,
) -> None:
    """Quantize MODEL at several budgets, and show perplexity against file size.

    OUT/2.25 and so on become packages as 'run' makes them, OUT/sweep.json the table. The model is calibrated and the
    original scored once; allocation, solving and recovery are done for every budget. Scored are the weights, by
    PyTorch; what backends compute is checked, and scored by 'eval'. --resume takes other --bits and --against, too.
    Exit code 1 where a package fails its check.
    """
    with exit_at_once():
        from mgptq_export import pipeline
        from mgptq_export.sweep import sweep as sweep_model

    swept = sweep_model(
        model,
        out,
        _recipe(targets, None, None, **recipe),
        budgets,
        targets,
        pipeline.EvaluationText(text, window, windows),
        against=against,
        **job,
    )
    if as_json:
        click.echo(json.dumps(swept))
    else:
        _print_sweep(swept)
    if any(row["check"] == "failed" for row in swept["rows"]):
        sys.exit(1)


@cli.command()
@click.argument("package", type=click.Path(path_type=Path))
@TARGETS
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Write a new package. [default: extend PACKAGE]")
@OVERWRITE
@JSON
@_reporting
def export(package: Path, targets: list[str], out: Path | None, overwrite: bool, as_json: bool) -> None:
    """Export the quantized checkpoint of PACKAGE to targets. Exit code 1 where the result fails its own check."""
    with exit_at_once():
        from mgptq_export import pipeline

    manifest = pipeline.export(package, targets, out, overwrite=overwrite)
    _print_manifest(manifest, out or package, as_json)
    _exit_if_failed(manifest)


@cli.command("eval")
@click.argument("package", type=click.Path(path_type=Path))
@click.option("--model", required=True, help="The original model to compare with.")
@click.option("--text", type=click.Path(path_type=Path), required=True, help="A .txt or .jsonl file.")
@TEXT
@DEVICE
@THREADS
@_max_memory("Where the models do not fit, their weights lie in files beside PACKAGE.")
@TRUST
@JSON
@_reporting
def evaluate(
    package: Path,
    model: str,
    text: Path,
    window: int,
    windows: int,
    device: str,
    threads: int | None,
    max_memory: int | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Compare PACKAGE with the original model: the quantized weights in PyTorch, container and ONNX as they run.

    llama.cpp's file is scored by its weights.
    """
    with exit_at_once():
        from mgptq_export import pipeline

    _set_threads(threads)
    evaluation = pipeline.evaluate_package(
        package,
        model,
        pipeline.EvaluationText(text, window, windows),
        device=device,
        max_memory=max_memory,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        click.echo(json.dumps(evaluation))
    else:
        Console().print(_evaluation_table(evaluation))


@cli.command()
@click.argument("package", type=click.Path(path_type=Path))
@JSON
def inspect(package: Path, as_json: bool) -> None:
    """Show what PACKAGE holds and which linears got which bits."""
    with exit_at_once():
        from mgptq_export.inspection import inspect_package

    found = inspect_package(package)
    if as_json:
        click.echo(json.dumps(found))
        return
    _print_manifest(found["manifest"], package, False)
    for name, layout in found["layouts"].items():
        table = Table("linear", "stored bits", *layout["formats"], title=f"Weights by format, {name} layout")
        for kind, row in layout["kinds"].items():
            total = sum(row["weights_by_format"].values())
            shares = (f"{row['weights_by_format'].get(fmt, 0) / total:.1%}" for fmt in layout["formats"])
            table.add_row(kind, f"{row['bits_stored']:.3f}", *shares)
        Console().print(table)


@cli.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--text", type=click.Path(path_type=Path), help="Text file to measure the perplexity of both on.")
@TEXT
@click.option(
    "--prompt", "prompts", multiple=True, help="Text that both continue; repeatable. [default: three short ones]"
)
@click.option(
    "--tokens",
    type=click.IntRange(0),
    default=48,
    show_default=True,
    help="Tokens to continue each prompt by, at most; 0 leaves it out.",
)
@THREADS
@JSON
@_reporting
def compare(
    a: Path,
    b: Path,
    text: Path | None,
    window: int,
    windows: int,
    prompts: tuple[str, ...],
    tokens: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Show two packages side by side: sizes, recipes, allocations, quality, and the first token that differs.

    Perplexity and texts are computed as on the device: on ONNX Runtime where A and B have it, else on NumPy. What
    cannot be compared is named with its reason, and everything else is compared.
    """
    with exit_at_once():
        from mgptq_export import comparison, pipeline
        from mgptq_export.comparison_tables import comparison_tables

    _set_threads(threads)
    found = comparison.compare_packages(
        a,
        b,
        text=pipeline.EvaluationText(text, window, windows) if text else None,
        prompts=prompts or comparison.PROMPTS,
        tokens=tokens,
    )
    if as_json:
        click.echo(json.dumps(found))
        return
    console = Console(highlight=False)
    for part in comparison_tables(found):
        console.print(part)


@cli.command()
@click.argument("package", type=click.Path(path_type=Path))
@JSON
def verify(package: Path, as_json: bool) -> None:
    """Compare the files of PACKAGE with what its manifest says of them. Exit code 1 where they differ."""
    with exit_at_once():
        from mgptq_export import manifest

    differences = manifest.verify(package)
    if as_json:
        click.echo(json.dumps({"passed": not differences, "differences": differences}))
    else:
        for one in differences:
            click.echo(printable(f"{one['path']} {one['problem']}"))
        count = f"{len(differences)} difference{'s' * (len(differences) > 1)}"
        click.echo(count if differences else "all files are as the manifest says")
    if differences:
        sys.exit(1)


@cli.command()
@click.argument("package", type=click.Path(path_type=Path))
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="Where the repository is new, only you see it.")
@JSON
@_reporting
def push(package: Path, repository: str, private: bool, as_json: bool) -> None:
    """Upload PACKAGE to the Hugging Face hub; log in first with 'hf auth login'."""
    with exit_at_once():
        from mgptq_export import hub

    address = hub.push(package, repository, private=private)
    click.echo(json.dumps({"url": address}) if as_json else address)


@cli.command()
@click.argument("model")
@BUDGET
@EMBEDDING_FORMAT
@click.option("--targets", default=",".join(TARGET_NAMES), show_default=True, callback=_split, help="Targets to plan.")
@GGML_TYPES
@TRUST
@JSON
@_reporting
def plan(
    model: str,
    targets: list[str],
    trust_remote_code: bool,
    as_json: bool,
    **recipe: Any,
) -> None:
    """Say what MODEL would become at --bits or in --size, and which targets reach it, without running anything.

    Exit code 1 where no target reaches the --bits or the --size that are given.
    """
    with exit_at_once():
        from mgptq_export.planning import check_reachable, plan_model

    planned = plan_model(model, _recipe(targets, **recipe), targets, trust_remote_code=trust_remote_code)
    if as_json:
        click.echo(json.dumps(planned))
    else:
        _print_plan(planned)
    if recipe["bits"] is not None or recipe["size"] is not None:
        check_reachable(planned)


def _print_plan(planned: dict[str, Any]) -> None:
    size = planned["size"]
    budget = f"at {planned['bits']:g} bits" if size is None else f"in {format_size(size)}"
    table = Table("target", "bits it can reach", budget, title=f"{planned['name']} ({planned['family']})")
    for name, target in planned["targets"].items():
        reach = "none"
        if "lowest_bits" in target:
            reach = f"{math.ceil(target['lowest_bits'] * 100) / 100:.2f} to {target['highest_bits']:.2f}"
        table.add_row(name, reach, _planned_size(target, size))
    console = Console(highlight=False)
    console.print(table)
    for name, target in planned["targets"].items():
        for line in _kind_lines(name, target.get("kinds", {})):
            console.print(line, markup=False)


def _planned_size(target: dict[str, Any], size: int | None) -> str:
    if not target["reachable"]:
        return f"not reachable: {escape(target['reason'])}"
    if size is not None:
        shared = " with the embedding" if target["embedding_format"] == MIXED else ""
        return f"{target['bits']:g} bits{shared}, at most {format_size(target['model_bytes'])}"
    about = "" if all(file["exact"] for file in target["files"]) else "about "
    return f"{about}{target['file_bytes'] / 1e6:.1f} MB"


def _kind_lines(target: str, kinds: dict[str, Any]) -> Iterator[str]:
    """What linears of one row length can have, where that is not everything: a line for each reason."""
    alike: dict[int, list[str]] = {}
    for kind, row in kinds.items():
        if row["excluded"]:
            alike.setdefault(row["columns"], []).append(kind)
    for columns, members in alike.items():
        row = kinds[members[0]]
        yield f"{target}: rows of {columns} ({', '.join(members)})"
        yield f"  take {', '.join(row['formats'])}"
        reasons: dict[str, list[str]] = {}
        for fmt, reason in row["excluded"].items():
            reasons.setdefault(reason, []).append(fmt)
        for reason, formats in reasons.items():
            yield f"  not {', '.join(formats)}: {reason}"


def _print_sweep(swept: dict[str, Any]) -> None:
    evaluation = swept["evaluation"]
    measured = f"{evaluation['text']}, {evaluation['windows']} windows of {evaluation['window']} tokens"
    table = Table("", title=f"{escape(swept['name'])} on {escape(measured)}")
    table.add_column("", overflow="fold")
    for column in ("stored bits", "MB", "perplexity", "KL", "top-1", "minutes"):
        table.add_column(column, no_wrap=True)
    for row in swept["rows"]:
        several = row["layout"] and len(swept["targets"]) > 1
        failed = ", check FAILED" if row["check"] == "failed" else ""
        table.add_row(
            "*" if row["pareto"] else "",
            escape(row["name"]) + (f" {', '.join(row['file_bytes'])}" if several else "") + failed,
            f"{row['stored_bits']:.4f}",
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['perplexity']:.3f}",
            f"{row['kl_divergence']:.4f}",
            f"{row['top1_agreement']:.2%}",
            "" if row["seconds"] is None else f"{row['seconds'] / 60:.1f}",
        )
    console = Console()
    console.print(table)
    console.print("* on the Pareto front: no other row is as small and has as low a perplexity", highlight=False)
    console.print("KL: divergence from the original in nats per token; top-1: agreement with it")


def _set_threads(threads: int | None) -> None:
    if threads:
        with exit_at_once():
            import torch

        torch.set_num_threads(threads)


def _print_manifest(manifest: dict[str, Any], out: Path, as_json: bool) -> None:
    if not manifest:  # the first rank prints it
        return
    if as_json:
        click.echo(json.dumps(manifest))
        return
    from mgptq_export.report.facts import mended  # imports torch

    console = Console()
    table = Table("file", "MB", title=escape(printable(f"{manifest['name']} in {out}")))
    for file in manifest["files"]:
        table.add_row(escape(printable(file["path"])), f"{file['bytes'] / 1e6:.2f}")
    console.print(table)
    size = manifest.get("size", {}).get("requested")
    for name, layout in manifest["layouts"].items():
        stored, asked = layout["bits"]["stored"], layout["bits"]["requested"]
        budget = f"asked {asked}" if size is None else f"{asked} fit in {format_size(size)}"
        console.print(f"stored bits per weight, {name} layout: {stored:.4f} ({budget})")
        if repairs := layout.get("repairs"):
            console.print(f"  mended, see manifest.json: {', '.join(mended(repairs))}")
    if manifest.get("evaluation"):
        console.print(_evaluation_table(manifest["evaluation"]))
    results = manifest.get("check", {}).get("results", {})
    for name, result in results.items():
        console.print(
            f"check on {name} when it was made: {'passed' if result['passed'] else 'FAILED, see manifest.json'}"
        )
    if any(file["path"] == "report.html" for file in manifest["files"]):
        console.print(f"open {out / 'report.html'} to look at it", soft_wrap=True, markup=False)
    if results:
        console.print(f"prove it on a device: mgptq-run check {shlex.quote(str(out))}", soft_wrap=True, markup=False)


def _exit_if_failed(manifest: dict[str, Any]) -> None:
    """What failed has been told as a warning; the package stays, to be looked at."""
    if manifest and not all(result["passed"] for result in manifest["check"]["results"].values()):
        sys.exit(1)


def _evaluation_table(evaluation: dict[str, Any]) -> Table:
    title = f"{evaluation['text']}, {evaluation['windows']} windows of {evaluation['window']} tokens"
    table = Table("", "perplexity", "KL divergence", "top-1 agreement", title=escape(printable(title)))
    for name, quality in evaluation["results"].items():
        table.add_row(
            escape(printable(name)),
            f"{quality['perplexity']:.3f}",
            f"{quality['kl_divergence']:.4f}",
            f"{quality['top1_agreement']:.2%}",
        )
    return table


def main() -> None:
    """Entry point: errors that a user can meet end with one message and exit code 1."""
    exit_on_signals()
    replace_unprintable_output()
    try:
        with typed_memory_errors(resumable=False):
            cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (MgptqError, OSError) as error:  # OSError: standard output that is full or gone
        rank = launched().rank
        click.echo(error_line(error, f" on rank {rank}" if rank else ""), err=True)
        sys.exit(1)
    finally:
        ignore_signals()
