"""The calibration set's way through a model, one layer after the other."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import nn

from mgptq_export.compute import TOKENS_AT_ONCE, batches, compute_dtype, computing_in, multiplying_in
from mgptq_export.distributed import ALONE, World
from mgptq_export.hooks import hooked
from mgptq_export.memory import IN_MEMORY, Memory
from mgptq_export.models import SourceModel

__all__ = ["HessianAccumulator", "LayerFlow", "StopForward", "token_weights"]

# A sequence's first token is like no other: in most models it draws the attention of all that follow, and where
# quantized layers distort it the whole text is lost. Of 512 it is one, too few for layers to be fitted to it.
FIRST_TOKEN_WEIGHT = 16
# Where a layer makes such a token, its activation is larger than all others of a text together, by far. Counted as it
# is, it alone would say what blocks lose, and damping, a share of the mean, would hide all other tokens.
LARGEST_WEIGHT = 32768


class HessianAccumulator:
    """``H = 2/n sum x x^T`` over the ``n`` activations that a linear reads (MG-PTQ's ``2 X X^T``).

    Activations are rounded as the linear itself rounds them, to the type that the model is computed in. Tokens count
    as :func:`token_weights` says, and ``n`` is the sum of that.

    Args:
        first_token_weight: how often the first token of every sequence counts.
    """

    def __init__(
        self,
        columns: int,
        device: torch.device,
        world: World = ALONE,
        memory: Memory = IN_MEMORY,
        first_token_weight: int = FIRST_TOKEN_WEIGHT,
    ) -> None:
        self._sum = memory.zeros(columns, columns, device=device)
        self._count = torch.zeros((), dtype=torch.float64)
        self._world = world
        self._weight = first_token_weight

    def add(self, activations: torch.Tensor) -> torch.Tensor:
        """Add activations of whole sequences: float [batch, sequence, columns].

        Returns:
            how much each token counted, float32 [batch, sequence].
        """
        rows = activations.detach().float()
        weights = token_weights(rows, self._weight)
        add_products(self._sum, rows, rows, weights)
        self._count += weights.cpu().double().sum()
        return weights

    def take(self) -> torch.Tensor:
        """The Hessian of what all ranks have added, float32 [columns, columns]; once, as it lies where the sum was."""
        self._world.sum_(self._sum, self._count)
        return self._sum.mul_(self.scale)

    @property
    def scale(self) -> float:
        """``2/n``, of all ranks once the Hessian has been taken."""
        return 2.0 / max(float(self._count), 1.0)


def token_weights(activations: torch.Tensor, first_token_weight: int = FIRST_TOKEN_WEIGHT) -> torch.Tensor:
    """How much each token counts: 1, and the first of a sequence ``first_token_weight``.

    But none for more than :data:`LARGEST_WEIGHT` tokens whose activation has the median size, sum of squares, of these.

    Args:
        activations: float32 [batch, sequence, columns].

    Returns:
        float32 [batch, sequence].
    """
    sizes = torch.linalg.vecdot(activations, activations)
    weights = torch.ones_like(sizes)
    weights[:, 0] = first_token_weight
    most = LARGEST_WEIGHT * sizes.median()
    return torch.where((most > 0) & (weights * sizes > most), most / sizes, weights)


def add_products(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, weights: torch.Tensor) -> None:
    """Add ``sum w l r^T`` over the tokens of sequences.

    Args:
        total: float32 [m, n].
        left, right: float32 [batch, sequence, m] and [batch, sequence, n].
        weights: float32 [batch, sequence].
    """
    weighted = left * weights.unsqueeze(-1)
    with multiplying_in(compute_dtype(total.device)):
        total.addmm_(weighted.flatten(0, 1).t(), right.flatten(0, 1))


class StopForward(Exception):
    """Enough was seen."""


class LayerFlow:
    """What enters each layer, as the layers before it compute now: hidden states of the calibration set.

    Of the model one layer is in use at a time. Hessians are those of all ranks' tokens.

    Attributes:
        source: the model.
        states: float32 [batch, sequence, hidden] each, overwritten on the way.
    """

    def __init__(self, source: SourceModel, tokens: torch.Tensor) -> None:
        self.source = source
        self._computing = partial(computing_in, compute_dtype(source.model.device), source.model.device)
        with torch.no_grad():
            self._arguments = self._layer_arguments(tokens)
            self.states = self._first_layer_inputs(tokens)

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Go through a layer."""
        for place in range(len(self.states)):
            self.go_through(index, place)

    @torch.no_grad()
    def advance_measuring(self, index: int) -> dict[str, torch.Tensor]:
        """Go through a layer, whose Hessians are measured: float32 [columns, columns] by group name."""
        groups = self.source.layer_groups(index)
        accumulators = {group.name: self._accumulator(group.columns) for group in groups}

        def feed(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
            def add(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
                accumulators[name].add(inputs[0])

            return add

        with hooked(group.first.register_forward_pre_hook(feed(group.name)) for group in groups):
            self.advance(index)
        return {name: accumulator.take() for name, accumulator in accumulators.items()}

    @torch.no_grad()
    def head_hessian(self) -> torch.Tensor:
        """Hessian of the head's input, once all layers have been gone through: float32 [hidden, hidden]."""
        accumulator = self._accumulator(self.source.model.config.hidden_size, first_token_weight=1)
        for state in self.states:
            with self._computing():
                accumulator.add(self.source.model.model.norm(state))
        return accumulator.take()

    @torch.no_grad()
    def go_through(self, index: int, place: int) -> None:
        """Take one batch through a layer, by number."""
        state = self.states[place]
        state.copy_(self.output(index, state))
        self.source.memory.release(state)

    def output(self, index: int, state: torch.Tensor) -> torch.Tensor:
        """What a layer makes of hidden states, float32 [batch, sequence, hidden]."""
        with self._computing():
            output = self.source.layers[index](state, **self._arguments[index])
        return output[0] if isinstance(output, tuple) else output

    def _accumulator(self, columns: int, first_token_weight: int = FIRST_TOKEN_WEIGHT) -> HessianAccumulator:
        source = self.source
        return HessianAccumulator(columns, source.model.device, source.world, source.memory, first_token_weight)

    def _first_layer_inputs(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """Hidden states [batch, sequence, hidden] that enter the first layer."""
        states: list[torch.Tensor] = []

        def catch(module: nn.Module, inputs: tuple[torch.Tensor, ...], keywords: dict[str, Any]) -> None:
            states.append(self.source.memory.keep(inputs[0] if inputs else keywords["hidden_states"]))
            raise StopForward

        with hooked([self.source.layers[0].register_forward_pre_hook(catch, with_kwargs=True)]):
            for batch in batches(tokens, TOKENS_AT_ONCE, self.source.tokens_at_once):
                with suppress(StopForward):
                    self.source.model.model(batch.to(self.source.model.device), use_cache=False)
        return states

    def _layer_arguments(self, tokens: torch.Tensor) -> list[dict[str, Any]]:
        """What every layer gets beside the hidden states; of one sequence, which fits a batch of any size."""
        arguments: list[dict[str, Any]] = []

        def catch(module: nn.Module, inputs: tuple[torch.Tensor, ...], keywords: dict[str, Any]) -> None:
            arguments.append({name: value for name, value in keywords.items() if name != "hidden_states"})

        with hooked([layer.register_forward_pre_hook(catch, with_kwargs=True) for layer in self.source.layers]):
            self.source.model.model(tokens[:1].to(self.source.model.device), use_cache=False)
        return arguments
