"""Looking at a package, and looking ahead at a model."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mgptq_export.models import load_shape
from mgptq_export.pipeline import formats_for, read_manifest, verified_checkpoint
from mgptq_export.quantize import BITS_WINDOW, budget_range
from mgptq_export.recipe import Recipe
from mgptq_runtime.formats import FORMATS, padded_columns

__all__ = ["inspect_package", "plan_model"]


def inspect_package(package: Path) -> dict[str, Any]:
    """What a package holds, as JSON values.

    Returns:
        ``manifest``; ``formats`` in use; ``kinds``: for each kind of linear (``attn_q``, ...) and ``token_embd`` its
        weights, its stored bits per weight without permutations, and its weights by format, padding included.

    Raises:
        PackageError: no complete package.
    """
    manifest = read_manifest(package)
    model = verified_checkpoint(package, manifest).model
    weights: Counter[str] = Counter()
    stored: Counter[str] = Counter()
    by_format: dict[str, Counter[str]] = {}
    extra = [linear for linear in (model.embedding, model.head) if linear is not None]
    for linear in [*model.linears(), *extra]:
        kind = linear.name.split(".")[-1]
        weights[kind] += linear.rows * linear.columns
        stored[kind] += linear.stored_bytes * 8
        for segment in linear.segments:
            by_format.setdefault(kind, Counter())[segment.format] += linear.rows * segment.columns
    used = [name for name in FORMATS if any(name in counts for counts in by_format.values())]
    kinds = {
        kind: {
            "weights": weights[kind],
            "bits_stored": stored[kind] / weights[kind],
            "weights_by_format": dict(by_format[kind]),
        }
        for kind in weights
    }
    return {"manifest": manifest, "formats": used, "kinds": kinds}


def plan_model(
    model: str, recipe: Recipe, targets: Sequence[str], *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """What a model would become, as JSON values, from its configuration alone.

    Returns:
        ``name``, ``family``, ``linear_weights``; and for every target the lowest and highest stored bits per weight,
        whether the recipe's are among them, and the most bytes that the weights then take (linears, permutations,
        embedding, head and norms; None where the bits cannot be reached).
    """
    source = load_shape(model, trust_remote_code=trust_remote_code)
    linear_weights = sum(m.out_features * m.in_features for g in source.groups() for m in g.modules.values())
    vocabulary, hidden = source.model.get_input_embeddings().weight.shape
    tables = (1 if source.tied else 2) * vocabulary * padded_columns(hidden)
    fixed = tables * FORMATS[recipe.embedding_format].bits_per_weight / 8
    fixed += sum(parameter.numel() * 4 for parameter in source.model.parameters() if parameter.dim() == 1)
    planned = {}
    for target in targets:
        low, high = budget_range(source, formats_for(recipe, [target]).formats)
        reachable = low <= recipe.bits < high + BITS_WINDOW
        planned[target] = {
            "lowest_bits": low,
            "highest_bits": high,
            "reachable": reachable,
            "weight_bytes": int(linear_weights * recipe.bits / 8 + fixed) if reachable else None,
        }
    return {"name": source.name, "family": source.family, "linear_weights": linear_weights, "targets": planned}
