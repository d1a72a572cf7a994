"""Progress on stderr: the stages of long work, the steps within one, and the time left.

On a terminal one live view has it all, however deep calls of :func:`track` are nested; elsewhere there are plain lines.
What begins and ends is logged as well. Standard output is never touched.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta

import click
import psutil
from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mgptq_runtime.signals import released_on_the_way_out

__all__ = ["Advance", "no_progress", "quiet", "report", "stage", "stages", "track"]

Advance = Callable[[], None]
LIVE_AFTER_SECONDS = 2.0
PLAIN_INTERVAL_SECONDS = 15.0
BAR_WIDTH = 20

logger = logging.getLogger(__name__)


def no_progress() -> None:
    """An :data:`Advance` that shows nothing."""


@contextmanager
def stages(names: Sequence[str]) -> Iterator[None]:
    """Say which stages are to come, for one view to show them all.

    Args:
        names: in order. The first word is what :func:`stage` calls it; more may tell it from others, as in
            ``solve tensors``.
    """
    with _shown() as view:
        view.stages = [_Stage(name) for name in names]
        yield


@contextmanager
def stage(name: str, *, brief: bool = False) -> Iterator[None]:
    """Do the next planned stage of that name, or one that nobody has planned.

    It is shown once there is work in it: an input that is refused at its beginning gets its message and no more.

    Args:
        brief: it is often done in an instant, so it is shown from two seconds on only, and else not counted.
    """
    with _shown() as view:
        before, one = view.current, view.coming(name)
        one.started, view.current = time.monotonic(), one
        one.shown_after = LIVE_AFTER_SECONDS if brief else 0.0
        logger.info("%s begins", one.name)
        try:
            yield
        except BaseException as error:
            one.stopped = True
            logger.info("%s, stopped by %s", one.summary(), type(error).__name__)
            raise
        else:
            logger.info(one.summary())
            view.announce()
            if one.announced:
                view.ended(one)
            else:
                view.stages.remove(one)
        finally:
            one.ended, view.current = time.monotonic(), before


@contextmanager
def track(description: str, total: int) -> Iterator[Advance]:
    """Show progress over ``total`` steps; the yielded function advances by one.

    A bar on a terminal, in a stage or from two seconds on; elsewhere a line every quarter of a minute. Within another
    one it is shown under that.
    """
    with _shown() as view:
        task = _Task(description, total)
        view.tasks.append(task)
        view.announce()

        def advance() -> None:
            task.done, task.advanced = task.done + 1, time.monotonic()
            view.announce()
            view.advanced()

        try:
            yield advance
        finally:
            logger.debug("%s: %d/%d in %.1f s", description, task.done, total, time.monotonic() - task.started)
            view.tasks.remove(task)


def report(figure: str) -> None:
    """Show a figure of the current stage, in place of the last one.

    The stage's own and its outermost :func:`track`'s are shown; what is nested deeper is only logged.
    """
    view = _view.get()
    if view and view.current:
        logger.debug("%s: %s", (view.tasks[-1].description if view.tasks else view.current.name), figure)
        if len(view.tasks) <= 1:
            view.current.figure = figure
            view.announce()


@contextmanager
def quiet() -> Iterator[None]:
    """Show nothing in this block; what begins and ends is still logged."""
    with _current(_View()):
        yield


@dataclass(eq=False)
class _Stage:
    """Attributes:
    started, ended: on the monotonic clock; None where it has not come to that.
    shown_after: seconds that it takes before it is worth showing.
    stopped: whether it ended by an error or an interrupt.
    announced: whether it has been shown that it began.
    """

    name: str
    started: float | None = None
    ended: float | None = None
    shown_after: float = 0.0
    stopped: bool = False
    announced: bool = False
    figure: str = ""

    @property
    def seconds(self) -> float | None:
        """How long it has taken so far."""
        return None if self.started is None else (self.ended or time.monotonic()) - self.started

    def summary(self) -> str:
        """The duration and the figure."""
        return f"{self.name}: {self.seconds:.0f} s" + (f", {self.figure}" if self.figure else "")


@dataclass(eq=False)
class _Task:
    description: str
    total: int
    done: int = 0
    started: float = field(default_factory=time.monotonic)
    advanced: float = 0.0

    @property
    def seconds_left(self) -> float | None:
        """By the mean of the steps so far."""
        if not self.done:
            return None
        expected = (self.advanced - self.started) / self.done * self.total
        return max(0.0, self.started + expected - time.monotonic())


class _View:
    """What is going on, and what there is to do when it changes; this one shows nothing."""

    def __init__(self) -> None:
        self.stages: list[_Stage] = []
        self.tasks: list[_Task] = []
        self.current: _Stage | None = None

    def coming(self, name: str) -> _Stage:
        """The next stage of that name, which is added where none was planned."""
        for one in self.stages:
            if one.started is None and one.name.split()[0] == name:
                return one
        self.stages.append(_Stage(name))
        return self.stages[-1]

    def announce(self) -> None:
        """Show that the current stage has begun, where it has not been shown and is worth it."""
        one = self.current
        if one and not one.announced and (one.seconds or 0.0) >= one.shown_after:
            one.announced = True
            self.begun(one)

    def begun(self, one: _Stage) -> None:
        """A stage has begun."""

    def ended(self, one: _Stage) -> None:
        """A stage has ended well."""

    def advanced(self) -> None:
        """A task has advanced."""


class _Lines(_View):
    """Plain lines, for files and pipes."""

    def __init__(self) -> None:
        super().__init__()
        self._last = time.monotonic()

    def begun(self, one: _Stage) -> None:
        self._print(f"stage {self.stages.index(one) + 1} of {len(self.stages)}: {one.name}")

    def ended(self, one: _Stage) -> None:
        self._print(one.summary())

    def advanced(self) -> None:
        under_way = [task for task in self.tasks if task.done < task.total]
        if under_way and time.monotonic() - self._last >= PLAIN_INTERVAL_SECONDS:
            figure = [self.current.figure] if self.current and self.current.figure else []
            self._print("; ".join([*map(_task_line, under_way), *figure]))

    def _print(self, line: str) -> None:
        self._last = time.monotonic()
        with suppress(OSError):  # nobody has to be there to read it
            click.echo(line, err=True)


class _LiveView(_View):
    """A list of stages, their durations and figures; tasks, with bars, under the stage that they belong to."""

    def __init__(self, console: Console, closing: ExitStack) -> None:
        super().__init__()
        self._opened = time.monotonic()
        self._closing = closing
        self._process = psutil.Process()
        self._live = Live(console=console, get_renderable=self._render, redirect_stdout=False, transient=True)

    def begun(self, one: _Stage) -> None:
        # From now on the list is worth keeping: it stays when the view ends, with what each stage took.
        self._live.transient = False
        self._start()

    def advanced(self) -> None:
        if time.monotonic() - self._opened > LIVE_AFTER_SECONDS:
            self._start()

    def _start(self) -> None:
        if not self._live.is_started:
            self._closing.enter_context(released_on_the_way_out(self._live.stop))
            self._live.start(refresh=True)

    def _render(self) -> RenderableType:
        width = max((len(one.name) for one in self.stages), default=0)
        bars = Padding(self._bars(), (0, 0, 0, 2 if self.current else 0))
        parts: list[RenderableType] = [bars] if self.tasks and not self.current else []
        for one in self._stages_in_sight():
            parts.append(_stage_line(one, width, one is self.current))
            if self.tasks and one is self.current:
                parts.append(bars)
        elapsed = _duration(time.monotonic() - self._opened)
        memory = decimal(self._process.memory_info().rss)
        return Group(*parts, Text(f"{elapsed} elapsed, {memory} of memory", style="dim"))

    def _stages_in_sight(self) -> list[_Stage]:
        """All of them, or on a low terminal the current one and what is next; in the end all again."""
        current = self.current
        if current is None:
            return list(self.stages)
        room = max(1, self._live.console.height - len(self.tasks) - 1)
        first = min(self.stages.index(current), max(0, len(self.stages) - room))
        return self.stages[first : first + room]

    def _bars(self) -> Table:
        grid = Table.grid(padding=(0, 2))
        for depth, task in enumerate(list(self.tasks)):
            left = task.seconds_left
            grid.add_row(
                Text("  " * depth + task.description, no_wrap=True, overflow="ellipsis"),
                ProgressBar(task.total, task.done, width=BAR_WIDTH),
                Text(f"{task.done}/{task.total}", justify="right", no_wrap=True),
                Text("" if left is None else f"{_duration(left)} left", no_wrap=True),
            )
        return grid


_view: ContextVar[_View | None] = ContextVar("view", default=None)


@contextmanager
def _current(view: _View) -> Iterator[_View]:
    token = _view.set(view)
    try:
        yield view
    finally:
        _view.reset(token)


@contextmanager
def _shown() -> Iterator[_View]:
    """The view of whoever is around this, or a new one for what is in it."""
    known = _view.get()
    if known:
        yield known
        return
    console = Console(stderr=True)
    live = sys.stderr is not None and sys.stderr.isatty() and console.is_interactive
    with ExitStack() as closing, _current(_LiveView(console, closing) if live else _Lines()) as view:
        yield view


def _stage_line(one: _Stage, width: int, is_current: bool) -> Text:
    style = "bold" if is_current else "dim" if one.seconds is None else ""
    taken = "" if one.seconds is None else _duration(one.seconds)
    line = Text(f"{one.name:<{width}}  {taken:>8}  ", style=style, no_wrap=True, overflow="ellipsis")
    if one.stopped:
        line.append("stopped  ", style="red")
    return line.append(one.figure, style="cyan")


def _task_line(task: _Task) -> str:
    left = "" if task.seconds_left is None else f", {task.seconds_left:.0f} s left"
    return f"{task.description}: {task.done}/{task.total}{left}"


def _duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    return str(timedelta(seconds=int(seconds)))
