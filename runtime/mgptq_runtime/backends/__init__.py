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
        short_context: up to so many tokens the model rotates positions as in short texts; a longer text is rotated
            otherwise from its first token on, so what is cached of a short one does not serve it. ``context_length``
            where all texts are rotated alike.
    """

    name: str
    vocabulary_size: int
    context_length: int
    short_context: int

    def new_cache(self, batch: int = 1) -> Any:
        """An empty KV cache for ``batch`` sequences of equal length; opaque to callers."""
        ...

    def forward(self, token_ids: np.ndarray, cache: Any, *, first_logit: int = 0) -> np.ndarray:
        """Append tokens to the cached sequences.

        Args:
            token_ids: int64 [batch, sequence], the new tokens only.
            cache: from :meth:`new_cache`; extended in place.
            first_logit: the first of the new positions whose logits are computed; -1 for the last alone.

        Returns:
            logits, float32 [batch, positions, vocabulary].
        """
        ...
