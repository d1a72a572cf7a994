"""Ending on signals: exit code 128 + number, with everything cleaned up on the way out."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

__all__ = ["exit_at_once", "exit_on_signals", "ignore_signals"]

# Windows has no SIGHUP.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def exit_on_signals() -> None:
    """Turn SIGINT, SIGTERM and SIGHUP into SystemExit(130), SystemExit(143) and SystemExit(129).

    SIGHUP stays ignored where ``nohup`` did that.
    """
    for number in SIGNALS:
        if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _exit)


@contextmanager
def exit_at_once() -> Iterator[None]:
    """Let signals end the process on the spot: for imports, where C++ code may abort on SystemExit.

    Nothing may have to be cleaned up yet.
    """
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _exit_at_once)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_signals() -> None:
    """Let nothing disturb Python on its way out, once everything is cleaned up."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _exit(signum: int, frame: object) -> NoReturn:
    # Not KeyboardInterrupt: it kills Python by SIGINT when it strikes inside exec(), even where it is caught.
    os.write(2, b"interrupted\n")
    raise SystemExit(128 + signum)


def _exit_at_once(signum: int, frame: object) -> NoReturn:
    os.write(2, b"interrupted\n")
    os._exit(128 + signum)
