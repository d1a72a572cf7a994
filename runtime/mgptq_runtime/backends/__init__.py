"""Backends: ways to run a package, all behind one interface."""

from typing import Any, Protocol

import numpy as np

__all__ = ["Backend"]


class Backend(Protocol):
    """A loaded model.

    Attributes:
        name: ``numpy`` or ``onnx``.
        vocabulary_size: size of the last axis of the logits.
        context_length: the longest sequence that the model was made for.
    """

    name: str
    vocabulary_size: int
    context_length: int

    def new_cache(self, batch: int = 1) -> Any:
        """An empty KV cache for ``batch`` sequences of equal length; opaque to callers."""
        ...

    def forward(self, token_ids: np.ndarray, cache: Any, *, last_only: bool = False) -> np.ndarray:
        """Append tokens to the cached sequences.

        Args:
            token_ids: int64 [batch, sequence], the new tokens only.
            cache: from :meth:`new_cache`; extended in place.
            last_only: compute the logits of the last position only.

        Returns:
            logits, float32 [batch, sequence, vocabulary]; or [batch, 1, vocabulary].
        """
        ...
