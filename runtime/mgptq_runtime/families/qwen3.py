"""Qwen3: every head of q and k is normed."""

from dataclasses import dataclass
from typing import ClassVar

from mgptq_runtime.families.decoder import Decoder

__all__ = ["Qwen3"]


@dataclass(frozen=True)
class Qwen3(Decoder):
    """The decoder with norms on q and k."""

    name: ClassVar[str] = "qwen3"
    query_key_norms: ClassVar[bool] = True
