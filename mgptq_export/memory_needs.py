"""How much memory a run takes beside what lies in files, and how many tokens therefore go through a model at once."""

from dataclasses import dataclass

from mgptq_export.compute import TOKENS_AT_ONCE
from mgptq_export.models import SourceModel
from mgptq_export.solver import factor_bytes

__all__ = ["Needs", "needs_of"]

# Resident once everything is imported, as tools/measure_memory.py finds it.
LIBRARIES = 450_000_000
# Rows being solved, logits: the same for every model.
PIECES = 150_000_000
# Numbers in float32 that a token takes in a layer, per number of the feed-forward network and of the residual stream.
PER_INTERMEDIATE, PER_HIDDEN = 4, 6


@dataclass(frozen=True)
class Needs:
    """What a model takes in memory while its weights are in files, bytes.

    Attributes:
        layer: weights of one decoder layer, float32.
        factor: of the largest Hessian.
        token: activations of a token.
        length: tokens of a sequence, which are never parted.
    """

    layer: int
    factor: int
    token: int
    length: int

    @property
    def least(self) -> int:
        """With one sequence at a time."""
        return self._with(self.length)

    @property
    def full(self) -> int:
        """With as many tokens at once as are quick."""
        return self._with(max(TOKENS_AT_ONCE, self.length))

    def tokens_within(self, most: int) -> int | None:
        """How many go through the model at once in ``most`` bytes; None for as many as are quick.

        A function of what it is given alone, and not of the memory that happens to be free: sums over more or fewer
        tokens round differently.
        """
        if most >= self.full:
            return None
        room = most - LIBRARIES - self.layer
        return max(self.length, room // (self.token * self.length) * self.length)

    def _with(self, tokens: int) -> int:
        return LIBRARIES + self.layer + max(self.factor + PIECES, self.token * tokens)


def needs_of(source: SourceModel, length: int) -> Needs:
    """Of a model on sequences of ``length`` tokens."""
    widest = max(group.columns for group in source.layer_groups(0))
    return Needs(
        layer=4 * sum(parameter.numel() for parameter in source.layers[0].parameters()),
        factor=factor_bytes(widest),
        token=4 * (PER_INTERMEDIATE * widest + PER_HIDDEN * source.model.config.hidden_size),
        length=length,
    )
