"""What a quantization is asked for: the recipe that travels with the result."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mgptq_export.texts import text_name
from mgptq_runtime.errors import BadInputError
from mgptq_runtime.formats import FORMATS, GGML_FORMATS

__all__ = ["ALLOCATORS", "BITS_GRID", "FAST", "MIXED", "Recipe"]

# Bits that stand for a size are multiples of 1 / BITS_GRID: few digits, and steps that are nothing beside a file.
BITS_GRID = 10_000
# Embedding and head take part in a size's budget, block by block.
MIXED = "mixed"
ALLOCATORS = ("gnn", "hessian", "uniform")
# For a first look: less of all that takes time.
FAST: dict[str, Any] = {
    "samples": 16,
    "own_samples": 0,
    "drift_correction": 0.0,
    "descent_sweeps": 0,
    "trials": 2,
    "training_steps": 40,
    "recovery_steps": 11,
}


@dataclass(frozen=True)
class Recipe:
    """Attributes:
    bits: stored bits per linear weight: codes, scales, padding and permutations. Until a mixed embedding has got its
        share of a budget, per weight of linears, embedding and head.
    size: bytes that the model file of each target may take, everything in it included; ``bits`` are then not what is
        asked for, but what fits, see :func:`mgptq_export.planning.bits_for_size`.
    formats: what the allocator may choose from for every block, in container and ONNX.
    ggml_types: what it may choose from for every tensor, in llama.cpp's file; none: what suits the model.
    embedding_format: of the embedding and the head; with a size, ``mixed`` lets their blocks compete with those of all
        linears, in container and ONNX, and is four bits in llama.cpp.
    allocator: ``gnn``, ``hessian`` or ``uniform``.
    calibration: ``self``, a file, or a hub data set.
    samples, sequence_length: size of the calibration set, in sequences and tokens; fewer where the text is shorter.
    own_samples: sequences that the model writes itself, beside those of a text.
    sensitivity_samples: sequences whose loss gradients weigh the layers against one another.
    damping: of the Hessians, relative to the mean of their diagonal.
    drift_correction: share of what the quantized layers before it have changed that every linear makes up for, 0 to 1;
        less where the text is short.
    descent_sweeps: how often codes and scales are chosen again once all are known, in container and ONNX.
    seed: of everything random.
    trials: quantizations of the whole model that the ``gnn`` allocator compares, and its network learns from; one is
        what ``hessian`` does.
    training_steps: of the network, after every trial but the last.
    recovery_steps: of training scales, norms and biases end to end on the calibration text, the codes being fixed.
    recovery_minutes: as long, instead of so many steps; what a package records is the steps that were taken.
    """

    bits: float = 2.5
    size: int | None = None
    formats: tuple[str, ...] = tuple(FORMATS)
    ggml_types: tuple[str, ...] = ()
    embedding_format: str = "b4"
    allocator: str = "gnn"
    calibration: str = "self"
    samples: int = 128
    own_samples: int = 64
    sequence_length: int = 512
    sensitivity_samples: int = 8
    damping: float = 0.01
    drift_correction: float = 0.5
    descent_sweeps: int = 4
    seed: int = 0
    trials: int = 2
    training_steps: int = 60
    recovery_steps: int = 180
    recovery_minutes: float | None = None

    def __post_init__(self) -> None:
        if self.allocator not in ALLOCATORS:
            raise BadInputError(f"allocator {self.allocator!r} is unknown; choose from {', '.join(ALLOCATORS)}")
        if self.embedding_format == MIXED and self.size is None:
            raise BadInputError("a mixed embedding shares the budget of a size, and there is none; ask for a size")
        unknown = {*self.formats, *({self.embedding_format} - {MIXED})} - set(FORMATS)
        if unknown or not self.formats:
            raise BadInputError(f"formats {sorted(unknown)} are unknown; choose from {', '.join(FORMATS)}")
        if unknown := set(self.ggml_types) - set(GGML_FORMATS):
            raise BadInputError(f"ggml types {sorted(unknown)} are unknown; choose from {', '.join(GGML_FORMATS)}")
        for name in ("samples", "sequence_length", "sensitivity_samples", "trials"):
            if getattr(self, name) < 1:
                raise BadInputError(f"{name} is {getattr(self, name)}, must be at least 1")
        for name in ("own_samples", "descent_sweeps", "recovery_steps"):
            if getattr(self, name) < 0:
                raise BadInputError(f"{name} is {getattr(self, name)}, must be 0 or more")
        if self.recovery_minutes is not None and not 0 < self.recovery_minutes < math.inf:
            raise BadInputError(f"recovery_minutes is {self.recovery_minutes}, must be above 0")
        if self.size is not None and self.size < 1:
            raise BadInputError(f"size is {self.size} bytes, must be at least 1")
        if not 0 <= self.seed < 1 << 63:
            raise BadInputError(f"seed is {self.seed}, must be 0 to 2^63 - 1")
        if not 0 <= self.drift_correction <= 1:
            raise BadInputError(f"drift_correction is {self.drift_correction}, must be 0 to 1")
        if not self.damping > 0:
            raise BadInputError(f"damping is {self.damping}, must be above 0")

    @property
    def recovers(self) -> bool:
        """Whether anything is trained after the codes are fixed."""
        return self.recovery_steps > 0 or self.recovery_minutes is not None

    @staticmethod
    def default_embedding_format(size: int | None) -> str:
        """What commands take where nothing is said."""
        return Recipe.embedding_format if size is None else MIXED

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values; of a calibration file its name."""
        text = Path(self.calibration)
        return {
            **asdict(self),
            "calibration": text_name(text) if text.is_file() else self.calibration,
            "formats": list(self.formats),
            "ggml_types": list(self.ggml_types),
        }
