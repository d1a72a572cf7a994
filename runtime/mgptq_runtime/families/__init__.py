"""Model families: one file each, registered here by the name that containers carry."""

from collections.abc import Mapping
from typing import Any

from mgptq_runtime.errors import UnsupportedModelError
from mgptq_runtime.families.layout import Family
from mgptq_runtime.families.llama import Llama

__all__ = ["FAMILIES", "make_family"]

FAMILIES = {family.name: family for family in (Llama,)}


def make_family(name: str, hyperparameters: Mapping[str, Any]) -> Family:
    """The family of a model, its hyper-parameters validated.

    Raises:
        UnsupportedModelError: an unknown family (the text lists the known ones), or hyper-parameters that are
            missing, unknown or out of range.
    """
    if name not in FAMILIES:
        raise UnsupportedModelError(f"model family {name!r} is not supported; supported are: {', '.join(FAMILIES)}")
    return FAMILIES[name].from_hyperparameters(hyperparameters)
