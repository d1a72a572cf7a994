"""What the commands print of strangers' texts."""

import io
import re
import sys

from mgptq_runtime.errors import MgptqError

__all__ = ["error_line", "error_message", "printable", "replace_unprintable_output"]

MAX_MESSAGE = 4000
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Text of a stranger without what a terminal would obey: control characters but tabs and line ends are escaped."""
    return CONTROL_CHARACTERS.sub(lambda found: f"\\x{ord(found.group()):02x}", text)


def replace_unprintable_output() -> None:
    """Let standard output show ``?`` for characters that its encoding lacks, where writing them would fail."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def error_message(error: BaseException) -> str:
    """An error's text, its middle left out where a stranger's file made it endless."""
    text = str(error)
    if len(text) > MAX_MESSAGE:
        text = f"{text[: MAX_MESSAGE // 2]} [...] {text[-MAX_MESSAGE // 2 :]}"
    return printable(text)


def error_line(error: BaseException, where: str = "") -> str:
    """What a command says before it ends: the error, and the name that the documentation has it under.

    Args:
        where: said right behind the word error.
    """
    name = f" [{type(error).__name__}]" if isinstance(error, MgptqError) else ""
    return f"error{where}: {error_message(error)}{name}"
