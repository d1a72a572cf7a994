"""The type that a model is computed in, and how much of it at once."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

__all__ = ["TOKENS_AT_ONCE", "batches", "compute_dtype", "computing_in", "multiplying_in", "pieces"]

# So many are quick to take through a model on the CPU; more are no quicker.
TOKENS_AT_ONCE = 2048
# What is made in float32 of this many numbers stays in a processor's cache.
CACHED_NUMBERS = 1 << 18
# Other devices have no such cache, and starting a piece takes them longer.
PIECE_NUMBERS = 1 << 24


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it faster than float32, else float32."""
    return torch.bfloat16 if _multiplies_bfloat16(device) else torch.float32


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def computing_in(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """Matrix products and attention of a float32 model in ``dtype``, and what follows from these."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


@contextmanager
def multiplying_in(dtype: torch.dtype) -> Iterator[None]:
    """Products of float32 matrices as of ``dtype``, their sums in float32."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if dtype == torch.bfloat16 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def batches(tokens: torch.Tensor, at_once: int, most: int | None = None) -> tuple[torch.Tensor, ...]:
    """Whole sequences, as many as ``at_once`` tokens are, one at least.

    How many follows from what is given alone, and not from the memory there is: sums have the same order everywhere.

    Args:
        tokens: int64 [sequences, length].
        most: fewer than ``at_once``, where a run was told to take less memory.
    """
    return tokens.split(max(1, (at_once if most is None else min(at_once, most)) // tokens.shape[1]))


def pieces(matrix: torch.Tensor) -> Iterator[slice]:
    """Runs of a matrix's rows that are quickest to compute one after the other."""
    rows, columns = matrix.shape
    numbers = CACHED_NUMBERS if matrix.device.type == "cpu" else PIECE_NUMBERS
    step = max(1, numbers // columns)
    return (slice(start, start + step) for start in range(0, rows, step))
