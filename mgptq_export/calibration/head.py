"""The way back through a model's head, without holding the logits of all positions."""

from collections.abc import Callable

import torch
from torch import nn

from mgptq_export.compute import pieces

__all__ = ["backward_through_head"]

LOGITS_AT_ONCE = 1 << 24


def backward_through_head(
    hidden: torch.Tensor,
    head: nn.Linear,
    loss_of: Callable[..., torch.Tensor],
    reference: tuple[torch.Tensor, nn.Linear] | None = None,
) -> float:
    """Compute a loss that is a sum over positions, and its gradients in what ``hidden`` was made of.

    Args:
        hidden: what the head reads, float [positions, hidden], with its history.
        head: its weights are frozen.
        loss_of: from logits, float32 [some positions, vocabulary], to these positions' share of the loss. With a
            reference its logits follow, float [some positions, vocabulary].
        reference: what another head reads at the same positions, and that head.

    Returns:
        the loss.
    """
    # Logits are gone before the way back through the layers, which needs that room.
    total, gradient = _through_head(hidden.detach(), head, loss_of, reference)
    hidden.backward(gradient)
    return total


def _through_head(
    hidden: torch.Tensor,
    head: nn.Linear,
    loss_of: Callable[..., torch.Tensor],
    reference: tuple[torch.Tensor, nn.Linear] | None,
) -> tuple[float, torch.Tensor]:
    """The loss and its gradient in ``hidden``."""
    total, gradient = 0.0, torch.empty_like(hidden)
    at_once = max(1, LOGITS_AT_ONCE // head.out_features)
    for start in range(0, len(hidden), at_once):
        span = slice(start, start + at_once)
        read = hidden[span].requires_grad_(True)
        logits = head(read)
        with torch.no_grad():
            others = [] if reference is None else [reference[1](reference[0][span])]
        loss, towards_logits = _loss_and_gradient(loss_of, logits.detach(), *others)
        logits.backward(towards_logits)
        assert read.grad is not None
        gradient[span] = read.grad
        total += loss
    return total, gradient


def _loss_and_gradient(
    loss_of: Callable[..., torch.Tensor], logits: torch.Tensor, *others: torch.Tensor
) -> tuple[float, torch.Tensor]:
    """A loss and its gradient in logits, which take several times their memory in float32 on the way."""
    total, gradient = 0.0, torch.empty_like(logits)
    for piece in pieces(logits):
        own = logits[piece].float().requires_grad_(True)
        loss = loss_of(own, *(other[piece] for other in others))
        loss.backward()  # type: ignore[no-untyped-call]
        assert own.grad is not None
        gradient[piece] = own.grad
        total += loss.item()
    return total, gradient
