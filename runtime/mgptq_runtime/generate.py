"""Text generation: greedy or sampled, one token at a time."""

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from mgptq_runtime.backends import Backend
from mgptq_runtime.errors import BadInputError, NumericalError

__all__ = ["GREEDY", "Sampling", "StopReason", "generate_tokens", "prefill", "stop_reason"]

StopReason = Literal["end_of_text", "max_tokens", "context_full"]
PREFILL_TOKENS = 128


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: draw among the k most likely tokens; 0 for all.
        top_p: draw among the most likely tokens that together reach this probability, above 0 and at most 1.
        seed: equal seeds give equal texts.

    Raises:
        BadInputError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise BadInputError(f"temperature is {self.temperature}, allowed are 0 (greedy) to 100")
        if self.top_k < 0:
            raise BadInputError(f"top-k is {self.top_k}, it must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise BadInputError(f"top-p is {self.top_p}, it must be above 0 and at most 1")
        if self.seed < 0:
            raise BadInputError(f"seed is {self.seed}, it must be 0 or more")


GREEDY = Sampling()


def _sample(logits: np.ndarray, sampling: Sampling, rng: np.random.Generator) -> int:
    """Draw a token: float32 [vocabulary] to its id."""
    if not np.isfinite(logits).all():
        raise NumericalError("the model computed NaN or infinity; run: mgptq-run check PACKAGE")
    if sampling.temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    behind = logits[order].astype(np.float64) - np.float64(logits[order[0]])
    with np.errstate(over="ignore"):  # the smallest temperatures leave the most likely token alone
        probabilities = np.exp(behind / sampling.temperature)
    probabilities /= probabilities.sum()
    kept = int(np.searchsorted(np.cumsum(probabilities), sampling.top_p)) + 1
    probabilities = probabilities[:kept] / probabilities[:kept].sum()
    return int(order[rng.choice(len(probabilities), p=probabilities)])


def prefill(backend: Backend, text: Sequence[int], cache: Any) -> np.ndarray:
    """Feed a text in pieces, so that its activations need little memory.

    A text longer than the backend's short context has a first piece that is longer, too: all keys are rotated alike.

    Args:
        text: token ids, at least one.
        cache: an empty one; extended in place.

    Returns:
        the last token's logits, float32 [vocabulary].
    """
    ids = np.array([text], np.int64)
    first = PREFILL_TOKENS if len(text) <= backend.short_context else max(PREFILL_TOKENS, backend.short_context + 1)
    for start, stop in pairwise([0, *range(first, len(text), PREFILL_TOKENS), len(text)]):
        logits = backend.forward(ids[:, start:stop], cache, first_logit=-1)
    return logits[0, -1]


def generate_tokens(
    backend: Backend,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    eos_token_ids: Set[int] = frozenset(),
    sampling: Sampling = GREEDY,
) -> Iterator[int]:
    """Continue a prompt.

    Ends at a token of ``eos_token_ids`` (not yielded), after ``max_tokens``, or when the context is full.

    Args:
        prompt: token ids, at least one and fewer than the model's context.

    Raises:
        BadInputError: a prompt that is empty or too long.
        NumericalError: logits that are not finite.
    """
    if not 0 < len(prompt) < backend.context_length:
        raise BadInputError(
            f"the prompt has {len(prompt)} tokens, it must have 1 to {backend.context_length - 1} (the model's context)"
        )
    rng = np.random.default_rng(sampling.seed)
    cache = backend.new_cache()
    logits = prefill(backend, prompt, cache)
    text, limit = list(prompt), min(len(prompt) + max_tokens, backend.context_length)
    while len(text) < limit:
        token = _sample(logits, sampling, rng)
        if token in eos_token_ids:
            return
        yield token
        text.append(token)
        if len(text) == backend.short_context + 1 and len(text) < limit:
            cache = backend.new_cache()
            logits = prefill(backend, text, cache)
        elif len(text) < limit:
            logits = backend.forward(np.array([[token]], np.int64), cache, first_logit=-1)[0, -1]


def stop_reason(prompt: int, generated: int, *, max_tokens: int, context_length: int) -> StopReason:
    """Why :func:`generate_tokens` ended; where it got what was asked for, that is not the context's doing.

    Args:
        prompt, generated: how many tokens they have.
    """
    if generated >= max_tokens:
        return "max_tokens"
    return "context_full" if prompt + generated >= context_length else "end_of_text"
