"""Golden vectors: what the workstation computed from the dequantized weights in float32, to replay on a device."""

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from mgptq_runtime.errors import PackageError

__all__ = ["DIGEST_SIZE", "GoldenVectors", "hidden_digest", "read_golden", "write_golden"]

DIGEST_SIZE = 8


@dataclass(frozen=True)
class GoldenVectors:
    """Attributes:
    token_ids: int32 [prompts, length].
    top_ids: int32 [prompts, length, k], tokens of the largest logits, largest first.
    top_logits: float32 [prompts, length, k], their logits.
    log_partition: float32 [prompts, length], log of the sum of exp over all logits.
    hidden_digests: float32 [layers + 1, prompts, DIGEST_SIZE], see :func:`hidden_digest`: of the embedding
        output, then of each layer's output (the residual stream), at the last position.
    """

    token_ids: np.ndarray
    top_ids: np.ndarray
    top_logits: np.ndarray
    log_partition: np.ndarray
    hidden_digests: np.ndarray


def hidden_digest(hidden: np.ndarray) -> np.ndarray:
    """The first coefficients of an orthonormal DCT-II over the last axis.

    Args:
        hidden: float [..., hidden_size].

    Returns:
        float32 [..., DIGEST_SIZE].
    """
    size = hidden.shape[-1]
    positions = np.arange(size, dtype=np.float64) + 0.5
    basis = np.cos(np.pi / size * np.outer(positions, np.arange(DIGEST_SIZE))) * np.sqrt(2.0 / size)
    basis[:, 0] /= np.sqrt(2.0)
    return (hidden.astype(np.float64) @ basis).astype(np.float32)


def write_golden(path: Path, golden: GoldenVectors) -> None:
    """Write an ``.npz`` file; equal vectors give equal bytes."""
    np.savez(path, **{f.name: getattr(golden, f.name) for f in fields(GoldenVectors)})


def read_golden(path: Path) -> GoldenVectors:
    """Read an ``.npz`` file.

    Raises:
        PackageError: the file is missing, broken or incomplete.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return GoldenVectors(**{f.name: arrays[f.name] for f in fields(GoldenVectors)})
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise PackageError(f"{path}: not a file of golden vectors ({error}); export the package again") from error
