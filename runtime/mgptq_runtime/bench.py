"""Speed and memory of a package on this machine."""

import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mgptq_runtime.backends import Backend
from mgptq_runtime.errors import BadInputError
from mgptq_runtime.generate import prefill
from mgptq_runtime.progress import Advance, no_progress

__all__ = ["BenchResult", "measure_speed", "peak_rss_bytes"]


@dataclass(frozen=True)
class BenchResult:
    """Attributes:
    backend: ``numpy`` or ``onnx``.
    load_seconds: opening, validating and loading the package, wall-clock.
    prefill_tokens_per_second: over one prompt, after a warm-up.
    decode_tokens_per_second: one token at a time after that prompt.
    peak_rss_bytes: the most memory that the process held.
    prompt_tokens, decode_tokens: how many were timed.
    threads: as asked; None for the backend's default.
    """

    backend: str
    load_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_rss_bytes: int
    prompt_tokens: int
    decode_tokens: int
    threads: int | None

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def peak_rss_bytes() -> int:
    """The most memory that this process held so far, in bytes."""
    with suppress(OSError, IndexError):
        # On Linux, ru_maxrss is at least what the process that started this one held then.
        return int(Path("/proc/self/status").read_text(encoding="utf-8").split("VmHWM:")[1].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure_speed(
    load: Callable[[], Backend],
    *,
    prompt_tokens: int = 128,
    decode_tokens: int = 32,
    threads: int | None = None,
    advance: Advance = no_progress,
) -> BenchResult:
    """Time loading, one prompt and decoding, as :func:`mgptq_runtime.generate.generate_tokens` computes them.

    Args:
        load: makes the backend.
        threads: reported only.
        advance: called after each of ``decode_tokens`` tokens.

    Raises:
        BadInputError: fewer than one token, or more than the model's context.
    """
    start = time.perf_counter()
    backend = load()
    load_seconds = time.perf_counter() - start
    if min(prompt_tokens, decode_tokens) < 1 or prompt_tokens + decode_tokens > backend.context_length:
        raise BadInputError(
            f"{prompt_tokens} + {decode_tokens} tokens: each at least 1, together at most {backend.context_length}"
        )
    ids = np.random.default_rng(0).integers(0, backend.vocabulary_size, (1, prompt_tokens))
    prefill(backend, ids[0], backend.new_cache())
    cache = backend.new_cache()
    start = time.perf_counter()
    prefill(backend, ids[0], cache)
    prefill_seconds = time.perf_counter() - start
    start = time.perf_counter()
    for i in range(decode_tokens):
        backend.forward(ids[:, i % prompt_tokens][:, None], cache, first_logit=-1)
        advance()
    decode_seconds = time.perf_counter() - start
    return BenchResult(
        backend=backend.name,
        load_seconds=load_seconds,
        prefill_tokens_per_second=prompt_tokens / prefill_seconds,
        decode_tokens_per_second=decode_tokens / decode_seconds,
        peak_rss_bytes=peak_rss_bytes(),
        prompt_tokens=prompt_tokens,
        decode_tokens=decode_tokens,
        threads=threads,
    )
