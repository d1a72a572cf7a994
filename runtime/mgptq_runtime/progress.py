"""Progress on stderr, with the time left, for work of more than two seconds."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["Advance", "no_progress", "track"]

Advance = Callable[[], None]
QUIET_SECONDS = 2.0
PLAIN_INTERVAL_SECONDS = 15.0


def no_progress() -> None:
    """An :data:`Advance` that shows nothing."""


@contextmanager
def track(description: str, total: int) -> Iterator[Advance]:
    """Show progress over ``total`` steps; the yielded function advances by one.

    A bar on a terminal, from two seconds on; elsewhere a line every quarter of a minute.
    """
    console = Console(file=sys.stderr)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task(description, total=total)
    start = last_line = time.monotonic()
    done = 0

    def advance() -> None:
        nonlocal done, last_line
        done += 1
        bar.advance(task)
        now = time.monotonic()
        if console.is_terminal:
            if now - start > QUIET_SECONDS and not bar.live.is_started:
                bar.start()
        elif now - last_line >= PLAIN_INTERVAL_SECONDS and done < total:
            last_line = now
            left = (now - start) / done * (total - done)
            print(f"{description}: {done}/{total}, {left:.0f} s left", file=sys.stderr, flush=True)

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()
