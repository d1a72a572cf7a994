"""Modules in the place of a model's: linears and embedding compute with a :class:`BlockMatrix`, norms in one pass."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mgptq_export.compute import pieces
from mgptq_export.recovery.matrix import BlockMatrix, Factors

__all__ = ["BlockEmbedding", "BlockLinear", "RootMeanSquareNorm"]


# Rows that are transposed at once: few enough for what is written to stay in the cache until its lines are full.
TRANSPOSED_ROWS = 32


class BlockLinear(nn.Module):
    """``nn.Linear`` on a quantized matrix, computed in ``dtype``."""

    def __init__(self, matrix: BlockMatrix, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.matrix, self.dtype = matrix, dtype
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., columns] to ``dtype`` [..., rows]; with a bias, float32."""
        factors = self.matrix.factors()
        y: Any = _BlockProduct.apply(x, factors.scales, factors.minima, self.matrix, self.dtype)
        return y if self.bias is None else y + self.bias


class BlockEmbedding(nn.Module):
    """``nn.Embedding`` on a quantized matrix; rows are multiplied by ``multiplier``."""

    def __init__(self, matrix: BlockMatrix, multiplier: float) -> None:
        super().__init__()
        self.matrix, self.multiplier = matrix, multiplier

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64 [...] to float32 [..., columns]."""
        factors = self.matrix.factors()
        rows = self.matrix.values[tokens] * self.matrix.spread(functional.embedding(tokens, factors.scales))
        if factors.minima is not None:
            rows = rows - self.matrix.spread(functional.embedding(tokens, factors.minima))
        return rows * self.multiplier


class RootMeanSquareNorm(nn.Module):
    """``x / sqrt(mean(x^2) + epsilon) * (weight + offset)``, computed in float32 and rounded to ``dtype`` once."""

    def __init__(self, weight: torch.Tensor, offset: float, epsilon: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = weight
        self.offset, self.epsilon, self.dtype = offset, epsilon, dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., columns] to ``dtype`` [..., columns]."""
        y: Any = _Norm.apply(x, self.weight + self.offset, self.epsilon, self.dtype)
        return y


class _Norm(torch.autograd.Function):
    """Keeps its input and one number a row, and passes over memory once each way."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float, dtype: torch.dtype) -> torch.Tensor:
        inputs = x.reshape(-1, x.shape[-1])
        y = torch.empty(inputs.shape, dtype=dtype, device=x.device)
        inverses = torch.empty(len(inputs), 1, device=x.device)
        for piece in pieces(inputs):
            part = inputs[piece].float()
            inverses[piece] = (part.square().mean(-1, keepdim=True) + epsilon).rsqrt_()
            y[piece] = (part * inverses[piece]).mul_(weight)
        ctx.save_for_backward(inputs, inverses, weight)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        inputs, inverses, weight = ctx.saved_tensors
        gradient = gradients[0].reshape(inputs.shape)
        of_inputs, of_weight = torch.empty_like(inputs), torch.zeros_like(weight)
        for piece in pieces(inputs):
            normed, part = inputs[piece] * inverses[piece], gradient[piece].float()
            of_weight += (part * normed).sum(0)
            part = part * weight
            along = torch.linalg.vecdot(part, normed).div_(part.shape[1]).unsqueeze(-1)
            of_inputs[piece] = part.sub_(normed.mul_(along)).mul_(inverses[piece])
        return of_inputs.view(gradients[0].shape), of_weight, None, None


class _BlockProduct(torch.autograd.Function):
    """``x @ weight.T`` that keeps its input in ``dtype``; the weights are made anew on the way back."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        scales: torch.Tensor,
        minima: torch.Tensor | None,
        matrix: BlockMatrix,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        inputs = x.reshape(-1, x.shape[-1]).to(dtype)
        weight = matrix.weight(Factors(scales, minima), dtype)
        ctx.save_for_backward(inputs, scales, minima)
        ctx.matrix, ctx.shape, ctx.dtype = matrix, x.shape, x.dtype
        return (inputs @ weight.T).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        inputs, scales, minima = ctx.saved_tensors
        weight = ctx.matrix.weight(Factors(scales, minima), inputs.dtype)
        gradient = gradients[0].reshape(-1, len(weight))
        of_factors = ctx.matrix.take_gradient(_transposed(gradient) @ inputs)
        of_inputs = (gradient @ weight).to(ctx.dtype).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return of_inputs, of_factors.scales, of_factors.minima, None, None


def _transposed(matrix: torch.Tensor) -> torch.Tensor:
    """A contiguous copy: products whose left side is not contiguous take two to three times as long."""
    copy = matrix.new_empty(matrix.shape[::-1])
    for start in range(0, len(matrix), TRANSPOSED_ROWS):
        piece = slice(start, start + TRANSPOSED_ROWS)
        copy[:, piece] = matrix[piece].T
    return copy
