"""Modules that compute with a :class:`BlockMatrix` in the place of a model's linears and embedding."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mgptq_export.recovery.matrix import BlockMatrix, Factors, block_sums, dequantize

__all__ = ["BlockEmbedding", "BlockLinear"]


class BlockLinear(nn.Module):
    """``nn.Linear`` on a quantized matrix: float32 in and out, the product in ``dtype``."""

    def __init__(self, matrix: BlockMatrix, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.matrix, self.dtype = matrix, dtype
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [..., columns] to float32 [..., rows]."""
        factors = self.matrix.factors()
        y: Any = _BlockProduct.apply(x, factors.scales, factors.minima, self.matrix, self.dtype)
        return y if self.bias is None else y + self.bias


class BlockEmbedding(nn.Module):
    """``nn.Embedding`` on a quantized matrix in natural column order; rows are multiplied by ``multiplier``."""

    def __init__(self, matrix: BlockMatrix, multiplier: float) -> None:
        super().__init__()
        self.matrix, self.multiplier = matrix, multiplier

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64 [...] to float32 [..., columns]."""
        factors = self.matrix.factors()
        scales = functional.embedding(tokens, factors.scales).unsqueeze(-1)
        rows = self.matrix.values[tokens].view(*scales.shape[:-1], -1) * scales
        if factors.minima is not None:
            rows = rows - functional.embedding(tokens, factors.minima).unsqueeze(-1)
        return rows.flatten(-2)[..., : self.matrix.linear.columns] * self.multiplier


class _BlockProduct(torch.autograd.Function):
    """``x @ weight.T`` that keeps only its input: the weights are dequantized again on the way back."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        scales: torch.Tensor,
        minima: torch.Tensor | None,
        matrix: BlockMatrix,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        inputs = x.reshape(-1, x.shape[-1])
        if matrix.permutation is not None:
            inputs = inputs.index_select(1, matrix.permutation)
        inputs = functional.pad(inputs.to(dtype), (0, matrix.values.shape[1] - inputs.shape[1]))
        weight = dequantize(matrix.values, Factors(scales, minima), dtype)
        ctx.save_for_backward(inputs, scales, minima)
        ctx.matrix, ctx.shape = matrix, x.shape
        return (inputs @ weight.T).float().view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        inputs, scales, minima = ctx.saved_tensors
        matrix, factors = ctx.matrix, Factors(scales, minima)
        gradient = gradients[0].reshape(-1, matrix.linear.rows).to(inputs.dtype)
        of_factors = block_sums(gradient.T @ inputs, matrix.values, factors)
        of_inputs = None
        if ctx.needs_input_grad[0]:
            weight = dequantize(matrix.values, factors, inputs.dtype)
            of_inputs = (gradient @ weight)[:, : matrix.linear.columns].float()
            if matrix.inverse is not None:
                of_inputs = of_inputs.index_select(1, matrix.inverse)
            of_inputs = of_inputs.view(ctx.shape)
        return of_inputs, of_factors[0], of_factors[1] if minima is not None else None, None, None
