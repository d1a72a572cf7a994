"""Perplexity, KL divergence and top-1 agreement against the original model."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mgptq_runtime.errors import BadInputError, NumericalError
from mgptq_runtime.progress import report, stage, track

__all__ = ["Quality", "Scorer", "evaluate", "evaluation_windows", "torch_scorer"]

Scorer = Callable[[torch.Tensor, int], torch.Tensor]
"""int64 [1, sequence] tokens, and of how many positions at their end, to logits: float32 [positions, vocabulary]."""

# Arithmetic in float64 on so few positions stays in the cache; on all at once it takes more than twice as long.
POSITIONS = 4


@dataclass(frozen=True)
class Quality:
    """Attributes:
    perplexity: over the second half of every window.
    tokens: scored.
    kl_divergence: mean of KL(original || this) in nats per token.
    top1_agreement: share of tokens whose most likely continuation is the original's.
    """

    perplexity: float
    tokens: int
    kl_divergence: float
    top1_agreement: float

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


def evaluation_windows(tokens: list[int], window: int, count: int) -> torch.Tensor:
    """The first ``count`` windows: int64 [windows, window].

    Raises:
        BadInputError: the text is shorter than one window.
    """
    available = len(tokens) // window
    if available < 1:
        raise BadInputError(f"the evaluation text has {len(tokens)} tokens, fewer than one window of {window}")
    count = min(count, available)
    return torch.tensor(tokens[: count * window]).view(count, window)


def torch_scorer(model: Any) -> Scorer:
    """Score with a transformers model."""
    # Code that a model brings may compute all logits always.
    takes_count = "logits_to_keep" in inspect.signature(model.forward).parameters

    @torch.no_grad()
    def score(tokens: torch.Tensor, positions: int) -> torch.Tensor:
        options = {"logits_to_keep": positions} if takes_count else {}
        logits = model(tokens.to(model.device), use_cache=False, **options).logits
        return logits[0, -positions:].float().cpu()

    return score


@stage("evaluate")
def evaluate(
    windows: torch.Tensor, reference: Scorer, scorers: Mapping[str, Scorer], title: str = "Evaluating"
) -> dict[str, Quality]:
    """Compare scorers with the original on the second half of every window, given the first half.

    Args:
        windows: int64 [windows, window].
        reference: the original model.
        scorers: by name.

    Returns:
        the quality of every scorer, and of the reference under the name ``original``.

    Raises:
        NumericalError: a loss beyond all bounds.
    """
    names = ["original", *scorers]
    losses = dict.fromkeys(names, 0.0)
    divergences = dict.fromkeys(names, 0.0)
    agreements = dict.fromkeys(names, 0)
    shown = next(iter(scorers), "original")
    half = windows.shape[1] // 2
    scored = windows.shape[0] * (windows.shape[1] - half)
    with track(title, windows.shape[0] * len(names)) as advance:
        for count, window in enumerate(windows, 1):
            targets = window[half:]
            original = list(_log_probabilities(reference, window))
            for name in names:
                predicted = original if name == "original" else _log_probabilities(scorers[name], window)
                for p, q, target in zip(original, predicted, targets.split(POSITIONS), strict=True):
                    losses[name] -= float(q.gather(1, target[:, None]).sum())
                    divergences[name] += float((p.exp() * (p - q)).sum())
                    agreements[name] += int((q.argmax(-1) == p.argmax(-1)).sum())
                advance()
            report(f"KL divergence of {shown} {divergences[shown] / (count * len(targets)):.4f}")
    return {
        name: Quality(
            _perplexity(losses[name] / scored, name),
            scored,
            divergences[name] / scored,
            agreements[name] / scored,
        )
        for name in names
    }


def _log_probabilities(scorer: Scorer, window: torch.Tensor) -> Iterator[torch.Tensor]:
    """Of a window's second half, int64 [window]: float64 [positions, vocabulary], a few positions at a time."""
    # The last token is predicted, and predicts nothing that is scored.
    logits = scorer(window[None, :-1], len(window) - len(window) // 2)
    return (torch.log_softmax(some.double(), -1) for some in logits.split(POSITIONS))


def _perplexity(loss: float, name: str) -> float:
    try:
        return math.exp(loss)
    except OverflowError as error:
        raise NumericalError(f"{name}: {loss:g} nats per token have no perplexity; check the model") from error
