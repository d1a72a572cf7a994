"""Making golden vectors: the dequantized model's answers in float32, for devices to compare with."""

from typing import Any

import numpy as np
import torch

from mgptq_export.hooks import hooked
from mgptq_runtime.golden import GoldenVectors, hidden_digest

__all__ = ["make_golden"]

PROMPTS = 4
LENGTH = 64
TOP = 32


@torch.no_grad()
def make_golden(model: Any, tokens: torch.Tensor) -> GoldenVectors:
    """Run prompts through a model that holds the dequantized weights.

    Args:
        model: a transformers causal language model, float32.
        tokens: int64 [samples, sequence]; the first tokens of the first samples become the prompts.
    """
    prompts = tokens[:PROMPTS, :LENGTH]
    layers: list[torch.Tensor] = []
    handles = [model.model.layers[0].register_forward_pre_hook(lambda module, inputs: layers.append(inputs[0]))]
    for layer in model.model.layers:
        handles.append(
            layer.register_forward_hook(
                lambda module, inputs, output: layers.append(output[0] if isinstance(output, tuple) else output)
            )
        )
    with hooked(handles):
        logits = model(prompts.to(model.device), use_cache=False).logits.float().cpu()
    top = logits.topk(min(TOP, logits.shape[-1]), dim=-1)
    digests = [hidden_digest(layer[:, -1].float().cpu().numpy()) for layer in layers]
    return GoldenVectors(
        token_ids=prompts.to(torch.int32).numpy(),
        top_ids=top.indices.to(torch.int32).numpy(),
        top_logits=top.values.numpy(),
        log_partition=torch.logsumexp(logits.double(), -1).float().numpy(),
        hidden_digests=np.stack(digests),
    )
