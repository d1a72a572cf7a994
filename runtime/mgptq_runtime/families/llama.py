"""Llama 1 to 3 and models of the same shape (SmolLM2, Mistral without sliding window).

Each layer: h += Attention(RMSNorm(h)); h += W_down(silu(W_gate x) * (W_up x)), x = RMSNorm(h).
Grouped-query attention with rotary position embeddings on halves, as Hugging Face's LlamaForCausalLM.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from mgptq_runtime.errors import UnsupportedModelError
from mgptq_runtime.families.hyperparameters import read_fields
from mgptq_runtime.families.layers import attention, rms_norm, rotate, silu
from mgptq_runtime.families.layout import Cache, GroupShape, Layout, LinearShape, Weights

__all__ = ["Llama"]


def _parameter(key: str, low: float, high: float) -> Any:
    return field(metadata={"key": key, "bounds": (low, high)})


@dataclass(frozen=True)
class Llama:
    """Hyper-parameters, layout and forward pass.

    Attributes:
        head_size: values per attention head, even.
        rms_epsilon: added to the mean square in each norm.
        rope_attention_factor: multiplies the rotary cosines and sines.
    """

    name: ClassVar[str] = "llama"

    layer_count: int = _parameter("block_count", 1, 1024)
    context_length: int = _parameter("context_length", 1, 1 << 24)
    hidden_size: int = _parameter("embedding_length", 8, 1 << 17)
    intermediate_size: int = _parameter("feed_forward_length", 1, 1 << 20)
    heads: int = _parameter("attention.head_count", 1, 4096)
    kv_heads: int = _parameter("attention.head_count_kv", 1, 4096)
    head_size: int = _parameter("attention.key_length", 2, 4096)
    rms_epsilon: float = _parameter("attention.layer_norm_rms_epsilon", 0.0, 1.0)
    rope_attention_factor: float = _parameter("rope.attention_factor", 1e-3, 1e3)
    vocabulary_size: int = _parameter("vocab_size", 2, 1 << 22)

    @classmethod
    def from_hyperparameters(cls, hyperparameters: Mapping[str, Any]) -> "Llama":
        """Validate hyper-parameters under llama.cpp's key names without the family prefix.

        Raises:
            UnsupportedModelError: a value that is missing, unknown, out of range or inconsistent.
        """
        family = read_fields(cls.name, cls, hyperparameters)
        if family.heads % family.kv_heads:
            raise UnsupportedModelError(
                f"llama.attention.head_count is {family.heads}, "
                f"it must be a multiple of attention.head_count_kv, {family.kv_heads}"
            )
        if family.head_size % 2:
            raise UnsupportedModelError(f"llama.attention.key_length is {family.head_size}, it must be even")
        return family

    @cached_property
    def layout(self) -> Layout:
        """All tensors of a model with these hyper-parameters."""
        groups: list[GroupShape] = []
        tensors: dict[str, tuple[int, ...]] = {
            "output_norm": (self.hidden_size,),
            "rope_inverse_frequencies": (self.head_size // 2,),
        }
        optional: dict[str, tuple[int, ...]] = {}
        for i in range(self.layer_count):
            layer_groups = self._layer_groups(f"blk.{i}")
            groups += layer_groups
            optional |= {f"{linear.name}_bias": (linear.rows,) for group in layer_groups for linear in group.linears}
            tensors |= {f"blk.{i}.attn_norm": (self.hidden_size,), f"blk.{i}.ffn_norm": (self.hidden_size,)}
        embedding = LinearShape("token_embd", self.vocabulary_size, self.hidden_size)
        return Layout(tuple(groups), embedding, tensors, optional)

    def _layer_groups(self, blk: str) -> list[GroupShape]:
        hidden, intermediate = self.hidden_size, self.intermediate_size
        q_rows, kv_rows = self.heads * self.head_size, self.kv_heads * self.head_size

        def group(name: str, columns: int, rows: dict[str, int]) -> GroupShape:
            linears = tuple(LinearShape(f"{blk}.{linear}", count, columns) for linear, count in rows.items())
            return GroupShape(f"{blk}.{name}", columns, linears)

        return [
            group("attn_qkv", hidden, {"attn_q": q_rows, "attn_k": kv_rows, "attn_v": kv_rows}),
            group("attn_output", q_rows, {"attn_output": hidden}),
            group("ffn_gate_up", hidden, {"ffn_gate": intermediate, "ffn_up": intermediate}),
            group("ffn_down", intermediate, {"ffn_down": hidden}),
        ]

    def forward(
        self, weights: Weights, token_ids: np.ndarray, cache: Cache, observe: Callable[[np.ndarray], None]
    ) -> np.ndarray:
        """Compute logits of new tokens: see :class:`mgptq_runtime.families.layout.Family`."""
        positions = np.arange(cache.length, cache.length + token_ids.shape[1], dtype=np.float32)
        angles = np.outer(positions, weights.tensor("rope_inverse_frequencies"))
        factor = np.float32(self.rope_attention_factor)
        cos, sin = np.cos(angles) * factor, np.sin(angles) * factor

        hidden = weights.embed(token_ids)
        observe(hidden)
        for layer in range(self.layer_count):
            hidden = hidden + self._attention(weights, layer, hidden, cos, sin, cache)
            hidden = hidden + self._feed_forward(weights, layer, hidden)
            observe(hidden)
        cache.length += token_ids.shape[1]
        return weights.head(rms_norm(hidden, weights.tensor("output_norm"), self.rms_epsilon))

    def _attention(
        self, weights: Weights, layer: int, hidden: np.ndarray, cos: np.ndarray, sin: np.ndarray, cache: Cache
    ) -> np.ndarray:
        blk = f"blk.{layer}"
        x = rms_norm(hidden, weights.tensor(f"{blk}.attn_norm"), self.rms_epsilon)
        q, k, v = (
            y.reshape(*y.shape[:2], -1, self.head_size).transpose(0, 2, 1, 3)
            for y in weights.project(f"{blk}.attn_qkv", x)
        )
        keys, values = cache.append(layer, rotate(k, cos, sin), v)
        mixed = attention(rotate(q, cos, sin), keys, values)
        (output,) = weights.project(f"{blk}.attn_output", mixed)
        return output

    def _feed_forward(self, weights: Weights, layer: int, hidden: np.ndarray) -> np.ndarray:
        blk = f"blk.{layer}"
        x = rms_norm(hidden, weights.tensor(f"{blk}.ffn_norm"), self.rms_epsilon)
        gate, up = weights.project(f"{blk}.ffn_gate_up", x)
        (output,) = weights.project(f"{blk}.ffn_down", silu(gate) * up)
        return output
