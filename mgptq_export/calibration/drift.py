"""What the linears of a model that is being quantized read, and how far that has drifted from the original."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mgptq_export.calibration.flow import HessianAccumulator, LayerFlow, StopForward, add_products
from mgptq_export.families import GroupModules
from mgptq_export.hooks import hooked
from mgptq_export.memory import Memory
from mgptq_export.models import SourceModel

__all__ = ["DriftFlow", "Measured"]


@dataclass(frozen=True)
class Measured:
    """What the linears of an input group read: ``x``, and ``x'`` in the original model, over ``n`` tokens, which
    count as :func:`mgptq_export.calibration.flow.token_weights` of ``x`` says.

    Attributes:
        hessian: ``2/n sum x x^T``, float32 [columns, columns].
        drift: ``2/n sum d x^T``, float32. With ``of_stream``, ``d`` is how far the residual stream lies behind the
            original's once the linear has added to it: [rows, columns]. Otherwise it is ``x' - x``: [columns, columns].
            None where no original is followed.
        of_stream: whether it is the former.
    """

    hessian: torch.Tensor
    drift: torch.Tensor | None
    of_stream: bool

    def behind(self, weight: torch.Tensor) -> torch.Tensor:
        """``2/n sum d x^T``, ``d`` being how far the outputs of a linear lie behind: float32 [rows, columns]."""
        assert self.drift is not None
        return self.drift if self.of_stream else weight @ self.drift


class DriftFlow:
    """The calibration set's way through a model that is being quantized, one layer after the other.

    Args:
        quantized: its embedding is quantized, and every layer before :meth:`leave`.
        original: what it was; None where its drift is of no interest.
        tokens: int64 [sequences, length], of which each rank takes its share through.
    """

    def __init__(self, quantized: SourceModel, original: SourceModel | None, tokens: torch.Tensor) -> None:
        mine = quantized.world.share(tokens)
        self._quantized = LayerFlow(quantized, mine)
        self._original = None if original is None else LayerFlow(original, mine)
        self._references: dict[str, list[torch.Tensor]] = {}
        self._branches: list[_Branch] = []

    @torch.no_grad()
    def enter(self, index: int, *, measuring: bool) -> None:
        """Take the original through a layer.

        Args:
            measuring: whether groups of the layer will be measured.
        """
        if self._original is None:
            return
        source = self._original.source
        points = {group.name: _Point.of(source, index, group) for group in source.layer_groups(index)}
        self._references = {name: [] for name in points} if measuring else {}
        with _recorded(point.shows for point in points.values()) as seen:
            for place, state in enumerate(self._original.states):
                self._original.go_through(index, place)
                for name, kept in self._references.items():
                    shown = points[name].shows
                    kept.append(state if shown is None else source.memory.keep(seen[shown].float()))
        source.memory.release_weights(source.layers[index])

    @torch.no_grad()
    def measure(self, index: int, group: GroupModules) -> Measured:
        """What an input group reads; of its layer, those before it are quantized, itself is not."""
        flow = self._quantized
        point = _Point.of(flow.source, index, group)
        world, memory = flow.source.world, flow.source.memory
        hessian, drift = HessianAccumulator(group.columns, flow.source.model.device, world, memory), None
        reads: list[torch.Tensor] = []
        with _recorded((point.reads, point.shows), last=point.shows if self._original else point.reads) as seen:
            for place, state in enumerate(flow.states):
                output = state
                with suppress(StopForward), self._remembered(place):
                    output = flow.output(index, state)
                read = seen[point.reads]
                weights = hessian.add(read)
                if not group.reads_hidden:
                    reads.append(memory.keep(read))
                if self._original is not None:
                    shown = output if point.shows is None else seen[point.shows]
                    behind = self._references[group.name][place] - shown
                    if drift is None:
                        drift = memory.zeros(behind.shape[-1], group.columns, device=behind.device)
                    add_products(drift, behind, read.float(), weights)
        measured = hessian.take()
        if drift is not None:
            world.sum_(drift)
            drift *= hessian.scale
        self._references.pop(group.name, None)
        if reads:
            self._branches.append(_Branch.of(flow.source, index, group, reads))
        return Measured(measured, drift, point.of_stream)

    @torch.no_grad()
    def leave(self, index: int) -> None:
        """Take the quantized model through the layer."""
        for place in range(len(self._quantized.states)):
            with self._remembered(place):
                self._quantized.go_through(index, place)
        self._branches.clear()

    @contextmanager
    def _remembered(self, place: int) -> Iterator[None]:
        """Branches of the layer that have been measured compute their last linear only, of a batch by number."""
        with ExitStack() as stack:
            for branch in self._branches:
                stack.enter_context(branch.remembered(place, self._quantized.source.memory))
            yield


@dataclass(frozen=True)
class _Point:
    """Where a group shows its drift.

    Attributes:
        reads: the first of its linears.
        shows: what this module reads has drifted; None: what the layer puts out.
    """

    reads: nn.Module
    shows: nn.Module | None

    @property
    def of_stream(self) -> bool:
        return self.shows is not self.reads

    @classmethod
    def of(cls, source: SourceModel, index: int, group: GroupModules) -> "_Point":
        if group.reads_hidden or not source.family.adds_to_stream:
            return cls(group.first, group.first)
        if group.name.endswith("ffn_down"):
            return cls(group.first, None)
        return cls(group.first, source.layers[index].get_submodule(source.family.norms["ffn_norm"]))


@dataclass(frozen=True)
class _Branch:
    """Attention or feed-forward network, which ends in one linear; all before that has its final weights.

    Attributes:
        module: the branch.
        linear: its last one.
        reads: what that reads, by batch.
        answers_alone: whether the branch puts out a tensor, and not a pair with attention weights.
    """

    module: nn.Module
    linear: nn.Module
    reads: list[torch.Tensor]
    answers_alone: bool

    @classmethod
    def of(cls, source: SourceModel, index: int, group: GroupModules, reads: list[torch.Tensor]) -> "_Branch":
        kind = group.name.rpartition(".")[2]
        (path,) = source.family.groups[kind].values()
        module = source.layers[index].get_submodule(path.rpartition(".")[0])
        return cls(module, group.first, reads, answers_alone=kind == "ffn_down")

    @contextmanager
    def remembered(self, place: int, memory: Memory) -> Iterator[None]:
        """Let the branch go on from what its last linear read in a batch."""

        def forward(*arguments: Any, **keywords: Any) -> Any:
            output = self.linear(self.reads[place])
            memory.release(self.reads[place])
            return output if self.answers_alone else (output, None)

        self.module.forward = forward
        try:
            yield
        finally:
            del self.module.forward


@contextmanager
def _recorded(
    modules: Iterable[nn.Module | None], last: nn.Module | None = None
) -> Iterator[dict[nn.Module, torch.Tensor]]:
    """What modules read, filled in while the model computes; after ``last`` it stops."""
    seen: dict[nn.Module, torch.Tensor] = {}

    def record(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen[module] = inputs[0]
        if module is last:
            raise StopForward

    with hooked(module.register_forward_pre_hook(record) for module in {*modules} if module is not None):
        yield seen
