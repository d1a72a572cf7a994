"""Ending on signals: exit code 128 + number, with everything cleaned up on the way out."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

__all__ = ["exit_at_once", "exit_on_signals", "ignore_signals", "released_on_the_way_out", "signals_held_back"]

# Windows has no SIGHUP.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
MESSAGE = b"interrupted\n"


class _Interrupted(SystemExit):
    """A signal that has not been told of yet."""


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


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Let signals wait until the block ends: for short work whose libraries make errors of their own of SystemExit."""
    ours = {number: handler for number in SIGNALS if (handler := signal.getsignal(number)) in (_exit, _exit_silently)}
    waiting: list[int] = []
    try:
        for number in ours:
            signal.signal(number, lambda signum, frame: waiting.append(signum))
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
        if waiting:
            ours[waiting[0]](waiting[0], None)  # type: ignore[operator]


@contextmanager
def released_on_the_way_out(release: Callable[[], None]) -> Iterator[None]:
    """Call ``release`` when the block ends, whatever happens, and only then tell of the signal that ended it.

    For what has the terminal to itself: a message in its midst would be lost, and so would be what it leaves there.
    """
    ours = [number for number in SIGNALS if signal.getsignal(number) is _exit]
    try:
        try:
            for number in ours:
                signal.signal(number, _exit_silently)
            yield
        finally:
            for number in ours:  # a second Ctrl-C would hit the release itself
                signal.signal(number, signal.SIG_IGN)
            release()
    except _Interrupted:
        os.write(2, MESSAGE)
        raise
    finally:
        for number in ours:
            signal.signal(number, _exit)


def ignore_signals() -> None:
    """Let nothing disturb Python on its way out, once everything is cleaned up."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _exit(signum: int, frame: object) -> NoReturn:
    # Not KeyboardInterrupt: it kills Python by SIGINT when it strikes inside exec(), even where it is caught.
    os.write(2, MESSAGE)
    raise SystemExit(128 + signum)


def _exit_silently(signum: int, frame: object) -> NoReturn:
    raise _Interrupted(128 + signum)


def _exit_at_once(signum: int, frame: object) -> NoReturn:
    os.write(2, MESSAGE)
    os._exit(128 + signum)
