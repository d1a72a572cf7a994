"""Running out of memory, which every library reports in a way of its own."""

import errno
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mgptq_runtime.errors import MgptqError, OutOfMemoryError

if TYPE_CHECKING:  # commands that need no torch run without it
    from mgptq_export.memory_needs import Needs

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
def typed_memory_errors(needs: "Needs | None" = None, *, resumable: bool = True) -> Iterator[None]:
    """Raise OutOfMemoryError where there is too little memory, whatever has been made of that on the way.

    Args:
        needs: of the model, where it is known, so that the message says how much would do.
        resumable: whether what runs out of memory is a run, which has options against that.
    """
    try:
        yield
    except Exception as error:
        cause = error.__cause__ if isinstance(error, MgptqError) else error
        if isinstance(error, OutOfMemoryError) or not _is_about_memory(cause):
            raise
        text = str(cause).strip()
        what = text.splitlines()[0] if text else "no details"
        raise OutOfMemoryError(
            f"there is too little memory ({what}); free some and go on with --resume{_what_fits(needs)}"
            if resumable
            else f"there is too little memory ({what}); free some, and try again"
        ) from error


def _what_fits(needs: "Needs | None") -> str:
    if needs is None:
        return (
            ", with a lower --max-memory where weights were not in files yet; or start anew with a text as "
            "--calibration, a lower --sequence-length or without recovery (--recovery-steps 0)"
        )
    return (
        f": with --max-memory {_megabytes(needs.full)} weights lie in files, and the "
        f"rest takes about so much, recovery apart; or start anew with --recovery-steps 0 and --max-memory "
        f"{_megabytes(needs.least)}, which takes one sequence of {needs.length} tokens at a time, "
        f"{_megabytes(needs.factor)} of it the largest Hessian's factor, or with a lower --sequence-length"
    )


def _megabytes(size: int) -> str:
    return f"{math.ceil(size / 1e6)}MB"


def _is_about_memory(error: BaseException | None) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in WORDS)
