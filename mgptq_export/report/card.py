"""``README.md`` of a package: the model card that the hub shows."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from mgptq_export.recipe import FAST, Recipe
from mgptq_export.report.content import PackageContent
from mgptq_export.report.facts import flattered, float16_bytes, model_bytes

__all__ = ["CARD_FILE", "model_card", "recipe_options"]

CARD_FILE = "README.md"
OPTIONS = {
    "size": "--size",
    "bits": "--bits",
    "allocator": "--allocator",
    "calibration": "--calibration",
    "samples": "--samples",
    "own_samples": "--own-samples",
    "sequence_length": "--sequence-length",
    "seed": "--seed",
    "embedding_format": "--embedding-format",
    "ggml_types": "--ggml-types",
    "trials": "--trials",
    "drift_correction": "--drift-correction",
    "descent_sweeps": "--descent-sweeps",
    "recovery_steps": "--recovery-steps",
}


def model_card(manifest: Mapping[str, Any], contents: Sequence[PackageContent]) -> str:
    """The card of a package: metadata for the hub, sizes, quality, and the commands that make it and run it.

    Args:
        manifest: as it will be written, the files so far included.
        contents: of every layout of weights in the package.
    """
    environment = Environment(
        loader=PackageLoader("mgptq_export.report", ""), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["quoted"] = shlex.quote
    return environment.get_template("card.md.j2").render(
        metadata=_metadata(manifest).to_yaml(),
        manifest=manifest,
        model_bytes=model_bytes(manifest),
        float16_bytes=float16_bytes(contents[0].checkpoint.model),
        flattered=flattered(manifest),
        options=recipe_options(manifest["recipe"]),
    )


def _metadata(manifest: Mapping[str, Any]) -> ModelCardData:
    """See https://huggingface.co/docs/hub/model-cards."""
    origin: dict[str, Any] = {name: value for name, value in manifest["origin"].items() if name != "source"}
    if "base_model" in origin:
        origin["base_model_relation"] = "quantized"
    return ModelCardData(
        **origin,
        library_name="mgptq-export",
        pipeline_tag="text-generation",
        tags=["mgptq", "quantized", *(["gguf"] if manifest["targets"] != ["onnx"] else []), *_tags(manifest)],
        quantization={
            "method": "mgptq",
            "bits_per_weight": round(manifest["bits"]["stored"], 4),
            "weights_by_format": dict(manifest["bits"]["weights_by_format"]),
        },
    )


def _tags(manifest: Mapping[str, Any]) -> list[str]:
    return [name for name in ("onnx", "llama.cpp") if name in manifest["targets"]]


def recipe_options(recipe: Mapping[str, Any]) -> list[str]:
    """Options of ``mgptq-export run`` that give a recipe, as they are typed; those with their default are left out.

    What an older version's recipe lacks counts as the default.
    """
    recipe = {**Recipe().to_json(), **recipe}
    fast = all(recipe[name] == value for name, value in FAST.items() if name not in OPTIONS)
    defaults = Recipe().to_json() | (FAST if fast else {})
    defaults["embedding_format"] = Recipe.default_embedding_format(recipe["size"])
    given = {name: option for name, option in OPTIONS.items() if recipe[name] != defaults[name] or name == "bits"}
    if recipe["size"] is not None:
        del given["bits"]
    typed = [f"{option} {shlex.quote(_typed(recipe[name]))}" for name, option in given.items()]
    return [*typed, *(["--fast"] if fast else [])]


def _typed(value: Any) -> str:
    return ",".join(value) if isinstance(value, list) else str(value)
