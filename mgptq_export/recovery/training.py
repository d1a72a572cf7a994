"""End-to-end training of all that is not a code."""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean

import torch

from mgptq_export.compute import compute_dtype
from mgptq_export.distributed import ALONE, World
from mgptq_export.journal import FORGETFUL, Journal, Record
from mgptq_export.models import SourceModel, load_quantized_weights
from mgptq_export.recovery.optimizer import RelativeAdam, Trained, cosine
from mgptq_export.recovery.student import Student, trainable
from mgptq_export.recovery.teacher import Teacher
from mgptq_runtime.errors import NumericalError
from mgptq_runtime.progress import report, track
from mgptq_runtime.quantized_model import QuantizedModel

__all__ = ["Recovered", "recover"]

logger = logging.getLogger(__name__)

WARM_UP_SHARE = 0.05
# On how many batches it is checked that recovery helps: one for so many steps, and no more than this.
STEPS_PER_CHECKED_BATCH, CHECKED_BATCHES = 8, 4
KEPT_EVERY = 10
# In nats per token. Below it steps are shorter: where little is lost, as at 4 bits, long ones lose more.
LOSS_AT_FULL_RATE = 0.5
# Whose mean loss is shown on the way.
SHOWN_STEPS = 10


@dataclass(frozen=True)
class Recovered:
    """Attributes:
    model: the recovered model.
    divergences: KL(original || quantized) of every step's batch before the step, in nats per token.
    """

    model: QuantizedModel
    divergences: tuple[float, ...] = ()

    @property
    def steps(self) -> int:
        """That were taken."""
        return len(self.divergences)


def recover(
    source: SourceModel,
    original: SourceModel,
    quantized: QuantizedModel,
    tokens: torch.Tensor,
    *,
    steps: int = 0,
    minutes: float | None = None,
    batch_tokens: int = 2048,
    learning_rate: float = 0.005,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    journal: Journal = FORGETFUL,
) -> Recovered:
    """Bring a quantized model's predictions closer to the original's.

    The scales of all blocks, the norms and the biases are trained on the KL divergence of the next token's
    distribution from the original's; codes, formats and permutations stay. Of K-quants the blocks' two scales are
    trained, their sub-blocks' integers stay. The same seed, machine and number of threads give the same model.

    Args:
        source: holds the weights of ``quantized``, dequantized; afterwards those of the returned model.
        original: a model that computes what the unquantized one does; its channels may be numbered otherwise.
        quantized: the model to train.
        tokens: the text, int64 [sequences, length]; drawn in random order, several times where it is short.
        steps: of the optimizer; none return ``quantized``.
        minutes: take as many steps as fit in, instead of ``steps``, one at least. Give ``steps`` what the result says
            to get the same model again.
        batch_tokens: per step, in whole sequences, one at least.
        learning_rate: the largest change of a scale in a step, relative to its size; less by the root of the loss
            where that is below :data:`LOSS_AT_FULL_RATE`.
        seed: of the order of the text.
        dtype: of matrix products; by default bfloat16 where the machine has it, else float32.
        journal: steps that have been taken before, and where to keep those that are now.

    Returns:
        the trained model and the steps taken; ``quantized`` itself, with a warning, where training did not lower the
        loss.

    Raises:
        NumericalError: the loss is NaN or infinite.
    """
    if steps <= 0 and minutes is None:
        return Recovered(quantized)
    dtype = dtype or compute_dtype(source.model.device)
    per_step, world = max(1, batch_tokens // tokens.shape[1]), source.world
    with trainable(source, quantized, dtype) as student:
        if minutes is not None:
            seconds, batch = 60 * minutes, tokens[:per_step].to(source.model.device)
            fitting = partial(_steps_within, seconds, student, original, batch, dtype)
            steps = journal.once("recovery-steps", lambda: Record(facts=fitting())).facts
        chosen, batches = _draw(len(tokens), steps, per_step, seed, world)
        tokens = tokens[chosen].to(source.model.device)
        losses = _Losses(student, Teacher(original, tokens, dtype), tokens, per_step)
        checked = batches[: min(CHECKED_BATCHES, max(1, steps // STEPS_PER_CHECKED_BATCH))]
        before = losses.mean(checked)
        divergences = _train(student, losses, batches, learning_rate * _share_of_rate(before), journal)
        student.round()
        after = losses.mean(checked)
        logger.debug("recovery: KL divergence %.4f before, %.4f after", before, after)
        report(f"KL divergence {before:.4f} before, {after:.4f} after")
        result = student.result() if after < before else quantized
    if result is quantized:
        logger.warning("recovery did not lower the loss (%.4f before, %.4f after); nothing was changed", before, after)
    load_quantized_weights(source, result)
    return Recovered(result, divergences)


def _share_of_rate(loss: float) -> float:
    """A loss is about quadratic in the scales' errors, so its root says how far they have to go."""
    return min(1.0, math.sqrt(max(loss, 0.0) / LOSS_AT_FULL_RATE))


def _steps_within(
    seconds: float, student: Student, original: SourceModel, batch: torch.Tensor, dtype: torch.dtype
) -> int:
    """How many steps on batches like this one take so long; nothing is trained."""
    trained, world = student.trained(), student.source.world

    def gradients() -> None:
        losses = _Losses(student, Teacher(original, batch, dtype), batch, len(batch))
        losses.on(world.share(torch.arange(len(batch))))[0].backward()
        _sum_gradients(trained, world)

    gradients()  # the first one takes longer
    start = time.monotonic()
    gradients()
    each = time.monotonic() - start
    for one in trained:
        one.values.grad = None
    return world.from_first(lambda: max(1, int(seconds / each)))


class _Losses:
    """The loss on a batch of ``per_step`` sequences, of which this rank has those with the given numbers."""

    def __init__(self, student: Student, teacher: Teacher, tokens: torch.Tensor, per_step: int) -> None:
        self._student, self._teacher, self._tokens = student, teacher, tokens
        self._per_step = per_step

    def on(self, batch: torch.Tensor) -> tuple[torch.Tensor, float]:
        """The differentiable part that is this rank's, and the whole loss."""
        loss = self._share(batch) if len(batch) else torch.zeros((), device=self._tokens.device, requires_grad=True)
        whole = loss.detach().clone()
        self._student.source.world.sum_(whole)
        if not math.isfinite(whole.item()):
            raise NumericalError(
                f"the loss of recovery is {whole.item()}; take a lower learning rate, or check the model and the text"
            )
        return loss, whole.item()

    def _share(self, batch: torch.Tensor) -> torch.Tensor:
        states = self._teacher.states[batch.to(self._teacher.states.device)].to(self._tokens.device)
        head = self._teacher.head.to(self._tokens.device)
        mean = self._student.loss(self._tokens[batch.to(self._tokens.device)], states, head)
        return mean * (len(batch) / self._per_step)

    @torch.no_grad()
    def mean(self, batches: list[torch.Tensor]) -> float:
        """Mean loss over batches."""
        return sum(self.on(batch)[1] for batch in batches) / len(batches)


def _draw(
    sequences: int, steps: int, per_step: int, seed: int, world: World = ALONE
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The sequences that this rank uses, and its part of every batch as places among these.

    All sequences come once before any comes again.
    """
    generator = torch.Generator().manual_seed(seed)
    wanted = steps * per_step
    epochs = [torch.randperm(sequences, generator=generator) for _ in range(math.ceil(wanted / sequences))]
    mine = [world.share(batch) for batch in torch.cat(epochs)[:wanted].split(per_step)]
    chosen, places = torch.cat(mine).unique(return_inverse=True)
    if not len(chosen):  # more ranks than sequences in a batch; the teacher cannot read nothing
        chosen = torch.zeros(1, dtype=torch.int64)
    return chosen, list(places.split([len(batch) for batch in mine]))


def _train(
    student: Student, losses: _Losses, batches: list[torch.Tensor], learning_rate: float, journal: Journal
) -> tuple[float, ...]:
    """Take all steps that the journal does not hold: the loss of each batch."""
    trained = student.trained()
    optimizer = RelativeAdam(trained)
    steps = len(batches)
    warm_up = int(steps * WARM_UP_SHARE)
    taken = journal.get("recovery")
    divergences: list[float] = []
    if taken:
        divergences = taken.facts
        optimizer.restore(taken.arrays, len(divergences))
    done = len(divergences)
    with track("Recovering", steps) as advance:
        for step, batch in enumerate(batches):
            if step < done:
                advance()
                continue
            loss, whole = losses.on(batch)
            loss.backward()
            _sum_gradients(trained, student.source.world)
            optimizer.step(learning_rate * cosine(step, steps, warm_up))
            divergences.append(whole)
            logger.debug("recovery step %d: KL divergence %.4f", step, whole)
            report(f"KL divergence {mean(divergences[-SHOWN_STEPS:]):.4f}")
            if (step + 1) % KEPT_EVERY == 0:
                journal.put("recovery", Record(optimizer.state(), divergences))
            advance()
    return tuple(divergences)


def _sum_gradients(trained: Sequence[Trained], world: World) -> None:
    """Give every rank the gradients of the whole batch."""
    if world.size == 1:
        return
    for one in trained:
        gradient = torch.zeros_like(one.values) if one.values.grad is None else one.values.grad
        world.sum_(gradient)
        one.values.grad = gradient
