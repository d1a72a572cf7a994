"""Adam on numbers whose sizes differ by orders of magnitude: every one moves by shares of its own size."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

__all__ = ["RelativeAdam", "Trained", "cosine"]

BETAS = (0.9, 0.95)
# Of the gradients' size for rows of rare tokens; those of most linears are ten times larger. Below it, steps shrink:
# a row that the text hardly touches would otherwise move as far as any other, by chance.
EPSILON = 3e-6


@dataclass(frozen=True)
class Trained:
    """Attributes:
    values: float32, a leaf that gets gradients.
    unit: float32, what each value is measured in: its size at the start.
    """

    values: torch.Tensor
    unit: torch.Tensor


class RelativeAdam:
    """Adam (https://arxiv.org/abs/1412.6980) on ``theta`` in ``values = start + unit * theta``."""

    def __init__(self, trained: Sequence[Trained]) -> None:
        self._trained = trained
        self._first = [torch.zeros_like(one.values, requires_grad=False) for one in trained]
        self._second = [torch.zeros_like(one.values, requires_grad=False) for one in trained]
        self._steps = 0

    def state(self) -> dict[str, np.ndarray]:
        """What the next steps depend on: values and moments, by name."""
        kinds = {"values": [one.values for one in self._trained], "first": self._first, "second": self._second}
        named = {f"{kind}.{i}": one for kind, tensors in kinds.items() for i, one in enumerate(tensors)}
        return {name: one.detach().cpu().numpy() for name, one in named.items()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, np.ndarray], steps: int) -> None:
        """Be as :meth:`state` was after so many steps."""
        self._steps = steps
        for i, (one, first, second) in enumerate(zip(self._trained, self._first, self._second, strict=True)):
            for kind, tensor in (("values", one.values), ("first", first), ("second", second)):
                tensor.copy_(torch.from_numpy(state[f"{kind}.{i}"]))

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Take one step along the gradients, and clear them."""
        self._steps += 1
        unbiased = [1 - beta**self._steps for beta in BETAS]
        for one, first, second in zip(self._trained, self._first, self._second, strict=True):
            if one.values.grad is None:
                continue
            gradient = one.values.grad * one.unit
            first.lerp_(gradient, 1 - BETAS[0])
            second.lerp_(gradient.square_(), 1 - BETAS[1])
            step = first / (second / unbiased[1]).sqrt_().add_(EPSILON)
            one.values.addcmul_(one.unit, step, value=-rate / unbiased[0])
            one.values.grad = None


def cosine(step: int, steps: int, warm_up: int) -> float:
    """Factor of the learning rate at ``step`` of ``steps``: a linear rise, then half a cosine to zero."""
    if step < warm_up:
        return (step + 1) / (warm_up + 1)
    return 0.5 + 0.5 * math.cos(math.pi * (step - warm_up) / (steps - warm_up))
