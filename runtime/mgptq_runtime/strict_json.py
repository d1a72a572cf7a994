"""JSON from strangers: no duplicate keys, no numbers beyond float64, no broken text, no bottomless nesting."""

import json
import math
import re
from typing import Any, NoReturn

__all__ = ["MAX_JSON_BYTES", "SHOWN_CHARACTERS", "compact_json", "parse_json", "parse_json_object"]

# Parsed, the costliest text takes some 27 times its own size: empty lists in a list.
MAX_JSON_BYTES = 1 << 23
# In messages, of what a stranger wrote.
SHOWN_CHARACTERS = 40
SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def compact_json(value: Any) -> str:
    """JSON text without white space between its tokens, every character as it is."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"duplicate key {key[:SHOWN_CHARACTERS]!r}")
        values[key] = value
    return values


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:SHOWN_CHARACTERS]} is beyond float64")
    return value


def parse_json(text: str | bytes, max_bytes: int | None = None) -> Any:
    """Parse JSON text, UTF-8 where it is bytes.

    Args:
        max_bytes: the longest text allowed, in UTF-8; None for any.

    Raises:
        ValueError: text that is broken or too long, a duplicate key, NaN, infinity or a number beyond float64, half a
            surrogate pair, or nesting too deep to parse.
    """
    if max_bytes is not None:
        size = len(text) if isinstance(text, bytes) else len(text.encode(errors="surrogatepass"))
        if size > max_bytes:
            raise ValueError(f"{size} bytes of JSON, at most {max_bytes} are allowed")
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=_finite)
        if SURROGATE_ESCAPE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("JSON is nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError("a string holds half a surrogate pair") from error
    return value


def parse_json_object(text: str | bytes, max_bytes: int | None = None) -> dict[str, Any]:
    """Parse JSON text that must be one object.

    Raises:
        ValueError: as :func:`parse_json`, or another kind of value.
    """
    value = parse_json(text, max_bytes)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {type(value).__name__}")
    return value
