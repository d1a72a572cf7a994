"""The loss: KL divergence of a quantized head's predictions from the original's, without holding all logits."""

from typing import Any

import torch

from mgptq_export.recovery.matrix import BlockMatrix, Factors

__all__ = ["divergence"]

# Large enough for an efficient product with the head, and how many of those rows fit the processor's caches at once.
POSITIONS, CACHED_LOGITS = 1024, 1 << 16
VOCABULARY_PIECE = 4096


def divergence(
    hidden: torch.Tensor, matrix: BlockMatrix, original: torch.Tensor, original_head: torch.Tensor
) -> torch.Tensor:
    """Mean of KL(original || quantized) over positions, in nats.

    Products are computed in the type of ``original_head``. Differentiable in ``hidden`` and the head's scales.

    Args:
        hidden: what the quantized head reads, [positions, columns].
        matrix: the quantized head, in natural column order.
        original: what the original head reads, [positions, hidden].
        original_head: [vocabulary, hidden].
    """
    factors, trains = matrix.factors(), torch.is_grad_enabled()
    loss: Any = _Divergence.apply(hidden, factors.scales, factors.minima, matrix, original, original_head, trains)
    return loss


class _Divergence(torch.autograd.Function):
    """All gradients are made on the way forward, where the probabilities are at hand."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        scales: torch.Tensor,
        minima: torch.Tensor | None,
        matrix: BlockMatrix,
        original: torch.Tensor,
        original_head: torch.Tensor,
        trains: bool,
    ) -> torch.Tensor:
        dtype, factors = original_head.dtype, Factors(scales, minima)
        inputs, head = hidden.to(dtype), matrix.weight(factors, dtype)
        logits = torch.empty(len(hidden), len(head), dtype=dtype, device=hidden.device)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for start in range(0, len(hidden), POSITIONS):
            piece = slice(start, start + POSITIONS)
            torch.mm(inputs[piece], head.T, out=logits[piece])
            total += _replace_by_gradients(logits[piece], original[piece].to(dtype) @ original_head.T)
        if trains:
            of_hidden = (logits @ head).to(hidden.dtype)
            ctx.save_for_backward(of_hidden / len(hidden), *_of_factors(logits, inputs, matrix))
        return (total / len(hidden)).float()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        of_hidden, *of_factors = (gradients[0] * saved for saved in ctx.saved_tensors)
        of_minima = of_factors[1] if len(of_factors) > 1 else None
        return of_hidden, of_factors[0], of_minima, None, None, None, None


def _replace_by_gradients(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Put the gradients of the divergences' sum in the place of logits, [positions, vocabulary].

    With z and p the quantized model's logits and probabilities, y and q the original's:
    ``KL = sum q (y - z) - log sum exp y + log sum exp z``, and its gradient in z is ``p - q``.

    Returns:
        the sum, float64.
    """
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    step = max(1, CACHED_LOGITS // logits.shape[1])
    for start in range(0, len(logits), step):
        piece = slice(start, start + step)
        z, y = logits[piece].float(), wanted[piece].float()
        difference = y - z
        p, log_z = _softmax(z)
        q, log_y = _softmax(y)
        total += (torch.linalg.vecdot(q, difference) - log_y + log_z).double().sum()
        logits[piece] = p.sub_(q)
    return total


def _softmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(probabilities, which take the place of the logits; logarithms of the sums of exponentials)."""
    largest = logits.amax(-1, keepdim=True)
    exponentials = logits.sub_(largest).exp_()
    sums = exponentials.sum(-1, keepdim=True)
    return exponentials.div_(sums), (sums.log() + largest).squeeze(-1)


def _of_factors(gradients: torch.Tensor, inputs: torch.Tensor, matrix: BlockMatrix) -> list[torch.Tensor]:
    """Gradients of the head's scales and, where it has any, minima, for the mean over positions."""
    scales, minima = [], []
    for start in range(0, len(matrix.values), VOCABULARY_PIECE):
        rows = slice(start, start + VOCABULARY_PIECE)
        found = matrix.take_gradient(gradients[:, rows].T @ inputs, rows)
        scales.append(found.scales)
        if found.minima is not None:
            minima.append(found.minima)
    return [torch.cat(parts).div_(len(inputs)) for parts in (scales, minima) if parts]
