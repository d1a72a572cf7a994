"""``tokenizer.json`` without the lists that a GGUF file holds anyway.

Tokens and merges once more, as JSON, take as much as an eighth of a bit for every linear weight of SmolLM2-135M. So
where ``tokenizer.ggml.tokens`` and ``tokenizer.ggml.merges`` begin with them, in their order, their number stands for
them.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mgptq_runtime.strict_json import MAX_JSON_BYTES, SHOWN_CHARACTERS, compact_json, parse_json_object

__all__ = ["restore_tokenizer", "shorten_tokenizer"]

# Of a list that is put back: more than those of 150 000 tokens have. A merge that was split takes hundreds of bytes,
# and a character that was escaped six.
MAX_ENTRIES, MAX_CHARACTERS = 1 << 19, 1 << 22


def shorten_tokenizer(tokenizer: Mapping[str, Any], tokens: Sequence[str], merges: Sequence[str]) -> str | None:
    """What is left of ``tokenizer.json`` beside a file's own lists, as text for :func:`restore_tokenizer`.

    Args:
        tokenizer: the JSON of ``tokenizer.json``.
        tokens: ``tokenizer.ggml.tokens``.
        merges: ``tokenizer.ggml.merges``, each two tokens with a space between; empty where there is none.

    Returns:
        None where the tokens do not begin with the tokenizer's vocabulary, or a reader would refuse the result.
    """
    model = dict(tokenizer["model"])
    if model.get("merges"):
        model["merges"] = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    whole = {**tokenizer, "model": model}
    counts = [{"vocab": len(model["vocab"])}]
    if model.get("merges"):
        counts.insert(0, {**counts[0], "merges": len(model["merges"])})
    for left_out in counts:
        short = compact_json({**tokenizer, "model": {**model, **left_out}})
        try:
            if json.loads(restore_tokenizer(short, tokens, merges)) == whole:
                return short
        except ValueError:
            continue
    return None


def restore_tokenizer(text: str, tokens: Sequence[str], merges: Sequence[str]) -> str:
    """The text of ``tokenizer.json``, of which :func:`shorten_tokenizer` left ``text``; merges are pairs.

    Raises:
        ValueError: no such text; a number that is none or more than the file's list has; tokens that are not all
            different, or merges that are not two tokens; more than :data:`MAX_ENTRIES` of either, or than
            :data:`MAX_CHARACTERS` in them.
    """
    short = parse_json_object(text, MAX_JSON_BYTES)
    model = short.get("model")
    if not isinstance(model, dict):
        raise ValueError("it has no object 'model'")
    model = dict(model)
    listed = _first(model, "vocab", tokens)
    model["vocab"] = {token: i for i, token in enumerate(listed)}
    if len(model["vocab"]) != len(listed):
        raise ValueError(f"two of the first {len(listed)} tokens are the same")
    if not isinstance(model.get("merges", []), list):
        listed = _first(model, "merges", merges)
        if not all(merge.count(" ") == 1 for merge in listed):
            raise ValueError("a merge is not two tokens with a space between")
        model["merges"] = [merge.split(" ") for merge in listed]
    return compact_json({**short, "model": model})


def _first(model: Mapping[str, Any], key: str, listed: Sequence[str]) -> Sequence[str]:
    count = model.get(key)
    most = min(len(listed), MAX_ENTRIES)
    if type(count) is not int or not 0 <= count <= most:
        found = compact_json(count)[:SHOWN_CHARACTERS]
        raise ValueError(
            f"model.{key} is {found}, it must be a number from 0 to {most}; {len(listed)} entries are listed, "
            f"and at most {MAX_ENTRIES} are read"
        )
    first = listed[:count]
    characters = sum(map(len, first))
    if characters > MAX_CHARACTERS:
        raise ValueError(f"model.{key} stands for {characters} characters, at most {MAX_CHARACTERS} are allowed")
    return first
