"""Text files that a user names: what is said of them in files that others read."""

from pathlib import Path

from mgptq_runtime.errors import BadInputError
from mgptq_runtime.package import file_sha256

__all__ = ["text_name", "text_sha256"]


def text_name(path: Path) -> str:
    """The file's name, as every file and terminal can show it; its folder is nobody else's business."""
    return "".join(letter if letter.isprintable() else "_" for letter in path.name)


def text_sha256(path: Path) -> str:
    """SHA-256 of the file in hexadecimal.

    Raises:
        BadInputError: it cannot be read.
    """
    try:
        return file_sha256(path)
    except OSError as error:
        raise BadInputError(f"{path} cannot be read: {error.strerror or error}; give a text file") from error
