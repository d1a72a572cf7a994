"""Model families on the workstation: one file each, registered here by the runtime's name."""

from collections.abc import Mapping
from typing import Any

from mgptq_export.families.base import Family, GroupModules
from mgptq_export.families.gemma3 import Gemma3
from mgptq_export.families.llama import Llama
from mgptq_export.families.phi3 import Phi3
from mgptq_export.families.qwen2 import Qwen2
from mgptq_export.families.qwen3 import Qwen3
from mgptq_runtime.errors import UnsupportedModelError

__all__ = ["FAMILIES", "Family", "GroupModules", "family_of"]

FAMILIES: dict[str, Family] = {family.name: family for family in (Llama(), Qwen2(), Qwen3(), Gemma3(), Phi3())}

EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a Hugging Face configuration.

    Raises:
        UnsupportedModelError: not among the supported families, or a variant that is not supported.
    """
    model_type = config.get("model_type")
    experts = any(isinstance(config.get(key), int) and config[key] > 1 for key in EXPERT_KEYS)
    if experts or "moe" in str(model_type):
        raise UnsupportedModelError(
            f"mixture-of-experts models are not supported, and this {model_type} model is one; supported: dense models"
        )
    for family in FAMILIES.values():
        if model_type in family.model_types:
            family.check_config(config)
            return family
    supported = ", ".join(sorted(t for family in FAMILIES.values() for t in family.model_types))
    raise UnsupportedModelError(f"model type {model_type!r} is not supported; supported: {supported}")
