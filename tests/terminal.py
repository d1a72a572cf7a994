"""A pseudo-terminal, and what has been written to it."""

import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


class Terminal:
    """Attributes:
    descriptor: where a program writes.
    written: all that has been written so far, control sequences included.
    """

    def __init__(self) -> None:
        self._master, self.descriptor = os.openpty()
        self.written = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                self.written += os.read(self._master, 65536).decode()
            except OSError:  # nobody has it open any more
                return

    @property
    def text(self) -> str:
        """All that could be read, one after the other, what has been overwritten as well."""
        return CONTROL.sub("", self.written).replace("\r\n", "\n").replace("\r", "\n")

    def waits_for(self, pattern: str) -> re.Match[str]:
        """Something that is shown sooner or later."""
        end = time.monotonic() + 60
        while not (found := re.search(pattern, self.text)):
            assert time.monotonic() < end, f"{pattern} is not in {self.text!r}"
            time.sleep(0.01)
        return found

    def close(self) -> None:
        """Read to the end."""
        os.close(self.descriptor)
        self._reader.join(timeout=300)
        os.close(self._master)


@contextmanager
def open_terminal() -> Iterator[Terminal]:
    """A terminal that is read until the block ends."""
    terminal = Terminal()
    try:
        yield terminal
    finally:
        terminal.close()
