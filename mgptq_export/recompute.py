"""A way back through a model that remembers one hidden state per layer, and computes each layer anew."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mgptq_export.models import SourceModel

__all__ = ["recomputing"]


@contextmanager
def recomputing(source: SourceModel) -> Iterator[None]:
    """While it lasts, decoder layers keep their input for the way back, and no activations.

    Hooks on a layer's modules run twice, without gradients on the way forward and with them on the way back.
    """
    layers = source.layers
    try:
        for layer in layers:
            layer.forward = _recomputing(layer, layer.forward, source)
        yield
    finally:
        for layer in layers:
            del layer.forward


def _recomputing(layer: nn.Module, forward: Callable[..., Any], source: SourceModel) -> Callable[..., Any]:
    def run(hidden: torch.Tensor, **keywords: Any) -> Any:
        if not hidden.requires_grad:
            return forward(hidden, **keywords)

        def done(gradient: torch.Tensor) -> None:
            source.memory.release_weights(layer)

        # What enters a layer gets its gradient when the layer has been gone back through.
        passed = hidden.view_as(hidden)
        passed.register_hook(done)
        return checkpoint(lambda x: forward(x, **keywords), passed, use_reentrant=True, preserve_rng_state=False)

    return run
