"""What the commands print of strangers' texts."""

import re

__all__ = ["error_message", "printable"]

MAX_MESSAGE = 4000
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Text of a stranger without what a terminal would obey: control characters but tabs and line ends are escaped."""
    return CONTROL_CHARACTERS.sub(lambda found: f"\\x{ord(found.group()):02x}", text)


def error_message(error: BaseException) -> str:
    """An error's text, its middle left out where a stranger's file made it endless."""
    text = str(error)
    if len(text) > MAX_MESSAGE:
        text = f"{text[: MAX_MESSAGE // 2]} [...] {text[-MAX_MESSAGE // 2 :]}"
    return printable(text)
