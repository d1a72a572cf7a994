"""Qwen3, the dense models."""

from collections.abc import Mapping
from typing import ClassVar

from mgptq_export.families.base import Family

__all__ = ["Qwen3"]


class Qwen3(Family):
    """Every head of q and k is normed."""

    name: ClassVar[str] = "qwen3"
    model_types: ClassVar[tuple[str, ...]] = ("qwen3",)
    architecture: ClassVar[str] = "Qwen3ForCausalLM"
    onnx_builder: ClassVar[str] = "Qwen3Model"
    norms: ClassVar[Mapping[str, str]] = {
        **Family.norms,
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
    }
