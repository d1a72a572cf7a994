"""What a command tells while it works: on standard error, and in a log file."""

import logging
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from mgptq_runtime import progress
from mgptq_runtime.errors import BadInputError
from mgptq_runtime.messages import error_message

__all__ = ["log_to_stderr", "logged_to", "quiet", "verbose"]

WORKSTATION, RUNTIME = "mgptq_export", "mgptq_runtime"
LINE = "%(levelname)s: %(message)s"

logger = logging.getLogger(__name__)


@contextmanager
def quiet() -> Iterator[None]:
    """Show no progress in this block, downloads included."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    if shown:
        disable_progress_bars()
    try:
        with progress.quiet():
            yield
    finally:
        if shown:
            enable_progress_bars()


def log_to_stderr(least: int = logging.WARNING) -> None:
    """Show warnings from now on, or what is of another level at least."""
    handler = _OnStderr()
    # Not by levels, which a log file lowers.
    handler.addFilter(lambda record: record.levelno >= least)
    logging.basicConfig(handlers=[handler], level=logging.WARNING, format=LINE)


@contextmanager
def verbose() -> Iterator[None]:
    """Show what the workstation's package does inside, besides warnings."""
    handler = _OnStderr()
    handler.setFormatter(logging.Formatter(LINE))
    handler.addFilter(lambda record: record.levelno < logging.WARNING)
    package = logging.getLogger(WORKSTATION)
    package.addHandler(handler)
    try:
        with _everything_of([WORKSTATION]):
            yield
    finally:
        package.removeHandler(handler)


@contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Append all that both packages log in this block to a file, and how the block ended.

    Raises:
        BadInputError: the file cannot be written.
    """
    try:
        handler = _OnFile(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise BadInputError(
            f"log file {path} cannot be written: {error.strerror}; name a file in a folder that exists and is yours"
        ) from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    loggers = [logging.getLogger(name) for name in (WORKSTATION, RUNTIME)]
    for one in loggers:
        one.addHandler(handler)
    try:
        with _everything_of([WORKSTATION, RUNTIME]):
            logger.info("mgptq-export %s", shlex.join(sys.argv[1:]))
            try:
                yield
            except BaseException as error:
                logger.info("ended by %s: %s", type(error).__name__, error_message(error))
                raise
            logger.info("done")
    finally:
        for one in loggers:
            one.removeHandler(handler)
        with suppress(OSError):
            handler.close()


class _OnStderr(logging.Handler):
    """Warnings and details as lines."""

    def emit(self, record: logging.LogRecord) -> None:
        _print(self.format(record))


class _OnFile(logging.FileHandler):
    """A full disk costs the log, not the run."""

    def handleError(self, record: logging.LogRecord) -> None:
        self.setLevel(logging.CRITICAL + 1)
        _print(f"WARNING: log file {self.baseFilename} takes no more: {sys.exception()}")


def _print(line: str) -> None:
    """A line on what is standard error now: a live view is in its place and puts the line above itself.

    Not by click, which looks behind it where the locale is plain C.
    """
    if sys.stderr:
        with suppress(OSError):
            print(line, file=sys.stderr, flush=True)


@contextmanager
def _everything_of(names: Sequence[str]) -> Iterator[None]:
    """Let loggers pass everything on."""
    loggers = [logging.getLogger(name) for name in names]
    before = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        for one, level in zip(loggers, before, strict=True):
            one.setLevel(level)
