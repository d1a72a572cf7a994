"""Ending on signals: exit code 128 + number, with everything cleaned up on the way out."""

import os
import signal
from typing import NoReturn

__all__ = ["exit_on_signals", "ignore_signals"]


def exit_on_signals() -> None:
    """Turn SIGINT, SIGTERM and SIGHUP into SystemExit(130), SystemExit(143) and SystemExit(129)."""
    signal.signal(signal.SIGINT, _exit)
    signal.signal(signal.SIGTERM, _exit)
    signal.signal(signal.SIGHUP, _exit)


def ignore_signals() -> None:
    """Let nothing disturb Python on its way out, once everything is cleaned up."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _exit(signum: int, frame: object) -> NoReturn:
    # Not KeyboardInterrupt: it kills Python by SIGINT when it strikes inside exec(), even where it is caught.
    os.write(2, b"interrupted\n")
    raise SystemExit(128 + signum)
