"""``tokenizer.json`` without the lists that a GGUF file holds anyway.

Tokens and merges once more, as JSON, take as much as an eighth of a bit for every linear weight of SmolLM2-135M. So
where ``tokenizer.ggml.tokens`` and ``tokenizer.ggml.merges`` begin with them, in their order, their number stands for
them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mgptq_runtime.strict_json import MAX_JSON_BYTES, compact_json, parse_json_object

__all__ = ["restore_tokenizer", "shorten_tokenizer"]


def shorten_tokenizer(tokenizer: Mapping[str, Any], tokens: Sequence[str], merges: Sequence[str]) -> str | None:
    """What is left of ``tokenizer.json`` beside a file's own lists, as text for :func:`restore_tokenizer`.

    Args:
        tokenizer: the JSON of ``tokenizer.json``.
        tokens: ``tokenizer.ggml.tokens``.
        merges: ``tokenizer.ggml.merges``, each two tokens with a space between; empty where there is none.

    Returns:
        None where the tokens are not the tokenizer's vocabulary, or too much is left for a reader to parse.
    """
    model = dict(tokenizer["model"])
    vocabulary, pairs = model.get("vocab"), model.get("merges")
    if not isinstance(vocabulary, dict) or vocabulary != _vocabulary(tokens[: len(vocabulary)]):
        return None
    model["vocab"] = len(vocabulary)
    if pairs and [pair.split(" ") if isinstance(pair, str) else pair for pair in pairs] == _pairs(merges[: len(pairs)]):
        model["merges"] = len(pairs)
    short = compact_json({**tokenizer, "model": model})
    return short if len(short.encode()) <= MAX_JSON_BYTES else None


def restore_tokenizer(text: str, tokens: Sequence[str], merges: Sequence[str]) -> str:
    """The text of ``tokenizer.json``, of which :func:`shorten_tokenizer` left ``text``.

    Raises:
        ValueError: no such text, or a number that is none or more than the file's list has.
    """
    short = parse_json_object(text, MAX_JSON_BYTES)
    model = short.get("model")
    if not isinstance(model, dict):
        raise ValueError("it has no object 'model'")
    model = dict(model)
    model["vocab"] = _vocabulary(_first(model, "vocab", tokens))
    if not isinstance(model.get("merges", []), list):
        model["merges"] = _pairs(_first(model, "merges", merges))
    return compact_json({**short, "model": model})


def _vocabulary(tokens: Sequence[str]) -> dict[str, int]:
    return {text: token for token, text in enumerate(tokens)}


def _pairs(merges: Sequence[str]) -> list[list[str]]:
    return [merge.split(" ") for merge in merges]


def _first(model: Mapping[str, Any], key: str, listed: Sequence[str]) -> Sequence[str]:
    count = model.get(key)
    if type(count) is not int or not 0 <= count <= len(listed):
        raise ValueError(f"model.{key} is {count!r}, it must be a number from 0 to {len(listed)}, the entries listed")
    return listed[:count]
