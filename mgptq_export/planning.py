"""Looking ahead at a model: which targets can reach which bits, and why."""

from collections.abc import Sequence
from typing import Any

from mgptq_export.models import SourceModel, load_shape
from mgptq_export.recipe import Recipe
from mgptq_export.targets import Target, target_named
from mgptq_runtime.errors import BudgetError, UnsupportedModelError
from mgptq_runtime.formats import format_named, padded_columns

__all__ = ["plan_model"]


def plan_model(
    model: str, recipe: Recipe, targets: Sequence[str], *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """What a model would become, as JSON values, from its configuration alone.

    Returns:
        ``name``, ``family``, ``linear_weights``, ``bits``; and ``targets``: for each ``reachable``, and either the
        ``reason`` why it is not, or: ``lowest_bits`` and ``highest_bits`` per weight; ``kinds``: for every kind of
        linear its row length, the formats that it can have, and those that it cannot and why; ``embedding_format``;
        and ``weight_bytes``, the most that the weights take (linears, permutations, embedding, head and norms).
    """
    source = load_shape(model, trust_remote_code=trust_remote_code)
    linear_weights = sum(m.out_features * m.in_features for g in source.groups() for m in g.modules.values())
    planned = {name: _plan_target(source, recipe, target_named(name), linear_weights) for name in targets}
    return {
        "name": source.name,
        "family": source.family.name,
        "linear_weights": linear_weights,
        "bits": recipe.bits,
        "targets": planned,
    }


def _plan_target(source: SourceModel, recipe: Recipe, target: Target, linear_weights: int) -> dict[str, Any]:
    try:
        target.check_config(source.model.config)
        reach = target.layout.reach(source, recipe)
    except (BudgetError, UnsupportedModelError) as error:
        return {"reachable": False, "reason": str(error)}
    columns = {
        name.split(".")[-1]: module.in_features
        for group in source.layer_groups(0)
        for name, module in group.modules.items()
    }
    planned: dict[str, Any] = {
        "reachable": reach.includes(recipe.bits),
        "lowest_bits": reach.lowest,
        "highest_bits": reach.highest,
        "kinds": {
            kind: {"columns": width, "formats": list(reach.formats[kind]), "excluded": dict(reach.excluded[kind])}
            for kind, width in columns.items()
        },
    }
    if not planned["reachable"]:
        planned["reason"] = f"formats of this target give {reach.lowest:.4f} to {reach.highest:.4f} bits for this model"
        return planned
    vocabulary, hidden = source.model.get_input_embeddings().weight.shape
    planned["embedding_format"] = target.layout.embedding_format(recipe, hidden)
    fmt = format_named(planned["embedding_format"])
    tables = (1 if source.tied else 2) * vocabulary * padded_columns(hidden)
    other = sum(parameter.numel() * 4 for parameter in source.model.parameters() if parameter.dim() == 1)
    planned["weight_bytes"] = int(linear_weights * recipe.bits / 8 + tables * fmt.bits_per_weight / 8 + other)
    return planned
