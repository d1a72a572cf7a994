"""Phi-3 and Phi-4-mini: a part of each head may be rotated, with other frequencies for long texts."""

from dataclasses import dataclass
from typing import ClassVar

from mgptq_runtime.families.decoder import Decoder, optional_parameter, parameter

__all__ = ["Phi3"]

LONG_FREQUENCIES = "rope_long_inverse_frequencies"


@dataclass(frozen=True)
class Phi3(Decoder):
    """The decoder with partial and two-length rotary embeddings.

    Attributes:
        rotary_dimensions: how many values of a head are rotated.
        original_context: beyond so many tokens the long frequencies rotate all new positions; equal to the context
            length where there is one set of frequencies.
        sliding_window: positions that every layer attends to; 0 for all.
    """

    name: ClassVar[str] = "phi3"

    rotary_dimensions: int = parameter("rope.dimension_count", 2, 1024)
    original_context: int = parameter("rope.scaling.original_context_length", 1, 1 << 24)
    sliding_window: int = optional_parameter("attention.sliding_window", 0, 1 << 24, 0)

    @property
    def rotary_size(self) -> int:
        return self.rotary_dimensions

    def window(self, layer: int) -> int:
        return self.sliding_window

    @property
    def short_context(self) -> int:
        return min(self.original_context, self.context_length)

    @property
    def _has_long_frequencies(self) -> bool:
        return self.short_context < self.context_length

    @property
    def frequency_tensors(self) -> tuple[str, ...]:
        short = super().frequency_tensors
        return (*short, LONG_FREQUENCIES) if self._has_long_frequencies else short

    def frequencies_of(self, layer: int, positions: int) -> str:
        is_long = self._has_long_frequencies and positions > self.short_context
        return LONG_FREQUENCIES if is_long else super().frequencies_of(layer, positions)
