"""Text generation: greedy or sampled, one token at a time."""

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mgptq_runtime.backends import Backend
from mgptq_runtime.errors import BadInputError, NumericalError

__all__ = ["GREEDY", "Sampling", "StopReason", "generate_tokens", "stop_reason"]

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


def _prefill(backend: Backend, prompt: Sequence[int], cache: object) -> np.ndarray:
    """Feed the prompt in pieces, so that its activations need little memory; the last logits: float32 [vocabulary]."""
    ids = np.array([prompt], np.int64)
    for start in range(0, ids.shape[1], PREFILL_TOKENS):
        logits = backend.forward(ids[:, start : start + PREFILL_TOKENS], cache, first_logit=-1)
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
    logits = _prefill(backend, prompt, cache)
    for length in range(len(prompt), min(len(prompt) + max_tokens, backend.context_length)):
        token = _sample(logits, sampling, rng)
        if token in eos_token_ids:
            return
        yield token
        if length + 1 < min(len(prompt) + max_tokens, backend.context_length):
            logits = backend.forward(np.array([[token]], np.int64), cache, first_logit=-1)[0, -1]


def stop_reason(prompt: int, generated: int, *, max_tokens: int, context_length: int) -> StopReason:
    """Why :func:`generate_tokens` ended; where it got what was asked for, that is not the context's doing.

    Args:
        prompt, generated: how many tokens they have.
    """
    if generated >= max_tokens:
        return "max_tokens"
    return "context_full" if prompt + generated >= context_length else "end_of_text"
