"""Hooks on a model's modules, for a while."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch.utils.hooks import RemovableHandle

__all__ = ["hooked"]


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove registered hooks when the block ends, however it ends."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
