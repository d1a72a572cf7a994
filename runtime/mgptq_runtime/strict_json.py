"""JSON from strangers: no duplicate keys, no NaN, no bottomless nesting."""

import json
from typing import Any, NoReturn

__all__ = ["parse_json", "parse_json_object"]


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {next(key for key in keys if keys.count(key) > 1)!r}")
    return values


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def parse_json(text: str | bytes) -> Any:
    """Parse JSON text.

    Raises:
        ValueError: broken text, a duplicate key, NaN or infinity, or nesting too deep to parse.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("JSON is nested too deeply") from error


def parse_json_object(text: str | bytes) -> dict[str, Any]:
    """Parse JSON text that must be one object.

    Raises:
        ValueError: as :func:`parse_json`, or another kind of value.
    """
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {type(value).__name__}")
    return value
