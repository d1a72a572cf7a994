"""Rotary frequencies as llama.cpp's files say them: keys of ``rope.*``, and factors that divide the frequencies."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mgptq_runtime.errors import UnsupportedModelError

__all__ = ["check_gguf_rope", "gguf_rope_metadata", "rope_factors", "rope_type"]

# llama.cpp's and transformers' defaults; files could say other values, but older readers would ignore them.
YARN_DEFAULTS: Mapping[str, Any] = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
YARN_MAGNITUDES = ("mscale", "mscale_all_dim")


def rope_type(parameters: Mapping[str, Any]) -> str:
    """The kind of a set of rotary parameters."""
    return parameters.get("rope_type") or "default"


def check_gguf_rope(family: str, parameters: Mapping[str, Any], supported: Sequence[str]) -> None:
    """Refuse rotary parameters that a llama.cpp file cannot express.

    Raises:
        UnsupportedModelError: what is wrong.
    """
    kind = rope_type(parameters)
    if kind not in supported:
        raise UnsupportedModelError(
            f"llama.cpp has no rotary type {kind!r} for {family} models; it has: {', '.join(supported)}"
        )
    if kind != "yarn":
        return
    usual = {**YARN_DEFAULTS, "attention_factor": yarn_attention_factor(parameters)}
    for key, value in usual.items():
        found = parameters.get(key)
        if found is not None and not math.isclose(found, value, rel_tol=1e-6):
            raise UnsupportedModelError(f"{key} {found} of rotary type 'yarn' is not llama.cpp's, {value}")
    for key in YARN_MAGNITUDES:
        if parameters.get(key):
            raise UnsupportedModelError(f"{key} of rotary type 'yarn' is not llama.cpp's for {family} models")


def yarn_attention_factor(parameters: Mapping[str, Any]) -> float:
    """What yarn multiplies cosines and sines by: 0.1 ln(factor) + 1, https://arxiv.org/abs/2309.00071, eq. 22."""
    return 0.1 * math.log(parameters["factor"]) + 1.0


def gguf_rope_metadata(parameters: Mapping[str, Any], context_length: int) -> dict[str, int | float | bool | str]:
    """Keys of one set of rotary parameters, without the architecture's prefix."""
    metadata: dict[str, int | float | bool | str] = {"rope.freq_base": float(parameters["rope_theta"])}
    kind = rope_type(parameters)
    if kind in ("linear", "yarn"):
        metadata |= {"rope.scaling.type": kind, "rope.scaling.factor": float(parameters["factor"])}
    if kind == "yarn":
        original = parameters.get("original_max_position_embeddings") or context_length
        metadata["rope.scaling.original_context_length"] = int(original)
    return metadata


def rope_factors(inverse_frequencies: np.ndarray, base: float) -> np.ndarray:
    """What to divide the plain frequencies of a base by to get these.

    Args:
        inverse_frequencies: float32 [rotary_size / 2].
        base: ``rope_theta``.

    Returns:
        float32 [rotary_size / 2].
    """
    exponents = np.arange(inverse_frequencies.size) / inverse_frequencies.size
    return (float(base) ** -exponents / inverse_frequencies.astype(np.float64)).astype(np.float32)
