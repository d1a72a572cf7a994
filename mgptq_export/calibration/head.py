"""The way back through a model's head, without holding the logits of all positions."""

from collections.abc import Callable

import torch
from torch import nn

__all__ = ["backward_through_head"]

LOGITS_AT_ONCE = 1 << 24


def backward_through_head(
    hidden: torch.Tensor, head: nn.Linear, loss_of: Callable[[torch.Tensor, slice], torch.Tensor]
) -> float:
    """Compute a loss that is a sum over positions, and its gradients in what ``hidden`` was made of.

    Args:
        hidden: what the head reads, float [positions, hidden], with its history.
        head: its weights are frozen.
        loss_of: from logits, float32 [some positions, vocabulary], and these positions to their share of the loss.

    Returns:
        the loss.
    """
    total, gradient = 0.0, torch.empty_like(hidden)
    at_once = max(1, LOGITS_AT_ONCE // head.out_features)
    for start in range(0, len(hidden), at_once):
        piece = slice(start, min(start + at_once, len(hidden)))
        read = hidden[piece].detach().requires_grad_(True)
        loss = loss_of(head(read).float(), piece)
        loss.backward()  # type: ignore[no-untyped-call]
        assert read.grad is not None
        gradient[piece] = read.grad
        total += loss.item()
    hidden.backward(gradient)
    return total
