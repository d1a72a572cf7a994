"""The proof on the device: replay the golden vectors and compare."""

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from mgptq_runtime.backends import Backend
from mgptq_runtime.backends.numpy_backend import NumpyBackend
from mgptq_runtime.errors import CheckError, PackageError
from mgptq_runtime.golden import GoldenVectors
from mgptq_runtime.progress import Advance, no_progress

__all__ = ["DEFAULT_BOUNDS", "Bounds", "CheckResult", "bounds_key", "check_backend", "read_bounds"]


@dataclass(frozen=True)
class Bounds:
    """What a check must meet; None where it does not apply.

    Attributes:
        max_abs_difference: of logits.
        top1_agreement: share of positions with the golden most likely token, ties included.
        kl_divergence: mean over positions, in nats.
        hidden_relative_difference: of a layer's digest, relative to the golden digest's norm.
        tie_gap: of golden logits, within which two tokens count as tied for first place; as the largest difference
            where it is None.
    """

    max_abs_difference: float | None = None
    top1_agreement: float | None = None
    kl_divergence: float | None = None
    hidden_relative_difference: float | None = None
    tie_gap: float | None = None


# In float32 only the order of sums differs from PyTorch's. The most that was seen in a logit is 1.4e-4 with NumPy and
# 2.2e-4 with ONNX Runtime. With int8 activations, which of two near tokens comes first depends on the processor's
# kernel; a gap of 0.1 is one token a tenth more likely than another.
DEFAULT_BOUNDS: Mapping[str, Bounds] = {
    "numpy": Bounds(max_abs_difference=1e-3, top1_agreement=1.0, hidden_relative_difference=1e-3),
    "onnx_exact": Bounds(max_abs_difference=2e-3, top1_agreement=1.0),
    "onnx_fast": Bounds(kl_divergence=0.02, top1_agreement=0.97, tie_gap=0.1),
}


@dataclass(frozen=True)
class CheckResult:
    """What a check compared and found.

    Attributes:
        passed: whether every bound was met.
        backend: ``numpy`` or ``onnx``.
        accuracy_level: of ONNX; None for NumPy.
        positions: how many positions were compared.
        max_abs_difference: largest difference among the golden top logits.
        top1_agreement: share of positions whose most likely token is the golden one.
        top1_ties: positions with another token first, which the golden logits rank equal within the tie gap.
        kl_divergence: mean KL(golden ‖ computed) in nats, over the golden top tokens and one bucket for the rest.
        hidden_relative_difference: largest over layers and prompts; None where the backend hides its layers.
        hidden_layer: the layer of that difference, 0 for the embedding.
        bounds: what was asked.
        failures: the bounds that were not met, in words.
    """

    passed: bool
    backend: str
    accuracy_level: int | None
    positions: int
    max_abs_difference: float
    top1_agreement: float
    top1_ties: int
    kl_divergence: float
    hidden_relative_difference: float | None
    hidden_layer: int | None
    bounds: Bounds
    failures: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON values; a number that is not finite becomes None."""
        values = asdict(self) | {"failures": list(self.failures)}
        return {
            key: None if isinstance(value, float) and not np.isfinite(value) else value for key, value in values.items()
        }


def bounds_key(backend: str, accuracy_level: int) -> str:
    """The name of a backend's bounds: ``numpy``, ``onnx_exact`` (level 0) or ``onnx_fast``."""
    if backend != "onnx":
        return backend
    return "onnx_exact" if accuracy_level == 0 else "onnx_fast"


def read_bounds(values: Mapping[str, Any]) -> Bounds:
    """Bounds from a manifest.

    Raises:
        PackageError: an unknown name, or a value that is not a finite number of 0 or more.
    """
    known = [f.name for f in fields(Bounds)]
    for key, value in values.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if key not in known or not (value is None or (is_number and 0 <= value <= sys.float_info.max)):
            raise PackageError(
                f"manifest.json: check bound {key!r} is {value!r}; known are {', '.join(known)}, each a number of 0 "
                "or more or null; export the package again"
            )
    return Bounds(**values)


@dataclass
class _Replay:
    """What the backend computed for the golden prompts.

    Attributes:
        logits: float32 [prompts, length, k], at the golden top tokens.
        log_partition: float64 [prompts, length].
        first: int64 [prompts, length], the most likely token.
        digests: float32 [layers + 1, prompts, DIGEST_SIZE] or None.
    """

    logits: np.ndarray
    log_partition: np.ndarray
    first: np.ndarray
    digests: np.ndarray | None


def _replay(backend: Backend, golden: GoldenVectors, advance: Advance) -> _Replay:
    logits, partitions, firsts, digests = [], [], [], []
    for ids, top_ids in zip(golden.token_ids.astype(np.int64), golden.top_ids, strict=True):
        if isinstance(backend, NumpyBackend):
            all_logits, digest = backend.forward_with_digests(ids[None])
            digests.append(digest)
        else:
            all_logits = backend.forward(ids[None], backend.new_cache())
        row = all_logits[0]
        largest = row.max(axis=-1, keepdims=True).astype(np.float64)
        partitions.append(largest[:, 0] + np.log(np.exp(row - largest).sum(axis=-1)))
        logits.append(np.take_along_axis(row, top_ids.astype(np.int64), axis=-1))
        firsts.append(row.argmax(axis=-1))
        advance()
    return _Replay(
        np.stack(logits),
        np.stack(partitions),
        np.stack(firsts),
        np.concatenate(digests, axis=1) if digests else None,
    )


def _probabilities(logits: np.ndarray, log_partition: np.ndarray) -> np.ndarray:
    """Top probabilities and the rest's, float64 [..., k + 1]."""
    top = np.exp(logits.astype(np.float64) - log_partition[..., None].astype(np.float64))
    rest = np.maximum(1.0 - top.sum(axis=-1, keepdims=True), 1e-12)
    return np.concatenate([np.maximum(top, 1e-300), rest], axis=-1)


def _kl_divergence(golden: GoldenVectors, replay: _Replay) -> float:
    p = _probabilities(golden.top_logits, golden.log_partition)
    q = _probabilities(replay.logits, replay.log_partition)
    return float(np.mean(np.sum(p * np.log(p / q), axis=-1)))


def _count_ties(golden: GoldenVectors, first: np.ndarray, tolerance: float) -> int:
    """Positions whose first token is not the golden one, but has a golden logit within the tolerance of it."""
    is_choice = golden.top_ids == first[..., None]
    gap = golden.top_logits[..., :1] - golden.top_logits
    near = (is_choice & (gap <= tolerance)).any(axis=-1)
    return int(np.sum(near & (first != golden.top_ids[..., 0])))


def _hidden_difference(golden: GoldenVectors, digests: np.ndarray) -> tuple[float, int]:
    """Largest relative difference, and its layer."""
    norms = np.linalg.norm(golden.hidden_digests.astype(np.float64), axis=-1)
    differences = np.linalg.norm(digests.astype(np.float64) - golden.hidden_digests, axis=-1)
    relative = (differences / np.maximum(norms, 1e-6)).max(axis=1)
    layer = int(np.argmax(relative))
    return float(relative[layer]), layer


def _failures(bounds: Bounds, found: Mapping[str, float | None]) -> tuple[str, ...]:
    """Comparisons are written so that NaN fails them."""
    failures = []
    for name, value in found.items():
        bound = getattr(bounds, name)
        if bound is None or value is None:
            continue
        met = value >= bound if name == "top1_agreement" else value <= bound
        if not met:
            side = "at least" if name == "top1_agreement" else "at most"
            failures.append(f"{name} is {value:.6g}, {side} {bound:.6g} is allowed")
    return tuple(failures)


@np.errstate(all="ignore")
def check_backend(
    backend: Backend, golden: GoldenVectors, bounds: Bounds, advance: Advance = no_progress
) -> CheckResult:
    """Replay the golden vectors on a backend.

    Args:
        golden: validated, see :func:`mgptq_runtime.golden.validate_golden`.
        advance: called after each prompt.

    Raises:
        CheckError: the golden vectors do not belong to this model.
    """
    if max(golden.token_ids.max(), golden.top_ids.max()) >= backend.vocabulary_size:
        raise CheckError(
            f"the golden vectors name token {max(golden.token_ids.max(), golden.top_ids.max())}, "
            f"the model has {backend.vocabulary_size}; export the package again"
        )
    replay = _replay(backend, golden, advance)
    positions = golden.token_ids.size
    max_abs_difference = float(np.abs(replay.logits.astype(np.float64) - golden.top_logits).max())
    agreeing = int(np.sum(replay.first == golden.top_ids[..., 0]))
    tie_gap = bounds.max_abs_difference if bounds.tie_gap is None else bounds.tie_gap
    ties = _count_ties(golden, replay.first, tie_gap or 0.0)
    kl_divergence = _kl_divergence(golden, replay)
    hidden, layer = (None, None) if replay.digests is None else _hidden_difference(golden, replay.digests)
    finite = np.isfinite(replay.logits).all() and np.isfinite(replay.log_partition).all()
    failures = _failures(
        bounds,
        {
            "max_abs_difference": max_abs_difference,
            "top1_agreement": (agreeing + ties) / positions,
            "kl_divergence": kl_divergence,
            "hidden_relative_difference": hidden,
        },
    )
    if not finite:
        failures = ("the model computed NaN or infinity", *failures)
    return CheckResult(
        passed=not failures,
        backend=backend.name,
        accuracy_level=getattr(backend, "accuracy_level", None),
        positions=positions,
        max_abs_difference=max_abs_difference,
        top1_agreement=agreeing / positions,
        top1_ties=ties,
        kl_divergence=kl_divergence,
        hidden_relative_difference=hidden,
        hidden_layer=layer,
        bounds=bounds,
        failures=failures,
    )
