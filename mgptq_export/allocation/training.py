"""Training the allocator network: on what the whole model lost in trials, every format assigned hard."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch_geometric.utils import scatter

from mgptq_export.allocation.budget import cheapest_within, price_for
from mgptq_export.allocation.column_graph import ModelGraph, build_graphs
from mgptq_export.allocation.decision import Decision, losses_of_linears
from mgptq_export.allocation.network import AllocatorNetwork
from mgptq_export.allocation.problem import Allocation, AllocationProblem
from mgptq_export.journal import Record
from mgptq_runtime.errors import NumericalError
from mgptq_runtime.progress import report, track

__all__ = ["Trial", "allocate_by_gnn"]

logger = logging.getLogger(__name__)

LEARNING_RATE = 1e-2
# Part of what is predicted of a tensor that a measurement is doubted by, beside its own standard error.
DOUBT = 0.25
# How far off the network's prediction of a tensor is expected to be, as a logarithm.
SURPRISE = 1.0
# By which factors predictions of tensors may be off, as logarithms.
FACTORS = torch.linspace(-6, 6, 241, dtype=torch.float64)
# A tensor's part of the loss below which it does not matter how far off its prediction is.
NEGLIGIBLE = 1e-9
# A step is how far a proposal follows the network: the exponent of its corrections.
STEP_AFTER_GAIN, STEP_AFTER_LOSS, SHORTER_STEPS = 1.5, 0.5, 3
# What the mean square of the network's corrections costs, beside the surprise of all tensors together.
RIDGE = 100.0


@dataclass(frozen=True)
class Trial:
    """What the model lost under an allocation.

    Attributes:
        divergence: KL(original || quantized) in nats per token.
        losses: by linear, what its own error costs of that, float64 [batches] of text.
    """

    divergence: float
    losses: Mapping[str, torch.Tensor]

    def to_record(self) -> Record:
        """For a journal."""
        return Record({name: losses.numpy() for name, losses in self.losses.items()}, self.divergence)

    @classmethod
    def from_record(cls, record: Record) -> "Trial":
        """What :meth:`to_record` gave."""
        return cls(record.facts, {name: torch.from_numpy(losses) for name, losses in record.arrays.items()})


@dataclass(frozen=True)
class _Lesson:
    """A trial as the network learns it.

    Attributes:
        choice: int64 [units].
        loss: measured, float64 [tensors].
        error: the standard error of that, float64 [tensors].
    """

    choice: torch.Tensor
    loss: torch.Tensor
    error: torch.Tensor


@dataclass(frozen=True)
class _Tried:
    """An assignment that was tried.

    Attributes:
        choice: int64 [units].
        costs: by which it was the cheapest, in nats: float64 [units, formats].
        trial: what came of it.
    """

    choice: torch.Tensor
    costs: torch.Tensor
    trial: Trial


def allocate_by_gnn(
    problem: AllocationProblem,
    attempt: Callable[[Allocation], Trial],
    trials: int,
    steps: int,
    seed: int,
    first_step: float = 1.0,
) -> Decision:
    """Train the network on trials of its own proposals, and take the one that lost least.

    The first trial is the untrained network's, that of the estimated costs. After every trial the network learns to
    predict what each tensor lost, and what it could not predict is taken from the trials as far as they are to be
    trusted; proposed is the cheapest assignment by the costs that are corrected so: as far as told at first, less far
    after a trial that was not the best so far, further after one that was.

    Args:
        attempt: quantizes the model as told, and measures it.
        trials: how many.
        steps: of Adam, before every trial but the first.
        seed: of the network.
        first_step: how far the second trial's proposal goes, from 0, the first trial's costs, to 1, all of the way.

    Raises:
        NumericalError: a score became NaN or infinite.
    """
    costs, sizes = problem.costs(), problem.sizes()
    choice = cheapest_within(costs, sizes, problem.budget, problem.runs())
    if trials < 2 or int(sizes.max(1).values.sum()) <= problem.budget:  # nothing competes, or nothing is to be learnt
        return Decision(problem.allocation(choice), losses_of_linears(problem, choice, costs, costs))
    with track("Trials", trials) as advance:
        trial = attempt(problem.allocation(choice))
        predictor = _Predictor(problem, costs, sizes, choice, trial, seed)
        tried = [_Tried(choice, predictor.costs, trial)]
        step = first_step
        while True:
            best = min(tried, key=lambda one: one.trial.divergence)
            report(f"KL divergence {tried[-1].trial.divergence:.4f}, best {best.trial.divergence:.4f}")
            advance()
            if len(tried) == trials:
                break
            logger.debug("trial %d: KL divergence %.4f", len(tried), tried[-1].trial.divergence)
            corrections = problem.world.from_first(partial(predictor.learn, tried, steps))
            proposed = _propose(problem, sizes, predictor.costs, corrections, step, tried)
            if proposed is None:
                break
            step, choice, corrected = proposed
            trial = attempt(problem.allocation(choice))
            tried.append(_Tried(choice, corrected, trial))
            has_gained = trial.divergence < best.trial.divergence
            step = min(1.0, step * (STEP_AFTER_GAIN if has_gained else STEP_AFTER_LOSS))
    logger.debug("the best trial's KL divergence: %.4f", best.trial.divergence)
    report(f"KL divergence {best.trial.divergence:.4f} in the best trial of {len(tried)}")
    return Decision(
        problem.allocation(best.choice),
        losses_of_linears(problem, best.choice, predictor.costs, best.costs, best.trial.losses),
        tuple(one.trial.divergence for one in tried),
    )


def _propose(
    problem: AllocationProblem,
    sizes: torch.Tensor,
    costs: torch.Tensor,
    corrections: torch.Tensor,
    step: float,
    tried: list[_Tried],
) -> tuple[float, torch.Tensor, torch.Tensor] | None:
    """The cheapest assignment that was not tried, after a step of this length, a shorter one, or else all of the way.

    Returns:
        the step that leads there, the choice, and the costs by which it is the cheapest.
    """
    shorter = [step * STEP_AFTER_LOSS**times for times in range(SHORTER_STEPS + 1)]
    for length in (*shorter, 1.0):
        corrected = costs * (length * corrections).exp()[:, None]
        choice = cheapest_within(corrected, sizes, problem.budget, problem.runs())
        if not any(torch.equal(choice, known.choice) for known in tried):
            return length, choice, corrected
    return None


class _Predictor:
    """The network, and what it starts from.

    Attributes:
        costs: the estimated ones, in nats as the first trial measured them: float64 [units, formats].
    """

    def __init__(
        self,
        problem: AllocationProblem,
        costs: torch.Tensor,
        sizes: torch.Tensor,
        choice: torch.Tensor,
        trial: Trial,
        seed: int,
    ) -> None:
        estimated = float(costs.gather(1, choice[:, None]).sum())
        measured = float(sum(trial.losses[linear.name].mean() for linear in problem.linears))
        measured = max(measured, 1e-9)
        self.costs = costs * (measured / max(estimated, 1e-300))
        self._negligible = NEGLIGIBLE * measured
        self._log_costs = _normalized(self.costs, sizes, price_for(self.costs, sizes, problem.budget, problem.runs()))
        self._problem, self._graph = problem, build_graphs(problem)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._network = AllocatorNetwork(self._graph.features.shape[1], sizes.shape[1])

    def learn(self, tried: list[_Tried], steps: int) -> torch.Tensor:
        """Train on all trials so far: what to add to the logarithms of every unit's costs, float64 [units].

        Empirical Bayes: the network tells what is expected of every tensor before it was measured, and is trained so
        that what was measured is likely; corrections are what is expected after it.
        """
        lessons = [_lesson(self._problem, self._graph, one) for one in tried]
        optimizer = torch.optim.Adam(self._network.parameters(), lr=LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
        with track("Training the allocator", steps) as advance:
            for _ in range(steps):
                loss, _ = self._expected(lessons)
                if not torch.isfinite(loss):
                    raise NumericalError(
                        "the allocator's loss is NaN or infinite; are weights huge or all zero? try another --allocator"
                    )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                advance()
        with torch.no_grad():
            loss, corrections = self._expected(lessons)
        logger.debug("the network's loss: %.2f", loss)
        return corrections

    def _expected(self, lessons: list[_Lesson]) -> tuple[torch.Tensor, torch.Tensor]:
        """The network's loss, and corrections by its answer and by what trials say beyond it: float64 [units].

        The loss is minus the logarithm of how likely it is, up to a constant, that trials lost what they did; and
        :data:`RIDGE`.

        Measured is what the network predicts, times a tensor's factor, off by a normal error: the measurement's
        standard error, and :data:`DOUBT` of the product. The factor's logarithm is normal a priori, of mean 0 and
        standard deviation :data:`SURPRISE`; all is reckoned on the grid of :data:`FACTORS`.
        """
        answer = self._network(self._graph, self._log_costs).double()
        corrected = self.costs * answer.exp()[:, None]
        logarithms = torch.log_softmax(-(FACTORS / SURPRISE).square() / 2, 0)
        for one in lessons:
            predicted = (_tensor_costs(corrected, self._graph, one.choice) + self._negligible)[:, None]
            product = predicted * FACTORS.exp()
            variance = one.error[:, None].square() + (DOUBT * product).square()
            logarithms = logarithms - ((one.loss[:, None] - product).square() / variance + variance.log()) / 2
        of_tensors = logarithms.softmax(1) @ FACTORS
        loss = RIDGE * answer.square().mean() - logarithms.logsumexp(1).sum()
        return loss, answer + of_tensors[self._graph.tensor_of_unit]


def _lesson(problem: AllocationProblem, graph: ModelGraph, one: _Tried) -> _Lesson:
    by_linear = torch.stack([one.trial.losses[linear.name] for linear in problem.linears])
    by_tensor = scatter(by_linear, problem.tensor_of_linear(), dim=0, dim_size=graph.tensors)
    return _Lesson(one.choice, by_tensor.mean(1), _standard_error(by_tensor))


def _standard_error(samples: torch.Tensor) -> torch.Tensor:
    """Of the mean of each row; one sample may be off by as much as it is."""
    count = samples.shape[1]
    return samples.std(1) / count**0.5 if count > 1 else samples.abs().squeeze(1)


def _tensor_costs(costs: torch.Tensor, graph: ModelGraph, choice: torch.Tensor) -> torch.Tensor:
    """What every tensor loses under an assignment: float64 [tensors]."""
    chosen = costs.gather(1, choice[:, None]).squeeze(1)
    return scatter(chosen, graph.tensor_of_unit, dim=0, dim_size=graph.tensors)


def _normalized(costs: torch.Tensor, sizes: torch.Tensor, price: float) -> torch.Tensor:
    """Logarithms of costs in units of what a unit's bits are worth: float32 [units, formats]."""
    return (costs / (price * sizes)).clamp_min(1e-8).log().float() / 4.0
