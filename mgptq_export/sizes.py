"""Sizes of files, as people write them."""

import math
import re
from fractions import Fraction

__all__ = ["ALLOWED", "format_size", "parse_size"]

UNITS = {"": 1} | {f"{letter}b": 1000**i for i, letter in enumerate("kmg", 1)}
UNITS |= {f"{letter}ib": 1024**i for i, letter in enumerate("kmg", 1)}
ALLOWED = "a number with KB, MB, GB (powers of 1000), KiB, MiB, GiB (powers of 1024) or, for bytes, no unit"
PATTERN = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Whole bytes of a size such as ``50MB``, ``47.5 MiB`` or ``50000000``; a fraction of a byte is left out.

    Raises:
        ValueError: not such a size, or less than a byte.
    """
    match = PATTERN.fullmatch(text)
    unit = UNITS.get(match[2].lower()) if match else None
    size = int(Fraction(match[1]) * unit) if match and unit else 0
    if size < 1:
        raise ValueError(f"{text!r} is no size; give {ALLOWED}, such as 50MB, 47.5MiB or 50000000")
    return size


def format_size(size: int) -> str:
    """A size in MB, rounded up to two places."""
    return f"{math.ceil(size / 10_000) / 100:.2f} MB"
