"""Perplexity, KL divergence and top-1 agreement against the original model."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mgptq_runtime.errors import BadInputError, NumericalError
from mgptq_runtime.progress import report, stage, track

__all__ = ["Quality", "Scorer", "evaluate", "evaluation_windows", "torch_scorer"]

Scorer = Callable[[torch.Tensor], torch.Tensor]
"""int64 [1, window] tokens to float32 [window, vocabulary] logits; those of the second half and one before it do."""


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

    @torch.no_grad()
    def score(tokens: torch.Tensor) -> torch.Tensor:
        return model(tokens.to(model.device), use_cache=False).logits[0].float().cpu()

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
    last = slice(half - windows.shape[1] - 1, -1)
    scored = windows.shape[0] * (windows.shape[1] - half)
    with track(title, windows.shape[0] * len(names)) as advance:
        for count, window in enumerate(windows, 1):
            targets = window[half:]
            original = torch.log_softmax(reference(window[None])[last].double(), -1)
            probabilities = original.exp()
            best = original.argmax(-1)
            for name in names:
                if name == "original":
                    predicted = original
                else:
                    predicted = torch.log_softmax(scorers[name](window[None])[last].double(), -1)
                losses[name] -= float(predicted.gather(1, targets[:, None]).sum())
                divergences[name] += float((probabilities * (original - predicted)).sum())
                agreements[name] += int((predicted.argmax(-1) == best).sum())
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


def _perplexity(loss: float, name: str) -> float:
    try:
        return math.exp(loss)
    except OverflowError as error:
        raise NumericalError(f"{name}: {loss:g} nats per token have no perplexity; check the model") from error
