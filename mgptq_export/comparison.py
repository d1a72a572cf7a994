"""Two packages side by side: files, recipes, allocations, quality, and where their texts part."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import torch

from mgptq_export.checkpoint import Checkpoint
from mgptq_export.layouts import LAYOUTS
from mgptq_export.manifest import read_manifest
from mgptq_export.pipeline import EvaluationText
from mgptq_export.solved import verified_checkpoint
from mgptq_export.targets import TARGETS
from mgptq_runtime.backends import Backend
from mgptq_runtime.errors import PackageError
from mgptq_runtime.generate import generate_tokens
from mgptq_runtime.package import open_package
from mgptq_runtime.perplexity import measure_perplexity, read_text
from mgptq_runtime.progress import Advance, stage, track
from mgptq_runtime.quantized_model import QuantizedLinear, QuantizedModel
from mgptq_runtime.tokenizer import TextTokenizer, encode_text, parse_tokenizer

__all__ = ["PROMPTS", "compare_packages"]

PROMPTS = ("The capital of France is", "Once upon a time there was", "Water boils when")
# The backends that run targets, the preferred one first.
BACKEND_OF_TARGET = {"onnx": "onnx", "container": "numpy"}
TEXT_OF_EVALUATION = ("text", "text_sha256", "window", "windows")
QUALITY = ("perplexity", "kl_divergence", "top1_agreement")

T = TypeVar("T")


class _NotComparableError(Exception):
    """Why a part of two packages cannot be compared; the other parts can."""


@dataclass(frozen=True)
class _Side:
    """One of the two packages, what was read of it being what its manifest lists.

    Attributes:
        checkpoints: by layout, in the registry's order.
    """

    folder: Path
    manifest: Mapping[str, Any]
    checkpoints: Mapping[str, Checkpoint]

    @property
    def first(self) -> Checkpoint:
        """The checkpoint that the manifest's own values are of."""
        return next(iter(self.checkpoints.values()))

    @property
    def targets(self) -> list[str]:
        """What it was exported to, in the registry's order."""
        return [name for name in TARGETS if name in self.manifest["targets"]]


@dataclass(frozen=True)
class _Runner:
    """A package that is loaded in a backend."""

    backend: Backend
    tokenizer: TextTokenizer


def compare_packages(
    a: Path,
    b: Path,
    *,
    text: EvaluationText | None = None,
    prompts: Sequence[str] = PROMPTS,
    tokens: int = 48,
) -> dict[str, Any]:
    """Two packages side by side, as JSON values; whatever both have is an object of ``a`` and ``b``.

    What is computed here, the runtime computes: on ONNX Runtime at its default level where both packages have it, else
    on NumPy.

    Args:
        text: what to score both on; None to leave it out.
        prompts: what both continue.
        tokens: the most that they continue each prompt by; 0 to leave it out.

    Returns:
        ``a`` and ``b``: path, name and family. ``sizes``: bytes of all ``files``, and of the model file of every target
        in ``targets``, None where a package lacks it. ``recipe`` and ``versions``: what differs, None where a package
        does not say. ``layouts``: for every layout of weights ``requested`` and ``stored`` bits per linear weight, None
        where a package lacks it, and ``allocation`` where both have it: stored bits per weight without permutations of
        ``kinds`` of linears and of ``linears``, those that differ most first. ``evaluation``: ``results`` in both
        manifests, by what was evaluated. ``perplexity`` on ``text``, or None. ``generation``: for each of ``prompts``
        how many tokens are ``same_tokens``, the index of the ``first_divergent_token``, counted from 0 behind the
        prompt, None where there is none, and the texts up to and with that token; or None.

        ``allocation``, ``evaluation``, ``perplexity`` and ``generation`` say whether the packages are ``comparable``;
        where they are not, all else they say is the ``reason``.

    Raises:
        PackageError: no complete package, or one that was changed.
        BadInputError: a text or a prompt that cannot be used, or that is too long or too short.
        NumericalError: a package computes NaN or infinity.
    """
    content = read_text(text.path) if text else ""
    with stage("load", brief=True), track("Reading the packages", 2) as advance:
        sides = (_read_side(a, advance), _read_side(b, advance))

    @cache
    def check_tokenizers() -> None:
        _check_tokenizers(sides, [*prompts, content])

    @cache
    def runners() -> tuple[_Runner, _Runner]:
        check_tokenizers()
        return _runners(sides)

    def recorded() -> dict[str, Any]:
        check_tokenizers()
        return _recorded_quality(sides)

    # Before texts are written, which takes long: a window that does not fit costs nothing.
    perplexity = _comparable(lambda: _perplexity(runners(), content, text)) if text else None
    return {
        **_both(_identity, sides),
        "sizes": _sizes(sides),
        "recipe": _differences(side.first.config["quantization_config"]["recipe"] for side in sides),
        "versions": _differences(map(_versions, sides)),
        "layouts": {name: _layout(sides, name) for name in LAYOUTS if any(name in side.checkpoints for side in sides)},
        "evaluation": _comparable(recorded),
        "generation": _comparable(lambda: _generation(runners(), prompts, tokens)) if tokens and prompts else None,
        "perplexity": perplexity,
    }


def _read_side(folder: Path, advance: Advance) -> _Side:
    manifest = read_manifest(folder)
    checkpoints = {
        name: verified_checkpoint(folder, manifest, layout)
        for name, layout in LAYOUTS.items()
        if name in manifest["layouts"]
    }
    advance()
    return _Side(folder, manifest, checkpoints)


def _both(function: Callable[[T], Any], sides: tuple[T, T]) -> dict[str, Any]:
    return {"a": function(sides[0]), "b": function(sides[1])}


def _comparable(compare: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return {"comparable": True, **compare()}
    except _NotComparableError as error:
        return {"comparable": False, "reason": str(error)}


def _identity(side: _Side) -> dict[str, str]:
    return {"path": str(side.folder), "name": side.first.name, "family": side.first.model.family}


# What the packages are


def _sizes(sides: tuple[_Side, _Side]) -> dict[str, Any]:
    targets = (_model_bytes(sides[0]), _model_bytes(sides[1]))
    present = [name for name in TARGETS if name in targets[0] or name in targets[1]]
    return {
        "targets": {name: {"a": targets[0].get(name), "b": targets[1].get(name)} for name in present},
        "files": _both(lambda side: sum(file["bytes"] for file in side.manifest["files"]), sides),
    }


def _model_bytes(side: _Side) -> dict[str, int]:
    """Bytes of the model file of every target that the package has."""
    files = side.manifest["files"]
    return {name: sum(file["bytes"] for file in files if TARGETS[name].counts(file["path"])) for name in side.targets}


def _versions(side: _Side) -> Mapping[str, Any]:
    versions = side.manifest.get("versions", {})
    if not isinstance(versions, dict):
        raise PackageError(f"{side.folder}: versions of the manifest are no object; quantize the model again")
    return versions


def _differences(values: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    a, b = values
    return {name: {"a": a.get(name), "b": b.get(name)} for name in {**a, **b} if a.get(name) != b.get(name)}


def _layout(sides: tuple[_Side, _Side], name: str) -> dict[str, Any]:
    checkpoints = (sides[0].checkpoints.get(name), sides[1].checkpoints.get(name))
    layout = {
        "requested": _both(lambda one: one and one.config["quantization_config"]["recipe"]["bits"], checkpoints),
        "stored": _both(lambda one: one and one.model.bits_stored, checkpoints),
    }
    a, b = checkpoints
    return layout if a is None or b is None else layout | {"allocation": _comparable(lambda: _allocation(a, b))}


def _allocation(a: Checkpoint, b: Checkpoint) -> dict[str, Any]:
    """Stored bits of what both models have.

    Raises:
        _NotComparableError: the models have other linears.
    """
    linears = (_linears(a.model), _linears(b.model))
    shapes = [{name: (one.rows, one.columns) for name, one in side.items()} for side in linears]
    if others := _differences(shapes):
        name, shape = next(iter(others.items()))
        raise _NotComparableError(
            f"models of other shapes: {name} is {_shape(shape['a'])} in A, {_shape(shape['b'])} in B"
        )

    def bits(names: Sequence[str]) -> dict[str, float]:
        return _both(lambda side: _stored_bits([side[name] for name in names]), linears)

    kinds: dict[str, list[str]] = {}
    for name in linears[0]:
        kinds.setdefault(name.split(".")[-1], []).append(name)
    alone = [{"name": name, **bits([name])} for name in linears[0]]
    return {
        "kinds": {kind: bits(names) for kind, names in kinds.items()},
        "linears": sorted(alone, key=lambda row: -abs(row["a"] - row["b"])),
    }


def _linears(model: QuantizedModel) -> dict[str, QuantizedLinear]:
    """All linears, embedding and head included, by name."""
    return {linear.name: linear for linear in [*model.linears(), *model.tables()]}


def _shape(shape: tuple[int, int] | None) -> str:
    return f"[{shape[0]}, {shape[1]}]" if shape else "missing"


def _stored_bits(linears: Sequence[QuantizedLinear]) -> float:
    return sum(one.stored_bytes for one in linears) * 8 / sum(one.rows * one.columns for one in linears)


def _recorded_quality(sides: tuple[_Side, _Side]) -> dict[str, Any]:
    a, b = map(_evaluation, sides)
    if others := _differences({key: one[key] for key in TEXT_OF_EVALUATION[1:]} for one in (a, b)):
        what = ", ".join(f"{key} {values['a']} and {values['b']}" for key, values in others.items())
        raise _NotComparableError(f"evaluated on other texts or windows: {what}; --text FILE scores both now")
    results = {
        name: {"a": a["results"][name], "b": b["results"][name]} for name in a["results"] if name in b["results"]
    }
    return {**{key: a[key] for key in TEXT_OF_EVALUATION}, "results": results}


def _evaluation(side: _Side) -> dict[str, Any]:
    found = side.manifest.get("evaluation")
    if found is None:
        raise _NotComparableError(f"{side.folder} was not evaluated when it was made; --text FILE scores both now")
    try:
        results = {name: {key: row[key] for key in QUALITY} for name, row in found["results"].items()}
        if not all(math.isfinite(value) for row in results.values() for value in row.values()):
            raise ValueError("a result is not finite")
        return {**{key: found[key] for key in TEXT_OF_EVALUATION}, "results": results}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise PackageError(
            f"{side.folder}: the manifest's evaluation is not what this program writes ({error!r}); "
            "quantize the model again"
        ) from error


# What the packages compute


def _check_tokenizers(sides: tuple[_Side, _Side], texts: Sequence[str]) -> None:
    """Raise _NotComparableError where the packages have other tokens, or make other tokens of one of the texts."""
    tokenizers = []
    for side in sides:
        path = side.first.folder / "tokenizer.json"
        if not path.is_file():
            raise _NotComparableError(f"{side.folder} has no tokenizer, so it has no text")
        try:
            tokenizers.append(parse_tokenizer(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise PackageError(f"{path} cannot be used: {error}; copy the package again") from error
    a, b = tokenizers
    if a.get_vocab() != b.get_vocab():
        sizes = f"{a.get_vocab_size()} tokens in A, {b.get_vocab_size()} in B"
        raise _NotComparableError(f"the tokenizers differ ({sizes}), so a token of one is not a token of the other")
    for text in texts:
        if encode_text(a, text, special_tokens=True) != encode_text(b, text, special_tokens=True):
            raise _NotComparableError("the tokenizers differ: they make other tokens of the same text")


def _runners(sides: tuple[_Side, _Side]) -> tuple[_Runner, _Runner]:
    """Both packages in the best backend that both have."""
    common = [target for target in BACKEND_OF_TARGET if all(target in side.targets for side in sides)]
    if not common:
        has = [f"{side.folder} has {', '.join(side.targets) or 'none'}" for side in sides]
        raise _NotComparableError(
            f"no backend runs both: {'; '.join(has)}. mgptq-export export PACKAGE --targets "
            f"{' or '.join(BACKEND_OF_TARGET)} adds one to a package with weights for it"
        )
    name = BACKEND_OF_TARGET[common[0]]
    with stage("load", brief=True), track("Loading the packages", 2) as advance:
        return _runner(sides[0], name, advance), _runner(sides[1], name, advance)


def _runner(side: _Side, name: str, advance: Advance) -> _Runner:
    package = open_package(side.folder)
    backend = package.backend(name, threads=torch.get_num_threads())
    advance()
    return _Runner(backend, package.tokenizer(backend))


def _perplexity(runners: tuple[_Runner, _Runner], content: str, text: EvaluationText) -> dict[str, Any]:
    ids = runners[0].tokenizer.encode(content)
    with track("Scoring", 2 * min(text.windows, len(ids) // text.window)) as advance:

        def measure(runner: _Runner) -> dict[str, Any]:
            return measure_perplexity(
                runner.backend, ids, window=text.window, windows=text.windows, advance=advance
            ).to_json()

        measured = _both(measure, runners)
    return {
        "text": text.path.name,
        "window": text.window,
        **{key: measured["a"][key] for key in ("windows", "tokens", "backend")},
        **{side: one["perplexity"] for side, one in measured.items()},
    }


def _generation(runners: tuple[_Runner, _Runner], prompts: Sequence[str], tokens: int) -> dict[str, Any]:
    with track("Generating", len(prompts) * tokens) as advance:
        found = [_divergence(runners, prompt, tokens, advance) for prompt in prompts]
    return {"backend": runners[0].backend.name, "tokens": tokens, "prompts": found}


def _divergence(runners: tuple[_Runner, _Runner], prompt: str, tokens: int, advance: Advance) -> dict[str, Any]:
    """Continue a prompt greedily with both packages, up to the first token that differs; so does an end."""
    ids = runners[0].tokenizer.encode(prompt, special_tokens=True)

    def continued(runner: _Runner) -> Iterable[int]:
        eos = runner.tokenizer.eos_token_ids
        return generate_tokens(runner.backend, ids, max_tokens=tokens, eos_token_ids=eos)

    streams: tuple[list[int], list[int]] = ([], [])
    divergent = None
    for index, pair in enumerate(zip_longest(*map(continued, runners))):
        for stream, token in zip(streams, pair, strict=True):
            stream.extend([] if token is None else [token])
        if pair[0] != pair[1]:
            divergent = index
            break
        advance()
    return {
        "prompt": prompt,
        "same_tokens": len(streams[0]) if divergent is None else divergent,
        "first_divergent_token": divergent,
        "a": runners[0].tokenizer.decode_after(ids, streams[0]),
        "b": runners[1].tokenizer.decode_after(ids, streams[1]),
    }
