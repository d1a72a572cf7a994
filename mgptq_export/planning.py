"""Looking ahead at a model: which targets can reach which bits, why, and how large the files will be."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mgptq_export.checkpoint import tokenizer_files
from mgptq_export.layouts import Reach
from mgptq_export.models import SourceModel, load_shape
from mgptq_export.recipe import Recipe
from mgptq_export.targets import target_named
from mgptq_export.targets.container_size import container_files
from mgptq_export.targets.llama_cpp.size import llama_cpp_files
from mgptq_export.targets.onnx.size import onnx_files
from mgptq_export.targets.skeleton import PlannedFile, Skeleton, make_skeleton
from mgptq_runtime.errors import BadInputError, BudgetError, UnsupportedModelError

__all__ = ["plan_model"]

FILES: dict[str, Callable[[Skeleton], list[PlannedFile]]] = {
    "container": container_files,
    "onnx": onnx_files,
    "llama.cpp": llama_cpp_files,
}


def plan_model(
    model: str, recipe: Recipe, targets: Sequence[str], *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """What a model would become, as JSON values, from its configuration and tokenizer alone.

    Sizes are those with all of the recipe's bits spent. A run spends them up to what a block, or for llama.cpp a
    tensor, no longer fits in; what it writes is that much smaller, and a container a little more, as not every linear
    will have every format.

    Returns:
        ``name``, ``family``, ``linear_weights``, ``bits``; and ``targets``: for each ``reachable``, and either the
        ``reason`` why it is not, or: ``lowest_bits`` and ``highest_bits`` per weight; ``kinds``: for every kind of
        linear its row length, the formats that it can have, and those that it cannot and why; ``embedding_format``;
        ``weight_bytes``, the most that all tensors of the model take; ``files``: the large ones that the target
        writes, each with ``path``, ``bytes`` and ``exact``, which is false for an estimate; and ``file_bytes``, their
        sum.
    """
    source = load_shape(model, trust_remote_code=trust_remote_code)
    linear_weights = sum(m.out_features * m.in_features for g in source.groups() for m in g.modules.values())
    rows = source.model.get_input_embeddings().weight.shape[0]
    with tokenizer_files(source.tokenizer_folder, rows) as folder:
        planned = {name: _plan_target(source, recipe, name, folder) for name in targets}
    return {
        "name": source.name,
        "family": source.family.name,
        "linear_weights": linear_weights,
        "bits": recipe.bits,
        "targets": planned,
    }


def _plan_target(source: SourceModel, recipe: Recipe, name: str, folder: Path) -> dict[str, Any]:
    target = target_named(name)
    try:
        target.check_config(source.model.config)
        reach = target.layout.reach(source, recipe)
    except (BudgetError, UnsupportedModelError) as error:
        return {"reachable": False, "reason": str(error)}
    planned: dict[str, Any] = {
        "reachable": reach.includes(recipe.bits),
        "lowest_bits": reach.lowest,
        "highest_bits": reach.highest,
        "kinds": _kinds(source, reach),
    }
    if not planned["reachable"]:
        reason = f"formats of this target give {reach.lowest:.4f} to {reach.highest:.4f} bits for this model"
        return {**planned, "reason": reason}
    skeleton = make_skeleton(source, recipe, target.layout, reach, folder)
    try:
        files = FILES[name](skeleton)
    except (BadInputError, UnsupportedModelError) as error:
        return {**planned, "reachable": False, "reason": str(error)}
    return {
        **planned,
        "embedding_format": skeleton.model.embedding.segments[0].format,
        "weight_bytes": skeleton.weight_bytes,
        "files": [asdict(file) for file in files],
        "file_bytes": sum(file.bytes for file in files),
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
