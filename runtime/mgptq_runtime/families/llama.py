"""Llama 1 to 3 and models of the same shape (SmolLM2, TinyLlama)."""

from dataclasses import dataclass
from typing import ClassVar

from mgptq_runtime.families.decoder import Decoder

__all__ = ["Llama"]


@dataclass(frozen=True)
class Llama(Decoder):
    """The plain decoder."""

    name: ClassVar[str] = "llama"
