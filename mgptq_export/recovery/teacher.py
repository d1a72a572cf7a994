"""The original model's predictions, kept as what its head reads."""

import torch

from mgptq_export.compute import TOKENS_AT_ONCE, batches, computing_in
from mgptq_export.models import SourceModel
from mgptq_runtime.progress import track

__all__ = ["Teacher"]


class Teacher:
    """Predictions on a text, which take one pass and little memory: logits follow from states and head when wanted.

    Attributes:
        states: what the head reads, ``dtype`` [sequences, length, hidden].
        head: ``dtype`` [vocabulary, hidden].
    """

    def __init__(self, original: SourceModel, tokens: torch.Tensor, dtype: torch.dtype) -> None:
        model = original.model
        parts = batches(tokens, TOKENS_AT_ONCE, original.tokens_at_once)
        states = []
        with (
            torch.no_grad(),
            computing_in(dtype, model.device),
            track("Reading with the original", len(parts)) as advance,
        ):
            for batch in parts:
                output = model.model(batch.to(model.device), use_cache=False)
                states.append(output.last_hidden_state.to(dtype))
                advance()
        self.states = original.memory.keep(torch.cat(states))
        self.head = model.lm_head.weight.detach().to(dtype)
