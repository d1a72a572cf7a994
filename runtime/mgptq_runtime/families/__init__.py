"""Model families: one file each, registered here by the name that containers carry."""

from collections.abc import Mapping
from typing import Any

from mgptq_runtime.errors import UnsupportedModelError
from mgptq_runtime.families.decoder import Decoder
from mgptq_runtime.families.gemma3 import Gemma3
from mgptq_runtime.families.layout import Family
from mgptq_runtime.families.llama import Llama
from mgptq_runtime.families.phi3 import Phi3
from mgptq_runtime.families.qwen2 import Qwen2
from mgptq_runtime.families.qwen3 import Qwen3

__all__ = ["FAMILIES", "make_family"]

FAMILIES: dict[str, type[Decoder]] = {family.name: family for family in (Llama, Qwen2, Qwen3, Gemma3, Phi3)}


def make_family(name: str, hyperparameters: Mapping[str, Any]) -> Family:
    """The family of a model, its hyper-parameters validated.

    Raises:
        UnsupportedModelError: an unknown family (the text lists the known ones), or hyper-parameters that are
            missing, unknown or out of range.
    """
    if name not in FAMILIES:
        raise UnsupportedModelError(f"model family {name!r} is not supported; supported are: {', '.join(FAMILIES)}")
    return FAMILIES[name].from_hyperparameters(hyperparameters)
