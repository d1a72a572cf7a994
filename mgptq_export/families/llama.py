"""Llama 1 to 3 and models of the same shape (SmolLM2, TinyLlama, ...)."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch

from mgptq_export.families.base import Family
from mgptq_export.families.gguf_rope import rope_factors, rope_type
from mgptq_runtime.errors import BadInputError, UnsupportedModelError

__all__ = ["Llama"]

ROPE_FACTORS = "rope_freqs.weight"
# What all Llamas 3.1 to 3.3 have beside their own factor.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
FACTOR_TOLERANCE = 1e-4


class Llama(Family):
    """The defaults."""

    name: ClassVar[str] = "llama"
    model_types: ClassVar[tuple[str, ...]] = ("llama",)
    architecture: ClassVar[str] = "LlamaForCausalLM"
    onnx_builder: ClassVar[str] = "LlamaModel"
    rotary_pairs: ClassVar[bool] = True
    gguf_rope_types: ClassVar[tuple[str, ...]] = ("default", "linear", "yarn", "llama3")
    gguf_biases: ClassVar[tuple[str, ...]] = (
        "attn_q",
        "attn_k",
        "attn_v",
        "attn_output",
        "ffn_gate",
        "ffn_up",
        "ffn_down",
    )
    gguf_rotary: ClassVar[tuple[str, ...]] = (ROPE_FACTORS,)

    def config_from_gguf(self, meta: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
        """The Hugging Face configuration that a GGUF file describes; see :meth:`Family.config_from_gguf`."""
        return {
            **super().config_from_gguf(meta, tensors),
            "attention_bias": "blk.0.attn_q.bias" in tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        }

    def rope_from_gguf(self, meta: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Also Llama 3.1's frequencies: the file holds what they are divided by, the parameters follow from that."""
        rope = super().rope_from_gguf(meta, tensors)
        if ROPE_FACTORS not in tensors:
            return rope
        factors = tensors[ROPE_FACTORS].values()
        size = int(meta.get("attention.key_length", int(meta["embedding_length"]) // int(meta["attention.head_count"])))
        if factors.shape != (size // 2,):
            raise BadInputError(
                f"the GGUF file's {ROPE_FACTORS} has shape {list(factors.shape)}, a head of {size} values needs "
                f"[{size // 2}]; download it again"
            )
        llama3 = {**rope, **LLAMA3_ROPE, "factor": round(float(factors.max()), 6)}
        if rope["rope_type"] == "default":
            if (factors == 1.0).all():
                return rope
            expected = _llama3_factors(llama3, 2 * factors.size)
            if np.allclose(factors, expected, rtol=FACTOR_TOLERANCE, atol=0.0):
                return llama3
        raise UnsupportedModelError(
            f"the GGUF file's {ROPE_FACTORS} are not those of Llama 3.1 with factor {llama3['factor']}; "
            "use the model's Hugging Face folder instead"
        )

    def gguf_rotary_tensors(self, config: Any, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Llama 3's frequencies as factors: llama.cpp has no keys for how they come about."""
        if rope_type(config.rope_parameters) != "llama3":
            return {}
        frequencies = tensors["rope_inverse_frequencies"]
        return {ROPE_FACTORS: rope_factors(frequencies, config.rope_parameters["rope_theta"])}


def _llama3_factors(rope: Mapping[str, Any], size: int) -> np.ndarray:
    """What transformers divides the frequencies of ``size`` values per head by, float32 [size / 2]."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    # A context longer than the original one, whatever the file's: transformers warns otherwise.
    context = 2 * rope["original_max_position_embeddings"]
    config = LlamaConfig(
        hidden_size=size,
        num_attention_heads=1,
        max_position_embeddings=context,
        rope_parameters=dict(rope),
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float) / size)
    return (plain / scaled).numpy()
