"""Golden vectors: what the workstation computed from the dequantized weights in float32, to replay on a device."""

import io
import math
import re
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from mgptq_runtime.errors import PackageError

__all__ = [
    "DIGEST_SIZE",
    "GoldenVectors",
    "hidden_digest",
    "parse_golden",
    "read_golden",
    "validate_golden",
    "write_golden",
]

DIGEST_SIZE = 8
MAX_GOLDEN_BYTES = 1 << 26
MAX_PROMPTS, MAX_LENGTH = 64, 512
# All logits of a prompt are there at once: 256 MiB of float32.
MAX_LOGITS = 1 << 26
# What NumPy writes; a header is Python's text, which only NumPy's own reader would have to evaluate.
NPY_START = b"\x93NUMPY\x01\x00"
NPY_HEADER = re.compile(
    rb"\{'descr': '(?P<dtype><[if]4)', 'fortran_order': False, 'shape': \((?P<shape>[0-9, ]{0,80})\), \} *\n"
)
BROKEN_ZIP = (ValueError, KeyError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile)


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
    if prompts > MAX_PROMPTS or length > MAX_LENGTH or length * vocabulary_size > MAX_LOGITS:
        raise ValueError(
            f"{prompts} prompts of {length} tokens with {vocabulary_size} logits each; allowed are {MAX_PROMPTS} "
            f"prompts of {MAX_LENGTH} tokens and {MAX_LOGITS} logits"
        )
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


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """An array whose header was compared with the bytes that follow it, before anything of its size is made."""
    entry = archive.getinfo(f"{name}.npy")
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > MAX_GOLDEN_BYTES:
        raise ValueError(f"{name} is compressed or larger than {MAX_GOLDEN_BYTES} bytes")
    data = archive.read(entry)
    size = int.from_bytes(data[len(NPY_START) : len(NPY_START) + 2], "little")
    start = len(NPY_START) + 2 + size
    header = NPY_HEADER.fullmatch(data[len(NPY_START) + 2 : start])
    if not data.startswith(NPY_START) or header is None:
        raise ValueError(f"{name} has the header {data[:200]!r}, it must be that of a NumPy array of <i4 or <f4")
    dtype = np.dtype(header["dtype"].decode())
    shape = tuple(int(number) for number in header["shape"].split(b",") if number.strip())
    if math.prod(shape) * dtype.itemsize != len(data) - start:
        raise ValueError(f"{name} is {dtype} {shape} in {len(data) - start} bytes")
    return np.frombuffer(data, dtype, offset=start).reshape(shape)


def parse_golden(data: bytes, path: Path) -> GoldenVectors:
    """Parse the content of an ``.npz`` file.

    Args:
        path: what error messages call the file.

    Raises:
        PackageError: it is broken, incomplete or compressed.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return GoldenVectors(**{f.name: _read_array(archive, f.name) for f in fields(GoldenVectors)})
    except BROKEN_ZIP as error:
        raise PackageError(f"{path}: not a file of golden vectors ({error}); export the package again") from error


def read_golden(path: Path) -> GoldenVectors:
    """Read an ``.npz`` file: see :func:`parse_golden`.

    Raises:
        PackageError: the file is missing or has more than 64 MiB.
    """
    try:
        size = path.stat().st_size
        if size > MAX_GOLDEN_BYTES:
            raise PackageError(
                f"{path} has {size} bytes, golden vectors have at most {MAX_GOLDEN_BYTES}; export them again"
            )
        return parse_golden(path.read_bytes(), path)
    except OSError as error:
        raise PackageError(f"{path}: not a file of golden vectors ({error}); export the package again") from error
