"""Qwen2 and Qwen2.5: the plain decoder; q, k and v have biases."""

from dataclasses import dataclass
from typing import ClassVar

from mgptq_runtime.families.decoder import Decoder

__all__ = ["Qwen2"]


@dataclass(frozen=True)
class Qwen2(Decoder):
    """The plain decoder: biases are optional in every family."""

    name: ClassVar[str] = "qwen2"
