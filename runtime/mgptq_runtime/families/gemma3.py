"""Gemma 3, text only: more norms, GELU, a scaled embedding, and layers that see a window of the text only."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mgptq_runtime.families.decoder import Decoder, parameter
from mgptq_runtime.families.layers import gelu_tanh

__all__ = ["Gemma3"]

LOCAL_FREQUENCIES = "rope_local_inverse_frequencies"


@dataclass(frozen=True)
class Gemma3(Decoder):
    """Norm weights are stored as what they multiply by, 1 + Hugging Face's.

    Attributes:
        sliding_window: positions that a local layer attends to.
        global_every: every so many layers one attends to the whole text; the others are local, and rotate with
            frequencies of their own.
        attention_scale: what attention scores are multiplied by.
    """

    name: ClassVar[str] = "gemma3"
    query_key_norms: ClassVar[bool] = True
    output_norms: ClassVar[bool] = True

    sliding_window: int = parameter("attention.sliding_window", 1, 1 << 24)
    global_every: int = parameter("attention.sliding_window_pattern", 1, 1 << 10)
    attention_scale: float = parameter("attention.scale", 1e-6, 1e3)

    @property
    def scale(self) -> float:
        return self.attention_scale

    @property
    def embedding_scale(self) -> float:
        return self.hidden_size**0.5

    def _is_local(self, layer: int) -> bool:
        return (layer + 1) % self.global_every != 0

    def window(self, layer: int) -> int:
        return self.sliding_window if self._is_local(layer) else 0

    def activate(self, x: np.ndarray) -> np.ndarray:
        return gelu_tanh(x)

    @property
    def frequency_tensors(self) -> tuple[str, ...]:
        return (*super().frequency_tensors, LOCAL_FREQUENCIES)

    def frequencies_of(self, layer: int, positions: int) -> str:
        return LOCAL_FREQUENCIES if self._is_local(layer) else super().frequencies_of(layer, positions)
