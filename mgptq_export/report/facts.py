"""The few numbers that decide whether a package is good enough, from its manifest."""

from collections.abc import Iterator, Mapping
from typing import Any

from mgptq_export.targets import target_named
from mgptq_runtime.quantized_model import QuantizedModel

__all__ = ["flattered", "float16_bytes", "mended", "model_bytes", "verdict"]


def float16_bytes(model: QuantizedModel) -> int:
    """What the weights of the original take in float16."""
    matrices = sum(linear.rows * linear.columns for linear in (*model.linears(), *model.tables()))
    return 2 * (matrices + sum(array.size for array in model.tensors.values()))


def model_bytes(manifest: Mapping[str, Any]) -> dict[str, int]:
    """By target, what its model files take."""
    return {
        name: sum(file["bytes"] for file in manifest["files"] if target_named(name).counts(file["path"]))
        for name in manifest["targets"]
    }


def mended(repairs: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What had to be mended in the numbers of a layout, a phrase for each kind.

    Args:
        repairs: by input group, see :data:`mgptq_export.quantize.Repairs`.
    """
    damped = sum("damping" in group for group in repairs.values())
    dead = sum(group.get("dead_columns", 0) for group in repairs.values())
    limited = sum(group.get("scales_at_limit", 0) for group in repairs.values())
    if damped:
        yield f"{damped} Hessians needed more damping than the recipe's"
    if dead:
        yield f"{dead} columns never had any input on the calibration text"
    if limited:
        yield f"{limited} scales are at the limits of float16"


def flattered(manifest: Mapping[str, Any]) -> bool:
    """Whether the text of the evaluation is that of the calibration; older manifests do not say."""
    seen, scored = manifest.get("calibration_sha256"), manifest["evaluation"]
    return seen is not None and scored is not None and scored.get("text_sha256") == seen


def verdict(manifest: Mapping[str, Any]) -> str:
    """``passed``, ``failed`` or ``unchecked``: what the replay of the golden vectors said."""
    results = manifest["check"]["results"].values()
    if not results:
        return "unchecked"
    return "passed" if all(result["passed"] for result in results) else "failed"
