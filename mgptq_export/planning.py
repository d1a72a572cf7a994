"""Looking ahead at a model: which targets can reach which bits, why, and how large the files will be."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mgptq_export.checkpoint import tokenizer_files
from mgptq_export.layouts import TENSORS, Reach
from mgptq_export.models import SourceModel, load_shape
from mgptq_export.recipe import BITS_GRID, MIXED, Recipe
from mgptq_export.sizes import format_size
from mgptq_export.targets import target_named
from mgptq_export.targets.container_size import container_files
from mgptq_export.targets.llama_cpp.size import llama_cpp_files
from mgptq_export.targets.onnx.size import onnx_files
from mgptq_export.targets.skeleton import PlannedFile, Skeleton, make_skeleton
from mgptq_runtime.errors import BadInputError, BudgetError, MgptqError, UnsupportedModelError
from mgptq_runtime.progress import track

__all__ = ["bits_for_size", "check_reachable", "plan_model"]

FILES: dict[str, Callable[[Skeleton], list[PlannedFile]]] = {
    "container": container_files,
    "onnx": onnx_files,
    "llama.cpp": llama_cpp_files,
}


# What the digits of a larger size can add to metadata, with its padding.
MORE_DIGITS = 64


def plan_model(
    model: str, recipe: Recipe, targets: Sequence[str], *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """What a model would become, as JSON values, from its configuration and tokenizer alone.

    Sizes are those with all of the recipe's bits spent. A run spends them up to what a block, or for llama.cpp a
    tensor, no longer fits in; what it writes is that much smaller, and a container a little more, as not every linear
    will have every format.

    Returns:
        ``name``, ``family``, ``linear_weights``, ``bits`` (None where the recipe has a size), ``size`` (None where it
        has none); and ``targets``: for each ``reachable``, and either the ``reason`` why it is not, or: ``lowest_bits``
        and ``highest_bits`` per weight; ``kinds``: for every kind of linear its row length, the formats that it can
        have, and those that it cannot and why; ``bits``, those of the recipe, or what its size has room for in all
        reachable targets of this layout, per weight of linears, embedding and head where ``embedding_format`` is
        ``mixed``; ``embedding_format``; ``weight_bytes``, the most that all tensors of the model
        take; ``files``: the large ones that the target writes, each with ``path``, ``bytes``, ``most`` (what it never
        exceeds) and ``exact``, which is false for an estimate; ``file_bytes``, the sum of their bytes; and
        ``model_bytes``, the most that those files take which a size counts.
    """
    with track("Planning", 1 + len(targets)) as advance:
        source = load_shape(model, trust_remote_code=trust_remote_code)
        advance()
        planned = {}
        with tokenizer_files(source.tokenizer_folder, source.model.get_input_embeddings().weight.shape[0]) as folder:
            bits = _planned_bits(source, recipe, targets, folder)
            for name in targets:
                planned[name] = _plan_target(source, recipe, name, bits[name], folder)
                advance()
    linear_weights = sum(m.out_features * m.in_features for g in source.groups() for m in g.modules.values())
    return {
        "name": source.name,
        "family": source.family.name,
        "linear_weights": linear_weights,
        "bits": recipe.bits if recipe.size is None else None,
        "size": recipe.size,
        "targets": planned,
    }


def check_reachable(planned: Mapping[str, Any]) -> None:
    """Refuse a plan, see :func:`plan_model`, that none of its targets reaches.

    Raises:
        BudgetError: with what each target can reach.
    """
    if any(target["reachable"] for target in planned["targets"].values()):
        return
    asked = f"{planned['bits']:g} stored bits" if planned["size"] is None else f"a size of {planned['size']} bytes"
    reasons: dict[str, list[str]] = {}
    for name, target in planned["targets"].items():
        reasons.setdefault(target["reason"], []).append(name)
    told = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
    raise BudgetError(f"no target can reach {asked} with this model: {told}. Ask for what one can reach")


def bits_for_size(source: SourceModel, recipe: Recipe, targets: Sequence[str], folder: Path) -> float:
    """The most stored bits with which the model files of all targets fit in the recipe's size.

    They are per linear weight; with a mixed embedding per weight of linears, embedding and head.

    Args:
        source: a model of shapes.
        recipe: with a size; its bits do not matter.
        targets: of one layout.
        folder: holds the tokenizer files.

    Raises:
        BudgetError: not even the fewest bits fit, or no format can hold a matrix.
        BadInputError, UnsupportedModelError: a model or a tokenizer that a target cannot hold.
    """
    return min(_most_bits(source, recipe, name, folder) for name in targets)


def _most_bits(source: SourceModel, recipe: Recipe, name: str, folder: Path) -> float:
    """:func:`bits_for_size` for one target.

    A file is so many bytes, of which what competes has none, and its budget. Only the digits of the bits themselves,
    in its metadata, are as many as the bits want; so the former are counted at bits that have all digits.
    """
    if recipe.size is None:
        raise ValueError("a recipe without a size")
    layout = target_named(name).layout
    reach = layout.reach(source, recipe)
    low, high = (math.ceil(bits * BITS_GRID) for bits in (reach.lowest, reach.highest))
    long = high + 1 if high % 10 == 0 else high
    skeleton = make_skeleton(source, replace(recipe, bits=long / BITS_GRID), reach, folder)
    others = _model_bytes(name, FILES[name](skeleton)) - skeleton.budget
    weights = reach.weights
    steps = (recipe.size - others) * 8 * BITS_GRID // weights
    if steps < low:
        raise BudgetError(_too_small(recipe, name, others - -low * weights // (8 * BITS_GRID)))
    return min(steps, high) / BITS_GRID


def _too_small(recipe: Recipe, name: str, smallest: int) -> str:
    ways = [f"ask for {format_size(smallest + MORE_DIGITS)} or more"]
    in_tensors = target_named(name).layout is TENSORS
    if in_tensors and recipe.embedding_format == "b8":
        ways.append("take --embedding-format b4")
    if not in_tensors and recipe.embedding_format != MIXED:
        ways.append(f"take --embedding-format {MIXED}")
    if in_tensors and recipe.ggml_types:
        ways.append("allow --ggml-types of fewer bits")
    return (
        f"{recipe.size} bytes are too few for target {name}: with its fewest bits this model takes {smallest} bytes; "
        f"{', '.join(ways)}, or choose another target"
    )


def _model_bytes(name: str, files: Sequence[PlannedFile]) -> int:
    """The most that those files of a target take which a size counts."""
    return sum(file.most for file in files if target_named(name).counts(file.path))


def _planned_bits(
    source: SourceModel, recipe: Recipe, targets: Sequence[str], folder: Path
) -> dict[str, float | MgptqError]:
    """The bits of every target, or why its size cannot be met; targets of one layout share them."""
    if recipe.size is None:
        return dict.fromkeys(targets, recipe.bits)
    most: dict[str, float] = {}
    errors: dict[str, MgptqError] = {}
    for name in targets:
        try:
            target_named(name).check_config(source.model.config)
            most[name] = _most_bits(source, recipe, name, folder)
        except (BadInputError, BudgetError, UnsupportedModelError) as error:
            errors[name] = error
    layouts = {name: target_named(name).layout for name in most}
    shared = {name: min(most[other] for other in most if layouts[other] is layouts[name]) for name in most}
    return {**errors, **shared}


def _plan_target(
    source: SourceModel, recipe: Recipe, name: str, bits: float | MgptqError, folder: Path
) -> dict[str, Any]:
    target = target_named(name)
    try:
        target.check_config(source.model.config)
        reach = target.layout.reach(source, recipe)
    except (BudgetError, UnsupportedModelError) as error:
        return {"reachable": False, "reason": str(error)}
    planned: dict[str, Any] = {
        "reachable": False,
        "lowest_bits": reach.lowest,
        "highest_bits": reach.highest,
        "kinds": _kinds(source, reach),
    }
    if isinstance(bits, MgptqError):
        return {**planned, "reason": str(bits)}
    if not reach.includes(bits):
        reason = f"formats of this target give {reach.lowest:.4f} to {reach.highest:.4f} bits for this model"
        return {**planned, "reason": reason}
    skeleton = make_skeleton(source, replace(recipe, bits=bits), reach, folder)
    try:
        files = FILES[name](skeleton)
    except (BadInputError, UnsupportedModelError) as error:
        return {**planned, "reason": str(error)}
    return {
        **planned,
        "reachable": True,
        "bits": bits,
        "embedding_format": MIXED if skeleton.mixed else skeleton.model.embedding.segments[0].format,
        "weight_bytes": skeleton.weight_bytes,
        "files": [asdict(file) for file in files],
        "file_bytes": sum(file.bytes for file in files),
        "model_bytes": _model_bytes(name, files),
    }


def _kinds(source: SourceModel, reach: Reach) -> dict[str, Any]:
    """Row length and formats of every kind of linear."""
    modules = {name.split(".")[-1]: module for g in source.layer_groups(0) for name, module in g.modules.items()}
    return {
        kind: {
            "columns": module.in_features,
            "formats": list(reach.formats[kind]),
            "excluded": dict(reach.excluded[kind]),
        }
        for kind, module in modules.items()
    }
