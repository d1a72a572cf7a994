"""How much of a quantized model's loss is each linear's doing."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mgptq_export.calibration.head import backward_through_head
from mgptq_export.compute import batches, compute_dtype, computing_in
from mgptq_export.hooks import hooked
from mgptq_export.models import SourceModel
from mgptq_export.recompute import recomputing
from mgptq_runtime.errors import NumericalError
from mgptq_runtime.progress import track

__all__ = ["Attribution", "attribute"]

# A token takes about twice the memory on the way back.
TOKENS_AT_ONCE = 1024


@dataclass(frozen=True)
class Attribution:
    """Attributes:
    divergence: KL(original || quantized) in nats per token.
    losses: for every linear what its rounding costs of that, float64 [sequences]; of a sum of squares, so that
        together with embedding, head, and what was changed before rounding they come to about the divergence.
    """

    divergence: float
    losses: dict[str, torch.Tensor]


def attribute(
    original: SourceModel,
    quantized: SourceModel,
    tokens: torch.Tensor,
    targets: Mapping[str, torch.Tensor] | None = None,
) -> Attribution:
    """Measure a quantized model, and share the loss out among its linears.

    With T what a linear's weight was rounded from, its original one or one that makes up for drift, and Q the
    quantized one, the loss changes by ``<dL/dQ, T - Q>`` to first order when T is put back. L being near its minimum
    at the original weights, it is about a quadratic form of all differences from them, of which half of that is the
    part of the linear's rounding, its interplay with all others' included.

    Args:
        original: the model.
        quantized: the same with dequantized weights.
        tokens: int64 [sequences, length].
        targets: T by linear, float [rows, columns] on any device; None: the original weights.

    Raises:
        NumericalError: a loss is NaN or infinite.
    """
    device = quantized.model.device
    dtype = compute_dtype(device)
    if targets is None:
        targets = {name: module.weight for group in original.groups() for name, module in group.modules.items()}
    names = [name for group in quantized.groups() for name in group.modules]
    losses = torch.zeros(len(names), len(tokens), dtype=torch.float64)
    parts = batches(tokens, TOKENS_AT_ONCE, quantized.tokens_at_once and quantized.tokens_at_once // 2)
    divergences = torch.zeros(len(parts), dtype=torch.float64)
    pairs = zip(parts, losses.split(len(parts[0]), dim=1), strict=True)
    heads = (original.head_in(dtype), quantized.head_in(dtype))
    mine = quantized.world.share([(place, *pair) for place, pair in enumerate(pairs)])
    with track("Measuring the quantized model", len(mine)) as advance:
        for place, batch, part in mine:
            with _watched(quantized, targets, part), recomputing(quantized), computing_in(dtype, device):
                divergences[place] = _go_back(original.model, quantized.model, heads, batch.to(device))
            advance()
    quantized.world.sum_(losses, divergences)  # exact: what other ranks measure is zero here
    return Attribution(sum(divergences.tolist()) / len(tokens), dict(zip(names, losses, strict=True)))


def _watched(
    quantized: SourceModel, targets: Mapping[str, torch.Tensor], losses: torch.Tensor
) -> AbstractContextManager[None]:
    """Fill ``losses`` [linears, sequences] on the way back of a batch."""
    modules = {name: module for group in quantized.groups() for name, module in group.modules.items()}
    return hooked(
        module.register_forward_hook(_share(targets[name], row))
        for (name, module), row in zip(modules.items(), losses, strict=True)
    )


def _share(target: torch.Tensor, row: torch.Tensor) -> Any:
    """A forward hook that fills ``row`` [sequences] on the way back."""

    def watch(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        x = inputs[0].detach()

        def add(gradient: torch.Tensor) -> None:
            difference: torch.Tensor = module.weight - target.to(module.weight)
            error = nn.functional.linear(x.to(gradient.dtype), difference.to(gradient.dtype))
            row.copy_(0.5 * (error.float() * gradient.float()).sum((1, 2)))

        if output.requires_grad:
            output.register_hook(add)

    return watch


def _go_back(original: Any, quantized: Any, heads: tuple[nn.Linear, nn.Linear], tokens: torch.Tensor) -> float:
    """Sum over sequences of their mean KL divergence, and its gradients in the activations.

    Args:
        heads: of the two models, in the type that is computed in.
    """
    with torch.no_grad():
        originals = original.model(tokens, use_cache=False).last_hidden_state.flatten(0, 1)
    # Weights are frozen: the embedded tokens are where gradients end.
    embedded = quantized.get_input_embeddings()(tokens).requires_grad_(True)
    hidden = quantized.model(inputs_embeds=embedded, use_cache=False).last_hidden_state.flatten(0, 1)

    def divergence(logits: torch.Tensor, original_logits: torch.Tensor) -> torch.Tensor:
        wanted = torch.log_softmax(original_logits.float(), -1)
        found = torch.log_softmax(logits, -1)
        lost = nn.functional.kl_div(found, wanted, reduction="sum", log_target=True) / tokens.shape[1]
        if not torch.isfinite(lost):
            raise NumericalError("the quantized model's logits are NaN or infinite; ask for more bits")
        return lost

    return backward_through_head(hidden, heads[1], divergence, (originals, heads[0]))
