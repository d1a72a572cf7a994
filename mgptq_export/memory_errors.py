"""Running out of memory, which every library reports in a way of its own."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from mgptq_runtime.errors import MgptqError, OutOfMemoryError

__all__ = ["typed_memory_errors"]

WORDS = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "cannot allocate memory",
    "alloc_failed",
    "bad_alloc",
    "bad allocation",
)


@contextmanager
def typed_memory_errors() -> Iterator[None]:
    """Raise OutOfMemoryError where there is too little memory, whatever has been made of that on the way."""
    try:
        yield
    except Exception as error:
        cause = error.__cause__ if isinstance(error, MgptqError) else error
        if isinstance(error, OutOfMemoryError) or not _is_about_memory(cause):
            raise
        text = str(cause).strip()
        raise OutOfMemoryError(
            f"there is too little memory ({text.splitlines()[0] if text else 'no details'}); free some and go on with "
            "--resume, with a lower --max-memory where weights were not in files yet; or start anew with a text as "
            "--calibration, a lower --sequence-length or without recovery (--recovery-steps 0)"
        ) from error


def _is_about_memory(error: BaseException | None) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in WORDS)
