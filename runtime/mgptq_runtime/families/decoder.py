"""The decoder that all families share, and the points at which they differ.

Each layer: h += Attention(RMSNorm(h)); h += W_down(act(W_gate x) * (W_up x)), x = RMSNorm(h).
Grouped-query attention with rotary position embeddings on halves, as in Hugging Face's models. A family is a subclass
that says what it does otherwise.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np

from mgptq_runtime.errors import UnsupportedModelError
from mgptq_runtime.families.hyperparameters import read_fields
from mgptq_runtime.families.layers import attention, rms_norm, rotate, silu
from mgptq_runtime.families.layout import Cache, GroupShape, Layout, LinearShape, Weights

__all__ = ["Decoder", "optional_parameter", "parameter"]


def parameter(key: str, low: float, high: float) -> Any:
    """A hyper-parameter that every file must have: llama.cpp's key without the family prefix, lowest, highest."""
    return field(metadata={"key": key, "bounds": (low, high)})


def optional_parameter(key: str, low: float, high: float, default: float) -> Any:
    """A hyper-parameter that may be missing."""
    return field(default=default, metadata={"key": key, "bounds": (low, high)}, kw_only=True)


@dataclass(frozen=True)
class Decoder:
    """Hyper-parameters, layout and forward pass; see :class:`mgptq_runtime.families.layout.Family`.

    Attributes:
        head_size: values per attention head, even.
        rms_epsilon: added to the mean square in each norm.
        rope_attention_factor: multiplies the rotary cosines and sines.

    Class attributes, for families to set:
        name: llama.cpp's name of the architecture.
        query_key_norms: every head of q and k passes an RMS norm before it is rotated.
        output_norms: what attention and feed-forward put out passes an RMS norm before it is added.
    """

    name: ClassVar[str]
    query_key_norms: ClassVar[bool] = False
    output_norms: ClassVar[bool] = False

    layer_count: int = parameter("block_count", 1, 1024)
    context_length: int = parameter("context_length", 1, 1 << 24)
    hidden_size: int = parameter("embedding_length", 8, 1 << 16)
    intermediate_size: int = parameter("feed_forward_length", 1, 1 << 18)
    heads: int = parameter("attention.head_count", 1, 512)
    kv_heads: int = parameter("attention.head_count_kv", 1, 512)
    head_size: int = parameter("attention.key_length", 2, 1024)
    rms_epsilon: float = parameter("attention.layer_norm_rms_epsilon", 0.0, 1.0)
    rope_attention_factor: float = parameter("rope.attention_factor", 1e-3, 1e3)
    vocabulary_size: int = parameter("vocab_size", 2, 1 << 22)

    @classmethod
    def from_hyperparameters(cls, hyperparameters: Mapping[str, Any]) -> Self:
        """Validate hyper-parameters under llama.cpp's key names without the family prefix.

        Raises:
            UnsupportedModelError: a value that is missing, unknown, out of range or inconsistent.
        """
        family = read_fields(cls.name, cls, hyperparameters)
        if family.heads % family.kv_heads:
            raise UnsupportedModelError(
                f"{cls.name}.attention.head_count is {family.heads}, "
                f"it must be a multiple of attention.head_count_kv, {family.kv_heads}"
            )
        if family.head_size % 2:
            raise UnsupportedModelError(f"{cls.name}.attention.key_length is {family.head_size}, it must be even")
        if family.rotary_size % 2 or family.rotary_size > family.head_size:
            raise UnsupportedModelError(
                f"{cls.name}.rope.dimension_count is {family.rotary_size}, "
                f"it must be even and at most attention.key_length, {family.head_size}"
            )
        return family

    @property
    def rotary_size(self) -> int:
        """How many values of a head are rotated, the first ones."""
        return self.head_size

    @property
    def scale(self) -> float:
        """What attention scores are multiplied by."""
        return self.head_size**-0.5

    @property
    def embedding_scale(self) -> float:
        """What the embedding is multiplied by before the first layer."""
        return 1.0

    def window(self, layer: int) -> int:
        """How many positions a layer attends to, its own the last; 0 for all."""
        return 0

    def activate(self, x: np.ndarray) -> np.ndarray:
        """The feed-forward's activation, float32."""
        return silu(x)

    @property
    def frequency_tensors(self) -> tuple[str, ...]:
        """Names of the tensors with rotary frequencies, each float32 [rotary_size / 2]."""
        return ("rope_inverse_frequencies",)

    @property
    def short_context(self) -> int:
        """Up to how many tokens :meth:`frequencies_of` is what it is for one."""
        return self.context_length

    def frequencies_of(self, layer: int, positions: int) -> str:
        """The frequency tensor that a layer rotates with when there are ``positions`` tokens in all."""
        return "rope_inverse_frequencies"

    @cached_property
    def layout(self) -> Layout:
        """All tensors of a model with these hyper-parameters."""
        groups: list[GroupShape] = []
        tensors: dict[str, tuple[int, ...]] = {"output_norm": (self.hidden_size,)}
        tensors |= dict.fromkeys(self.frequency_tensors, (self.rotary_size // 2,))
        optional: dict[str, tuple[int, ...]] = {}
        for i in range(self.layer_count):
            layer_groups = self._layer_groups(f"blk.{i}")
            groups += layer_groups
            optional |= {f"{linear.name}_bias": (linear.rows,) for group in layer_groups for linear in group.linears}
            tensors |= {f"blk.{i}.{norm}": (size,) for norm, size in self._norm_sizes().items()}
        embedding = LinearShape("token_embd", self.vocabulary_size, self.hidden_size)
        return Layout(tuple(groups), embedding, tensors, optional)

    def _norm_sizes(self) -> dict[str, int]:
        sizes = {"attn_norm": self.hidden_size, "ffn_norm": self.hidden_size}
        if self.query_key_norms:
            sizes |= {"attn_q_norm": self.head_size, "attn_k_norm": self.head_size}
        if self.output_norms:
            sizes |= {"post_attention_norm": self.hidden_size, "post_ffw_norm": self.hidden_size}
        return sizes

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
        self,
        weights: Weights,
        token_ids: np.ndarray,
        cache: Cache,
        observe: Callable[[np.ndarray], None],
        *,
        first_logit: int = 0,
    ) -> np.ndarray:
        """Compute logits of new tokens: see :class:`mgptq_runtime.families.layout.Family`."""
        end = cache.length + token_ids.shape[1]
        positions = np.arange(cache.length, end, dtype=np.float32)
        rotations = {name: self._rotation(weights.tensor(name), positions) for name in self.frequency_tensors}
        hidden = weights.embed(token_ids) * np.float32(self.embedding_scale)
        observe(hidden)
        for layer in range(self.layer_count):
            rotation = rotations[self.frequencies_of(layer, end)]
            hidden = hidden + self._attention(weights, layer, hidden, rotation, cache)
            hidden = hidden + self._feed_forward(weights, layer, hidden)
            observe(hidden)
        cache.length = end
        return weights.head(self._norm(weights, "output_norm", hidden[:, first_logit:]))

    def _rotation(self, frequencies: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines, float32 [sequence, rotary_size / 2]."""
        angles = np.outer(positions, frequencies)
        factor = np.float32(self.rope_attention_factor)
        return np.cos(angles) * factor, np.sin(angles) * factor

    def _norm(self, weights: Weights, name: str, x: np.ndarray) -> np.ndarray:
        return rms_norm(x, weights.tensor(name), self.rms_epsilon)

    def _attention(
        self,
        weights: Weights,
        layer: int,
        hidden: np.ndarray,
        rotation: tuple[np.ndarray, np.ndarray],
        cache: Cache,
    ) -> np.ndarray:
        blk = f"blk.{layer}"
        x = self._norm(weights, f"{blk}.attn_norm", hidden)
        q, k, v = (
            y.reshape(*y.shape[:2], -1, self.head_size).transpose(0, 2, 1, 3)
            for y in weights.project(f"{blk}.attn_qkv", x)
        )
        if self.query_key_norms:
            q, k = self._norm(weights, f"{blk}.attn_q_norm", q), self._norm(weights, f"{blk}.attn_k_norm", k)
        keys, values = cache.append(layer, rotate(k, *rotation), v)
        mixed = attention(rotate(q, *rotation), keys, values, self.scale, self.window(layer))
        (output,) = weights.project(f"{blk}.attn_output", mixed)
        return self._norm(weights, f"{blk}.post_attention_norm", output) if self.output_norms else output

    def _feed_forward(self, weights: Weights, layer: int, hidden: np.ndarray) -> np.ndarray:
        blk = f"blk.{layer}"
        x = self._norm(weights, f"{blk}.ffn_norm", hidden)
        gate, up = weights.project(f"{blk}.ffn_gate_up", x)
        (output,) = weights.project(f"{blk}.ffn_down", self.activate(gate) * up)
        return self._norm(weights, f"{blk}.post_ffw_norm", output) if self.output_norms else output
