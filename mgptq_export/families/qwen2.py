"""Qwen2 and Qwen2.5."""

from typing import ClassVar

from mgptq_export.families.base import Family

__all__ = ["Qwen2"]


class Qwen2(Family):
    """q, k and v have biases."""

    name: ClassVar[str] = "qwen2"
    model_types: ClassVar[tuple[str, ...]] = ("qwen2",)
    architecture: ClassVar[str] = "Qwen2ForCausalLM"
    onnx_builder: ClassVar[str] = "QwenModel"
    gguf_square_attention: ClassVar[bool] = True
    gguf_biases: ClassVar[tuple[str, ...]] = ("attn_q", "attn_k", "attn_v")
