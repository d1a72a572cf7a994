"""Several budgets of one model in one go: what each costs in perplexity, and saves in bytes."""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mgptq_export import pipeline
from mgptq_export.calibration import calibration_sha256
from mgptq_export.evaluation import Scorer, torch_scorer
from mgptq_export.journal import Journal, Record
from mgptq_export.layouts import Calibration
from mgptq_export.manifest import read_manifest
from mgptq_export.memory_errors import typed_memory_errors
from mgptq_export.models import SourceModel, check_local, gguf_source, load_shape, load_source
from mgptq_export.models.gguf_file import read_gguf_file
from mgptq_export.output import SWEEP_FILE, SWEEP_PAGE, unfinished_run
from mgptq_export.packaging import describe
from mgptq_export.quantize import calibrate, calibration_set, check_budget
from mgptq_export.recipe import Recipe
from mgptq_export.report import sweep_page
from mgptq_export.report.facts import verdict
from mgptq_export.solved import read_solved
from mgptq_export.targets import target_named
from mgptq_runtime.errors import BadInputError
from mgptq_runtime.package import file_sha256
from mgptq_runtime.progress import stages

__all__ = ["sweep"]

Measure = Callable[[Mapping[str, Scorer]], dict[str, Any]]
"""Scorers by name to an evaluation; the original is always in it."""
FLOAT16_BITS = 16


def sweep(
    model: str,
    out: Path,
    recipe: Recipe,
    budgets: Sequence[float],
    targets: Sequence[str],
    text: pipeline.EvaluationText,
    *,
    against: Sequence[Path] = (),
    device: str = "cpu",
    overwrite: bool = False,
    resume: bool = False,
    max_memory: int | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Quantize a model at several budgets, all from one calibration, and measure every result alike.

    Every budget becomes a package of its own, ``OUT/2.25`` and so on: the one that :func:`mgptq_export.pipeline.run`
    makes at that budget, byte for byte, but for the picture of all budgets in its report, and for its evaluation, which
    is of the weights in PyTorch alone: what its exports compute is checked as ever, and not scored. The original is
    scored once: of its logits the scored half is kept beside ``out`` until the end, 4 bytes for each of ``windows *
    window / 2 * vocabulary``.

    A sweep that was stopped can be resumed, with other budgets and other files to compare with, too; what is finished
    is not done again.

    Args:
        out: the folder of the packages, of ``sweep.json`` and of its picture, ``sweep.html``.
        recipe: its bits and size do not matter; its embedding must not be mixed, which takes a size.
        budgets: stored bits per linear weight, at least one.
        text: what to evaluate on.
        against: GGUF files of the same model, quantized by others, to score on the same windows.

    The other arguments are those of :func:`mgptq_export.pipeline.run`.

    Returns:
        what ``sweep.json`` holds: ``name`` of the model; ``targets``; ``recipe``, without a budget; ``evaluation``:
        ``text``, its ``text_sha256``, ``window`` and ``windows``; and ``rows``, the largest first, each with

        - ``name``: the folder of the package (``2.25``), ``original``, or the file's name;
        - ``kind``: ``quantized``, ``original`` or ``against``;
        - ``layout`` of a quantized model's weights, else None: where targets need both, a budget has two rows;
        - ``requested_bits`` of a quantized model, else None, and ``stored_bits``, per linear weight;
        - ``file_bytes``: of the model files by target; the original's are its weights in ``float16``, those of other
          files are by ``gguf``; and ``bytes``, the most of them;
        - ``perplexity``, ``kl_divergence`` in nats per token and ``top1_agreement``, by PyTorch on the weights;
        - ``check`` of a package, ``passed``, ``failed`` or ``unchecked``, else None;
        - ``seconds`` that the whole package took, calibration apart, None for what was not quantized here. Of a budget
          in which the sweep was stopped they are counted from when it went on;
        - ``pareto``: no other row has as few ``bytes`` and as low a ``perplexity``, and less of one of them.

    Raises:
        MgptqError: see :mod:`mgptq_runtime.errors`; a budget that cannot be met, and a file to compare with that has
            another vocabulary, before anything is computed.
    """
    layouts = pipeline.layouts_of(targets)
    recipe = replace(recipe, bits=Recipe.bits, size=None)
    recipes = {_name(bits): replace(recipe, bits=bits) for bits in budgets}
    if not recipes:
        raise BadInputError("a sweep without a budget; give stored bits per weight, such as 2.25 and 2.5")
    check_local(model)
    for path in against:
        if not path.is_file():
            raise BadInputError(f"{path} is no file; give GGUF files to compare with")
    with (
        unfinished_run(out, overwrite=overwrite, resume=resume, one_task=False) as under_way,
        typed_memory_errors(),
        ExitStack() as memory_errors,
    ):
        folder, journal = under_way.folder, under_way.journal
        with stages(_stages(recipes, against, targets, journal)):
            loaded = partial(pipeline.load_original, model, targets, folder.parent, device, max_memory)
            source = loaded(trust_remote_code, recipe.sequence_length)
            memory_errors.enter_context(pipeline.memory_errors_of(source, recipe))
            for one in recipes.values():
                for layout in layouts:
                    check_budget(source, one, layout)
            pipeline.check_tokenizer(source, targets)
            scored = pipeline.scored_text(source, text, calibration_sha256(recipe))
            for path in against:
                _check_comparable(path, source)
            under_way.identify(pipeline.identity(source, recipe, targets) | {"evaluation": _identity(scored, text)})
            calibration_set(source, recipe, journal)  # a text that cannot be used is found before anything is scored
            reference = _scored_once(torch_scorer(source.model), journal.within("original"))
            measure = partial(pipeline.measure, scored, reference)
            original = measure({})
            rows = [_original_row(source, original)]
            rows += [_foreign_row(path, source, measure, journal.within("against")) for path in against]
            calibration = calibrate(source, recipe, journal)
            for one in recipes.values():
                rows += _budget_rows(folder, source, calibration, one, targets, measure, journal)
        rows = _with_front(rows)
        described = {**recipe.to_json(), "calibration": calibration.text_name}
        for budget in recipes:
            _tell_of_sweep(folder / budget, rows)
        swept = {
            "name": source.name,
            "targets": list(targets),
            "recipe": {key: value for key, value in described.items() if key not in ("bits", "size")},
            "evaluation": {key: value for key, value in original.items() if key != "results"},
            "rows": rows,
        }
        (folder / SWEEP_FILE).write_text(json.dumps(swept, indent=2) + "\n", encoding="utf-8")
        (folder / SWEEP_PAGE).write_text(sweep_page(swept), encoding="utf-8")
        return swept


def _stages(
    recipes: Mapping[str, Recipe], against: Sequence[Path], targets: Sequence[str], journal: Journal
) -> list[str]:
    """What is to come, each stage with the budget or the file that it is of."""
    names = ["load", "evaluate original"]
    names += [f"evaluate {path.name}" for path in against if file_sha256(path) not in journal.within("against")]
    names.append("calibrate")
    for budget, recipe in recipes.items():
        by_layout = {layout.name: recipe for layout in pipeline.layouts_of(targets)}
        done = journal.within(budget)
        of_budget = pipeline.package_stages(by_layout, targets, "evaluation" not in done, done)
        names += [f"{name} {budget}" for name in of_budget]
    return names


def _name(bits: float) -> str:
    """``2.5``, and ``3`` for 3.0: what a budget's folder is called."""
    return str(float(bits)).removesuffix(".0")


def _identity(scored: pipeline.ScoredText, text: pipeline.EvaluationText) -> dict[str, Any]:
    """All that figures depend on, beside what packages do."""
    return {"text": scored.sha256, "window": text.window, "windows": text.windows}


def _check_comparable(path: Path, source: SourceModel) -> None:
    """Raise BadInputError where a file's perplexity would mean something else: over other tokens."""
    with _quantized_on_purpose():
        other = load_shape(str(path))
    rows, other_rows = source.model.config.vocab_size, other.model.config.vocab_size
    advice = f"give a GGUF file of {source.name} to compare with"
    if rows != other_rows:
        raise BadInputError(f"{path} has a vocabulary of {other_rows} tokens, {source.source} one of {rows}; {advice}")
    tokens, other_tokens = _tokens(source, rows), _tokens(other, rows)
    for token in sorted(tokens.keys() | other_tokens.keys()):
        mine, theirs = tokens.get(token), other_tokens.get(token)
        if mine != theirs:
            raise BadInputError(
                f"{path} has another vocabulary: token {token} is {theirs!r} there and {mine!r} in {source.source}; "
                f"{advice}"
            )


def _tokens(source: SourceModel, rows: int) -> dict[int, str]:
    """Texts by id, of those that the embedding has rows for. GGUF files have spaces where some tokenizers have ▁."""
    vocabulary = source.tokenizer.get_vocab() if source.tokenizer else {}
    return {token: text.replace("▁", " ") for text, token in vocabulary.items() if token < rows}


@contextmanager
def _quantized_on_purpose() -> Iterator[None]:
    """Without the advice to take a file that is not quantized."""
    level = gguf_source.logger.level
    gguf_source.logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        gguf_source.logger.setLevel(level)


def _scored_once(scorer: Scorer, journal: Journal) -> Scorer:
    """A scorer that computes every window once, whatever becomes of its model; its logits are parts of files."""

    def score(tokens: torch.Tensor, positions: int) -> torch.Tensor:
        window = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
        record = journal.once(window, lambda: Record({"logits": scorer(tokens, positions).numpy()}))
        return torch.from_numpy(record.arrays["logits"])

    return score


def _original_row(source: SourceModel, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    weights = sum(parameter.numel() for parameter in source.model.parameters())
    size = {"float16": weights * FLOAT16_BITS // 8}
    return _row("original", "original", size, evaluation["results"]["original"], stored_bits=float(FLOAT16_BITS))


def _foreign_row(path: Path, source: SourceModel, measure: Measure, journal: Journal) -> dict[str, Any]:
    """Another program's quantization of the model, dequantized."""

    def quality() -> Record:
        with _quantized_on_purpose():
            other = load_source(str(path), device=str(source.model.device), memory=source.memory)
        return Record(facts=measure({path.name: torch_scorer(other.model)})["results"][path.name])

    found = journal.once(file_sha256(path), quality).facts
    return _row(path.name, "against", {"gguf": path.stat().st_size}, found, stored_bits=_stored_bits(path))


def _stored_bits(path: Path) -> float:
    """Per weight of a GGUF file's linears."""
    tensors = read_gguf_file(path).tensors.values()
    linears = [tensor for tensor in tensors if tensor.name.startswith("blk.") and len(tensor.shape) == 2]
    return 8 * sum(one.data.nbytes for one in linears) / sum(one.shape[0] * one.shape[1] for one in linears)


def _budget_rows(
    out: Path,
    source: SourceModel,
    calibration: Calibration,
    recipe: Recipe,
    targets: Sequence[str],
    measure: Measure,
    journal: Journal,
) -> Iterator[dict[str, Any]]:
    """Make the package of one budget; its rows, one for each layout."""
    start = time.monotonic()
    name = _name(recipe.bits)
    folder, journal = out / name, journal.within(name)

    def measured(scorers: Mapping[str, Scorer]) -> dict[str, Any]:
        return journal.once("evaluation", lambda: Record(facts=measure(scorers))).facts

    folder.mkdir()
    recipes = {layout.name: recipe for layout in pipeline.layouts_of(targets)}
    manifest = pipeline.make_package(
        folder, source, calibration, recipes, targets, journal, measured, on_backends=False
    )
    seconds = journal.once("seconds", lambda: Record(facts=time.monotonic() - start)).facts
    for layout, of_layout in manifest["layouts"].items():
        takers = [target for target in targets if target_named(target).layout.name == layout]
        yield _row(
            name,
            "quantized",
            {target: target_named(target).model_bytes(folder) for target in takers},
            manifest["evaluation"]["results"][pipeline.CHECKPOINT_LABELS[layout]],
            stored_bits=of_layout["bits"]["stored"],
            layout=layout,
            requested_bits=recipe.bits,
            check=verdict(manifest),
            seconds=seconds,
        )


def _tell_of_sweep(package: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Keep in a package what all budgets came to, for its report."""
    manifest, rows = read_manifest(package), [{**row, "seconds": None} for row in rows]
    told = [replace(one, history=replace(one.history, sweep=tuple(rows))) for one in read_solved(package, manifest)]
    for one in told:
        one.history.write(package / one.layout.folder)
    describe(package, told, manifest)


def _row(
    name: str,
    kind: str,
    file_bytes: Mapping[str, int],
    quality: Mapping[str, Any],
    *,
    stored_bits: float,
    layout: str | None = None,
    requested_bits: float | None = None,
    check: str | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "layout": layout,
        "requested_bits": requested_bits,
        "stored_bits": stored_bits,
        "file_bytes": dict(file_bytes),
        "bytes": max(file_bytes.values()),
        **{key: quality[key] for key in ("perplexity", "kl_divergence", "top1_agreement")},
        "check": check,
        "seconds": seconds,
    }


def _with_front(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, the largest first, each saying whether it is on the Pareto front."""
    points = [(row["bytes"], row["perplexity"]) for row in rows]

    def dominated(point: tuple[int, float]) -> bool:
        return any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in points)

    marked = [row | {"pareto": not dominated(point)} for row, point in zip(rows, points, strict=True)]
    return sorted(marked, key=lambda row: -row["bytes"])
