"""Golden vectors: what the workstation computed from the dequantized weights in float32, to replay on a device."""

import zipfile
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from mgptq_runtime.errors import PackageError

__all__ = ["DIGEST_SIZE", "GoldenVectors", "hidden_digest", "read_golden", "validate_golden", "write_golden"]

DIGEST_SIZE = 8
MAX_FILE_BYTES = 1 << 28


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


def validate_golden(golden: GoldenVectors, vocabulary_size: int, layer_count: int | None = None) -> None:
    """Check types, shapes and ranges of vectors that come from a file.

    Args:
        layer_count: of the model; None where it is not known.

    Raises:
        ValueError: what is wrong.
    """
    if golden.token_ids.ndim != 2 or golden.top_ids.ndim != 3:
        raise ValueError(f"token_ids {golden.token_ids.shape} and top_ids {golden.top_ids.shape} are not 2-D and 3-D")
    prompts, length = golden.token_ids.shape
    k = golden.top_ids.shape[2]
    layers = golden.hidden_digests.shape[0] if layer_count is None else layer_count + 1
    shapes = {
        "token_ids": (prompts, length),
        "top_ids": (prompts, length, k),
        "top_logits": (prompts, length, k),
        "log_partition": (prompts, length),
        "hidden_digests": (layers, prompts, DIGEST_SIZE),
    }
    for name, shape in shapes.items():
        array, kind = getattr(golden, name), np.int32 if name.endswith("_ids") else np.float32
        if array.dtype != kind or array.shape != shape or not array.size:
            raise ValueError(f"{name} is {array.dtype} {array.shape}, it must be {np.dtype(kind)} {shape}, not empty")
        if kind == np.int32 and (array.min() < 0 or array.max() >= vocabulary_size):
            raise ValueError(f"{name} has values {array.min()} to {array.max()}, the vocabulary is {vocabulary_size}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} holds NaN or infinity")
    if (np.diff(golden.top_logits, axis=-1) > 0).any():
        raise ValueError("top_logits do not fall")


def read_golden(path: Path) -> GoldenVectors:
    """Read an ``.npz`` file.

    Raises:
        PackageError: the file is missing, broken, incomplete or expands to more than 256 MiB.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > MAX_FILE_BYTES:
            raise PackageError(f"{path} expands to {size} bytes, at most {MAX_FILE_BYTES} are allowed")
        with np.load(path, allow_pickle=False) as arrays:
            return GoldenVectors(**{f.name: arrays[f.name] for f in fields(GoldenVectors)})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise PackageError(f"{path}: not a file of golden vectors ({error}); export the package again") from error
