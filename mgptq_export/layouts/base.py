"""A layout: how quantized weights may lie in files, which decides what competes for bits and how it is solved."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Protocol

import numpy as np
import torch

from mgptq_export.allocation import (
    Allocation,
    AllocationProblem,
    Decision,
    Trial,
    allocate_by_gnn,
    allocate_by_hessian,
    allocate_uniformly,
)
from mgptq_export.calibration import ModelStatistics
from mgptq_export.families import GroupModules
from mgptq_export.journal import Record
from mgptq_export.models import SourceModel
from mgptq_export.recipe import Recipe
from mgptq_runtime.errors import BudgetError
from mgptq_runtime.quantized_model import InputGroup, QuantizedLinear, Segment

__all__ = [
    "BITS_WINDOW",
    "Allocated",
    "Attempt",
    "Calibration",
    "Layout",
    "Reach",
    "SolvedGroup",
    "check_delivered",
    "decide",
    "stacked_rows",
]

BITS_WINDOW = 0.05
# How far the allocator network's first proposal goes where layers do not make up for those before them. All of the way
# gained hardly anything on text held out there: docs/method.md, "Only rounding is blamed".
FIRST_STEP_WITHOUT_DRIFT_CORRECTION = 0.5


@dataclass(frozen=True)
class Calibration:
    """What the later steps know of the model on the calibration set.

    Attributes:
        tokens: int64 [samples, sequence].
        held_out: int64 [sequences, sequence], those that ``statistics`` have not seen, where there are enough.
        text: what recovery trains on: ``tokens``, and all the rest of the text, int64 [samples, sequence].
        statistics: Hessians and sensitivities, in the model's (reordered) numbering.
        orders: for every input group the order of its columns, most important first: int64 [columns].
        text_name: what the recipe names, as files say it.
        text_sha256: of the text file, None where it is none.
    """

    tokens: torch.Tensor
    held_out: torch.Tensor
    text: torch.Tensor
    statistics: ModelStatistics
    orders: Mapping[str, torch.Tensor]
    text_name: str
    text_sha256: str | None


@dataclass(frozen=True)
class Allocated:
    """Attributes:
    decision: the format of every block of every linear, and why.
    orders: for every input group the order in which its columns are stored: int64 [columns].
    tables: the format of every block of embedding and head, or of the whole matrix, by their names.
    bits: stored bits per linear weight that there was room for.
    """

    decision: Decision
    orders: Mapping[str, torch.Tensor]
    tables: Allocation
    bits: float

    @property
    def formats(self) -> Allocation:
        """The format of every block of every linear."""
        return self.decision.formats

    def to_record(self) -> Record:
        """For a journal."""
        facts = {**asdict(self.decision), "tables": self.tables, "bits": self.bits}
        return Record({name: order.cpu().numpy() for name, order in self.orders.items()}, facts)

    @classmethod
    def from_record(cls, record: Record, device: torch.device) -> "Allocated":
        """What :meth:`to_record` gave."""
        facts = record.facts
        formats, tables = (
            {name: tuple(blocks) for name, blocks in facts[kind].items()} for kind in ("formats", "tables")
        )
        decision = Decision(formats, facts["losses"], tuple(facts["divergences"]))
        orders = {name: torch.from_numpy(order).to(device) for name, order in record.arrays.items()}
        return cls(decision, orders, tables, facts["bits"])


@dataclass(frozen=True)
class SolvedGroup:
    """Attributes:
    group: the quantized input group.
    damping: what its Hessian's diagonal got, relative to its mean; the most, where it was factorized more than once.
    """

    group: InputGroup
    damping: float


Attempt = Callable[[Allocated], Trial]
"""Quantizes the model as told, and measures it."""


@dataclass(frozen=True)
class Reach:
    """What stored bits per weight a layout can deliver for a model.

    Attributes:
        lowest, highest: over all linears; with a mixed embedding over it and the head as well.
        weights: how many these are.
        mixed: whether embedding and head are among them.
        formats: for every kind of linear (``attn_q``) the formats that it can have.
        excluded: for every kind of linear the formats that it cannot have, and why.
        tables: for ``token_embd`` and, where that is another matrix, ``output`` the formats that it can have.
    """

    lowest: float
    highest: float
    weights: int
    mixed: bool
    formats: Mapping[str, tuple[str, ...]]
    excluded: Mapping[str, Mapping[str, str]]
    tables: Mapping[str, tuple[str, ...]]

    def includes(self, bits: float) -> bool:
        """Whether something in (bits - BITS_WINDOW, bits] can be delivered, as far as the extremes tell."""
        return self.lowest <= bits < self.highest + BITS_WINDOW


class Layout(Protocol):
    """One way to lay weights out.

    Attributes:
        name: ``columns`` or ``tensors``.
        folder: of the checkpoint in a package.
    """

    name: str
    folder: str

    def reach(self, source: SourceModel, recipe: Recipe) -> Reach:
        """What can be delivered.

        Raises:
            BudgetError: a matrix that no format can hold.
        """
        ...

    def allocate(self, source: SourceModel, calibration: Calibration, recipe: Recipe, attempt: Attempt) -> Allocated:
        """Decide who gets how many bits.

        Args:
            attempt: what the ``gnn`` allocator learns from.

        Raises:
            BudgetError: the bits cannot be delivered in (bits - BITS_WINDOW, bits], and no size was asked for.
        """
        ...

    def solve_group(
        self, group: GroupModules, hessian: torch.Tensor, allocated: Allocated, recipe: Recipe
    ) -> SolvedGroup:
        """Quantize an input group on the inputs that made ``hessian``, float32 [columns, columns]."""
        ...

    def solve_table(
        self, name: str, weight: torch.Tensor, hessian: torch.Tensor, formats: Sequence[str], recipe: Recipe
    ) -> QuantizedLinear:
        """Quantize embedding or head, float32 [vocabulary, hidden]; its columns keep their order.

        Args:
            formats: of every block, or of the whole matrix.
        """
        ...


def decide(
    problem: AllocationProblem,
    recipe: Recipe,
    attempt: Attempt,
    check: Callable[[Allocation], None],
    settled: Callable[[Decision], Allocated],
) -> Allocated:
    """Solve an allocation problem with the recipe's allocator.

    Args:
        attempt: what ``gnn`` learns from.
        check: raises where an allocation falls short of what was asked for; called before any is tried.
        settled: adds what is known besides.
    """
    if recipe.allocator == "gnn":

        def tried(formats: Allocation) -> Trial:
            check(formats)
            return attempt(settled(Decision(formats)))

        first_step = 1.0 if recipe.drift_correction else FIRST_STEP_WITHOUT_DRIFT_CORRECTION
        decision = allocate_by_gnn(problem, tried, recipe.trials, recipe.training_steps, recipe.seed, first_step)
    else:
        decision = allocate_by_hessian(problem) if recipe.allocator == "hessian" else allocate_uniformly(problem)
    check(decision.formats)
    return settled(decision)


def check_delivered(delivered: float, recipe: Recipe, unit: str) -> None:
    """Raise BudgetError where the stored bits per weight fell short of what was asked for.

    Bits that stand for a size are a bound, and whatever fits best is what was asked for.
    """
    if recipe.size is None and delivered <= recipe.bits - BITS_WINDOW:
        raise BudgetError(
            f"{recipe.bits} stored bits per weight cannot be met closely: {unit} of this model are so coarse that the "
            f"{recipe.allocator} allocator comes to {delivered:.4f}; ask for that, or try another --allocator"
        )


def stacked_rows(parts: Sequence[QuantizedLinear]) -> QuantizedLinear:
    """One matrix of parts that were solved alike, each some rows of it."""
    segments = tuple(
        Segment(same[0].format, np.concatenate([segment.data for segment in same]))
        for same in zip(*(part.segments for part in parts), strict=True)
    )
    return replace(parts[0], rows=sum(part.rows for part in parts), segments=segments)
