"""From a model to a package: quantize, export, evaluate, and the manifest that tells it all."""

import hashlib
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mgptq_export.calibration import calibration_sha256, file_tokens
from mgptq_export.checkpoint import (
    pack_model,
    tokenizer_files,
    unpack_model,
)
from mgptq_export.compute import compute_dtype
from mgptq_export.distributed import ALONE, World, joined
from mgptq_export.evaluation import Scorer, evaluate, evaluation_windows, torch_scorer
from mgptq_export.history import History, layer_errors
from mgptq_export.journal import FORGETFUL, Journal, Record
from mgptq_export.launch import launched
from mgptq_export.layouts import LAYOUTS, Calibration, Layout
from mgptq_export.manifest import check_no_links, read_manifest, verify_files
from mgptq_export.memory import IN_MEMORY, memory_for
from mgptq_export.memory_errors import typed_memory_errors
from mgptq_export.memory_needs import needs_of
from mgptq_export.models import SourceModel, check_local, count_model_weights, load_quantized_weights, load_source
from mgptq_export.output import UnfinishedRun, new_folder, unfinished_run
from mgptq_export.packaging import complete, runs_on_backends, versions, write_targets
from mgptq_export.planning import bits_for_size
from mgptq_export.quantize import calibrate, check_budget, quantize
from mgptq_export.recipe import Recipe
from mgptq_export.recovery import recover
from mgptq_export.sizes import format_size
from mgptq_export.solved import Solved, read_solved, save_solved, top_folder
from mgptq_export.targets import TARGETS, target_named
from mgptq_export.texts import text_name, text_sha256
from mgptq_runtime.backends import Backend
from mgptq_runtime.errors import BadInputError
from mgptq_runtime.package import file_sha256, open_package
from mgptq_runtime.progress import stage, stages

__all__ = [
    "EvaluationText",
    "ScoredText",
    "check_tokenizer",
    "evaluate_package",
    "export",
    "identity",
    "layouts_of",
    "load_original",
    "make_package",
    "measure",
    "memory_errors_of",
    "package_stages",
    "run",
    "scored_text",
]

logger = logging.getLogger(__name__)

# What evaluations call the weights of each layout, computed by PyTorch.
CHECKPOINT_LABELS = {"columns": "checkpoint", "tensors": "llama.cpp_checkpoint"}
# Sequences of calibration text on which layers are compared with the original's.
MEASURED_SEQUENCES = 4


@dataclass(frozen=True)
class EvaluationText:
    """Text to measure perplexity on: a file, cut into the first ``windows`` windows of ``window`` tokens."""

    path: Path
    window: int = 512
    windows: int = 30


@dataclass(frozen=True)
class ScoredText:
    """What an evaluation scores, read once: a file may change, or go, before all is scored.

    Attributes:
        name: of the file.
        sha256: of the file, in hexadecimal.
        windows: its tokens, int64 [windows, window].
    """

    name: str
    sha256: str
    windows: torch.Tensor


def run(
    model: str,
    out: Path,
    recipe: Recipe,
    targets: Sequence[str],
    *,
    export_targets: bool = True,
    text: EvaluationText | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    resume: bool = False,
    max_memory: int | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Quantize a model, once for each layout of weights that the targets want, and export it.

    What is finished is on disk at once; a run that was stopped can be resumed, and gives the same bytes. Processes that
    torchrun started share the work, and the first of them writes.

    Args:
        model: a Hugging Face folder or hub id, or a GGUF file.
        out: the package's folder.
        targets: keys of :data:`mgptq_export.targets.TARGETS`.
        export_targets: write the targets; otherwise the package only holds what :func:`export` makes them of.
        text: what to evaluate on; None to leave evaluation out.
        device: a torch device.
        overwrite: replace ``out``, and start anew where a run for it was stopped.
        resume: go on where a run for ``out`` was stopped.
        max_memory: bytes; where the model needs more, what is not in use lies in files beside ``out``. None for most
            of what is available.

    Returns:
        the manifest; nothing on other ranks than the first.

    Raises:
        MgptqError: see :mod:`mgptq_runtime.errors`; no package is left behind.
    """
    layouts, device = layouts_of(targets), launched().device(device)
    with (
        joined(device) as world,
        _under_way(model, out, overwrite, resume, world) as under_way,
        typed_memory_errors(),
        ExitStack() as memory_errors,
    ):
        folder, journal = under_way.folder, under_way.journal
        written, measured = targets if export_targets else [], text is not None and world.is_first
        to_come = package_stages({layout.name: recipe for layout in layouts}, written, measured, journal)
        with stages(["load", "calibrate", *to_come]):
            loaded = partial(load_original, model, targets, folder.parent, device, max_memory, trust_remote_code)
            source = loaded(recipe.sequence_length, world)
            memory_errors.enter_context(memory_errors_of(source, recipe))
            recipes = _layout_recipes(source, recipe, targets)
            for layout in layouts:
                check_budget(source, recipes[layout.name], layout)
            check_tokenizer(source, targets)
            scored = scored_text(source, text, calibration_sha256(recipe)) if text and measured else None
            if world.is_first:
                under_way.identify(identity(source, recipe, targets))
            measuring = None
            if scored:
                measuring = partial(measure, scored, torch_scorer(source.copy().model))
            calibration = calibrate(source, recipe, journal)
            return make_package(folder, source, calibration, recipes, written, journal, measuring)


@contextmanager
def _under_way(model: str, out: Path, overwrite: bool, resume: bool, world: World) -> Iterator[UnfinishedRun]:
    """:func:`mgptq_export.output.unfinished_run` on the first rank, what follows from it on the others.

    A model that is not there is told first: what to do with a run that was stopped would be the wrong question.
    """
    if world.is_first:
        check_local(model)
        with unfinished_run(out, overwrite=overwrite, resume=resume) as under_way:
            yield replace(under_way, journal=world.shared(under_way.journal))
    else:
        out.resolve().parent.mkdir(parents=True, exist_ok=True)
        yield UnfinishedRun(out.resolve(), world.shared(FORGETFUL), resumed=False, _identity=FORGETFUL)


def memory_errors_of(source: SourceModel, recipe: Recipe) -> AbstractContextManager[None]:
    """Running out of memory, told with what this model takes, which is known of the CPU only."""
    on_cpu = source.model.device.type == "cpu"
    return typed_memory_errors(needs_of(source, recipe.sequence_length) if on_cpu else None)


def _fit(source: SourceModel, most: int, sequence_length: int) -> None:
    """Let a model take fewer tokens at once where ``most`` bytes are few."""
    needs = needs_of(source, sequence_length)
    source.tokens_at_once = needs.tokens_within(most)
    if most < needs.least:
        logger.warning(
            "--max-memory %s is less than a run takes: about %s, recovery apart, one sequence of %d tokens at a time",
            *(format_size(most), format_size(needs.least), sequence_length),
        )


@stage("load", brief=True)
def load_original(
    model: str,
    targets: Sequence[str],
    files: Path,
    device: str,
    max_memory: int | None,
    trust_remote_code: bool,
    sequence_length: int,
    world: World = ALONE,
) -> SourceModel:
    """Load the model to quantize, whose configuration every target can hold.

    Args:
        files: a folder for what does not fit into ``max_memory``; the others are as for :func:`run`.
        sequence_length: of what it will be calibrated on.
        world: who works on it; the first rank fetches it from the hub before the others look for it.
    """
    weights = world.from_first(partial(count_model_weights, model))
    source = _load_within(max_memory, weights, files, model, device, trust_remote_code)
    source.world = world
    if source.memory.is_paged and max_memory is not None:
        _fit(source, max_memory, sequence_length)
    for target in targets:
        target_named(target).check_config(source.model.config)
    return source


def _load_within(
    max_memory: int | None, weights: int, files: Path, model: str, device: str, trust_remote_code: bool
) -> SourceModel:
    """A model, in files where that many weights do not fit into memory several times."""
    on_cpu = device.split(":")[0] == "cpu"
    if max_memory is not None and not on_cpu:
        logger.warning("--max-memory has no effect with --device %s: models lie in the device's own memory", device)
    memory = memory_for(weights, files, max_memory, launched().local_size) if on_cpu else IN_MEMORY
    return load_source(model, device=device, trust_remote_code=trust_remote_code, memory=memory)


def make_package(
    folder: Path,
    source: SourceModel,
    calibration: Calibration,
    recipes: Mapping[str, Recipe],
    targets: Sequence[str],
    journal: Journal,
    measuring: Callable[[Mapping[str, Scorer]], dict[str, Any]] | None = None,
    *,
    on_backends: bool = True,
) -> dict[str, Any]:
    """Quantize copies of a calibrated model, export them, evaluate what was exported; ``source`` stays as it is.

    Args:
        folder: becomes the package.
        recipes: by name of the layout.
        journal: what has been done of this before, and where to keep what is done.
        measuring: :func:`measure` with all but the scorers; None to leave evaluation out.
        on_backends: evaluate what the exports compute, too, and not only the quantized weights in PyTorch.

    Returns:
        the manifest; nothing on other ranks than the first.
    """
    solved = _quantize_into(folder, source, calibration, recipes, journal)
    source.world.leave()
    if not source.world.is_first:
        return {}
    write_targets(folder, solved, targets)

    def evaluating() -> dict[str, Any] | None:
        if measuring is None:
            return None
        scorers = _checkpoint_scorers(source, solved)
        return measuring(scorers | _backend_scorers(folder, targets) if on_backends else scorers)

    return complete(folder, solved, targets, evaluating)


def package_stages(
    recipes: Mapping[str, Recipe], targets: Sequence[str], evaluated: bool, journal: Journal
) -> list[str]:
    """What is to come in :func:`make_package`; layouts are named where there are several."""
    names = []
    for layout, recipe in recipes.items():
        if "model" not in journal.within(layout):
            of_a_layout = ["allocate", "solve", *(["recover"] if recipe.recovers else [])]
            names += [f"{name} {layout}" if len(recipes) > 1 else name for name in of_a_layout]
    return names + ["export"] * bool(targets) + ["check"] * runs_on_backends(targets) + ["evaluate"] * evaluated


def _layout_recipes(source: SourceModel, recipe: Recipe, targets: Sequence[str]) -> dict[str, Recipe]:
    """What each layout is quantized by: the recipe, its bits being those that its size has room for."""
    layouts = layouts_of(targets)
    if recipe.size is None:
        return {layout.name: recipe for layout in layouts}
    shape = source.shape()
    rows = shape.model.get_input_embeddings().weight.shape[0]
    recipes = {}
    with tokenizer_files(source.tokenizer_folder, rows) as folder:
        for layout in layouts:
            takers = [name for name in targets if target_named(name).layout is layout]
            recipes[layout.name] = replace(recipe, bits=bits_for_size(shape, recipe, takers, folder))
    return recipes


def check_tokenizer(source: SourceModel, targets: Sequence[str]) -> None:
    """Refuse tokenizer files that a target cannot hold now, and not after hours of work."""
    rows = source.model.get_input_embeddings().weight.shape[0]
    with tokenizer_files(source.tokenizer_folder, rows) as folder:
        for target in targets:
            target_named(target).check_tokenizer(folder, rows, source.config)


def layouts_of(targets: Sequence[str]) -> list[Layout]:
    """The layouts that targets need, in the registry's order."""
    wanted = {target_named(target).layout.name for target in targets}
    return [layout for layout in LAYOUTS.values() if layout.name in wanted]


def export(
    package: Path, targets: Sequence[str], out: Path | None = None, *, overwrite: bool = False
) -> dict[str, Any]:
    """Export a package's checkpoints to targets, beside those that it has.

    Args:
        package: a folder written by :func:`run`.
        out: another folder for the result; None to extend ``package`` itself, which survives a failure unchanged.

    Returns:
        the manifest.
    """
    if out and out.resolve().is_relative_to(package.resolve()):
        raise BadInputError(f"{out} lies in the package itself; leave -o out to extend the package")
    known = read_manifest(package)
    for target in targets:
        _check_solved_for(target, known, package)
    check_no_links(package)
    solved = read_solved(package, known)
    # What is taken over must be what was written: the new manifest would vouch for damage.
    replaced = {target_named(target).path for target in targets}
    verify_files(package, [file for file in known["files"] if top_folder(file) not in replaced])
    names = ["export"] + ["check"] * runs_on_backends([*known["targets"], *targets])
    parts = replaced if out is None else None
    with new_folder(out or package, overwrite=overwrite or out is None, parts=parts) as folder, stages(names):
        shutil.copytree(package, folder, symlinks=True, dirs_exist_ok=True)
        for target in targets:
            _remove(folder / target_named(target).path)
        write_targets(folder, solved, targets)
        every = [name for name in TARGETS if name in {*known["targets"], *targets}]
        return complete(folder, solved, every, lambda: known.get("evaluation"))


def _check_solved_for(target: str, manifest: dict[str, Any], package: Path) -> None:
    layout = target_named(target).layout.name
    if layout not in manifest["layouts"]:
        raise BadInputError(
            f"{package} was not quantized for target {target}, which takes other weights than "
            f"{', '.join(manifest['layouts'])}; quantize the model again with --targets {target}"
        )


def evaluate_package(
    package: Path,
    model: str,
    text: EvaluationText,
    *,
    device: str = "cpu",
    max_memory: int | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Compare a package's checkpoints and every backend that it runs on with the original model.

    Args:
        max_memory: bytes; where models do not fit, their weights lie in files beside the package.

    The other arguments are those of :func:`run`.

    Returns:
        JSON values: the text and windows, and the quality by name (``original``, ``checkpoint``, ``numpy``, ...).
    """
    manifest = read_manifest(package)
    with stages(["load", "evaluate"]):
        with stage("load", brief=True):
            solved = read_solved(package, manifest)
            weights, files = count_model_weights(model), package.resolve().parent
            source = _load_within(max_memory, weights, files, model, device, trust_remote_code)
        scored = scored_text(source, text, solved[0].made_with.get("calibration_sha256"))
        scorers = _checkpoint_scorers(source, solved) | _backend_scorers(package, manifest["targets"])
        return measure(scored, torch_scorer(source.model), scorers)


def scored_text(source: SourceModel, text: EvaluationText, calibrated_on: str | None) -> ScoredText:
    """Read what an evaluation scores; with a warning where calibration has seen it.

    Args:
        calibrated_on: SHA-256 of the text that quantized models are calibrated on; None where it is not known.

    Raises:
        BadInputError: a text that cannot be used, or a window beyond the model's context.
    """
    if source.tokenizer is None:
        raise BadInputError(
            f"{source.source} has no tokenizer, so it cannot be evaluated; add tokenizer.json, or do not evaluate"
        )
    limit = source.model.config.max_position_embeddings
    if text.window > limit:
        raise BadInputError(f"a window of {text.window} tokens is beyond the model's context of {limit}; see --window")
    windows = evaluation_windows(file_tokens(text.path, source), text.window, text.windows)
    scored = ScoredText(text_name(text.path), text_sha256(text.path), windows)
    if scored.sha256 == calibrated_on:
        logger.warning(
            "%s is the text of the calibration, too: what is quantized looks better on it than on other text; "
            "evaluate on text that calibration has not seen",
            text.path,
        )
    return scored


def _quantize_into(
    folder: Path, source: SourceModel, calibration: Calibration, recipes: Mapping[str, Recipe], journal: Journal
) -> list[Solved]:
    """Quantize a copy of the model for every layout, by its recipe; ``source`` stays as it is."""
    solved = []
    for name, recipe in recipes.items():
        layout, working = LAYOUTS[name], source.copy()
        finishing = partial(_finished, working, source, calibration, recipe, layout, journal.within(name))
        record = journal.within(name).once("model", finishing)
        if not source.world.is_first:
            continue
        model = unpack_model(record.arrays, record.facts["model"])
        load_quantized_weights(working, model)
        history = History.from_json(record.facts["history"])
        steps = len(history.recovery)
        taken = replace(recipe, bits=record.facts["bits"], recovery_steps=steps, recovery_minutes=None)
        repairs = record.facts["repairs"]
        solved.append(save_solved(folder, layout, model, working, taken, calibration, repairs, history))
    return solved


def _finished(
    working: SourceModel,
    source: SourceModel,
    calibration: Calibration,
    recipe: Recipe,
    layout: Layout,
    journal: Journal,
) -> Record:
    """The quantized and recovered model, for a journal."""
    quantized = quantize(working, recipe, layout, calibration, journal)
    measured = partial(layer_errors, source, working, calibration.held_out[:MEASURED_SEQUENCES])
    errors_solved = journal.once("errors", lambda: Record(facts=measured())).facts
    with stage("recover") if recipe.recovers else nullcontext():
        recovered = recover(
            working,
            source,
            quantized.model,
            calibration.text,
            steps=recipe.recovery_steps,
            minutes=recipe.recovery_minutes,
            seed=recipe.seed,
            journal=journal,
        )
    arrays, description = pack_model(recovered.model)
    decision = quantized.decision
    history = History(
        decision.losses,
        decision.divergences,
        tuple(errors_solved),
        measured() if recovered.steps else (),
        recovered.divergences,
    )
    facts = {"bits": quantized.bits, "repairs": quantized.repairs, "history": history.to_json()}
    return Record(arrays, {"model": description, **facts})


def _checkpoint_scorers(source: SourceModel, solved: Sequence[Solved]) -> dict[str, Scorer]:
    """The quantized models in PyTorch."""
    scorers = {}
    for one in solved:
        working = source.copy()
        load_quantized_weights(working, one.checkpoint.model)
        scorers[CHECKPOINT_LABELS[one.layout.name]] = torch_scorer(working.model)
    return scorers


def _backend_scorers(package: Path, targets: Sequence[str]) -> dict[str, Scorer]:
    """What the package's exports compute."""
    if not runs_on_backends(targets):
        return {}
    scorers, opened = {}, open_package(package)
    for way in opened.ways():
        backend = opened.backend(way.backend, accuracy_level=way.accuracy_level, threads=torch.get_num_threads())
        scorers[way.name] = _backend_scorer(backend)
    return scorers


def _backend_scorer(backend: Backend) -> Scorer:
    def score(tokens: torch.Tensor, positions: int) -> torch.Tensor:
        return torch.from_numpy(backend.forward(tokens.numpy(), backend.new_cache(), first_logit=-positions))[0]

    return score


def measure(scored: ScoredText, reference: Scorer, scorers: Mapping[str, Scorer]) -> dict[str, Any]:
    """Compare scorers with the original on a text; see :func:`evaluate_package` for what comes back."""
    quality = evaluate(scored.windows, reference, scorers)
    windows, window = scored.windows.shape
    return {
        "text": scored.name,
        "text_sha256": scored.sha256,
        "window": window,
        "windows": windows,
        "results": {name: value.to_json() for name, value in quality.items()},
    }


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def identity(source: SourceModel, recipe: Recipe, targets: Sequence[str]) -> dict[str, Any]:
    """All that the bytes of a package depend on, evaluation apart."""
    tokenizer = source.tokenizer_folder / "tokenizer.json"
    return {
        "model": {
            "weights": _weights_sha256(source),
            "config": dict(source.config),
            "class": f"{type(source.model).__module__}.{type(source.model).__qualname__}",
            "tokenizer": file_sha256(tokenizer) if tokenizer.is_file() else None,
        },
        "text": calibration_sha256(recipe),
        "recipe": recipe.to_json(),
        "targets": list(targets),
        "threads": torch.get_num_threads(),
        "max_memory": {"tokens_at_once": source.tokens_at_once},
        "device": str(source.model.device),
        "computed_in": str(compute_dtype(source.model.device)),
        "processes": source.world.size,
        "versions": versions(),
    }


def _weights_sha256(source: SourceModel) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(source.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().cpu().numpy())
        source.memory.release(tensor)
    return digest.hexdigest()
