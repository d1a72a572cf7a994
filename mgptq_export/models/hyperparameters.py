"""What the numbers of a configuration may be, checked before anything is made of them."""

import reprlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from mgptq_export.families import Family
from mgptq_runtime.errors import BadInputError

__all__ = ["COUNTS", "check_hyperparameters"]

# Keys of a configuration to the most that they may be, several times what published models have.
COUNTS: Mapping[str, int] = {
    "vocab_size": 1 << 22,
    "hidden_size": 1 << 16,
    "intermediate_size": 1 << 18,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 10,
    "num_key_value_heads": 1 << 10,
    "head_dim": 1 << 12,
    "max_position_embeddings": 1 << 27,
    "original_max_position_embeddings": 1 << 27,
    "sliding_window": 1 << 27,
}
# Keys, in a configuration and in its rotary parameters, of numbers above zero.
POSITIVE = ("rms_norm_eps", "rope_theta", "factor", "query_pre_attn_scalar")
MAX_FLOAT = sys.float_info.max
FACTORS = ("short_factor", "long_factor")


def check_hyperparameters(config: Mapping[str, Any], family: Family, where: str) -> None:
    """Refuse sizes that no model has, head counts that do not divide, and rotary parameters without meaning.

    Args:
        config: a Hugging Face configuration; keys that it lacks are not checked.
        where: what holds it, for messages.

    Raises:
        BadInputError: the first of them, with what is allowed.
    """
    for complaint in _complaints(config, family):
        raise BadInputError(f"{where}: {complaint}; mend it, or download the model again")


def _complaints(config: Mapping[str, Any], family: Family) -> Iterator[str]:
    for key, most in COUNTS.items():
        value = config.get(key)
        if value is not None and not (type(value) is int and 1 <= value <= most):
            yield f"{key} is {reprlib.repr(value)}, it must be a whole number from 1 to {most}"
    yield from _number_complaints(config)
    yield from _head_complaints(config)
    for rope in family.rope_settings(config):
        yield from _number_complaints(rope)
        yield from _factor_complaints(rope, config)


def _number_complaints(values: Mapping[str, Any]) -> Iterator[str]:
    for key in POSITIVE:
        value = values.get(key)
        if value is not None and not (_is_number(value) and value > 0):
            yield f"{key} is {reprlib.repr(value)}, it must be a number above 0"
    part = values.get("partial_rotary_factor")
    if part is not None and not (_is_number(part) and 0 < part <= 1):
        yield f"partial_rotary_factor is {reprlib.repr(part)}, it must be a number above 0, at most 1"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_FLOAT


def _head_complaints(config: Mapping[str, Any]) -> Iterator[str]:
    width, heads, kv_heads = (config.get(key) for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    if width and heads and config.get("head_dim") is None and width % heads:
        yield f"hidden_size {width} is no multiple of num_attention_heads {heads}"
    if heads and kv_heads and heads % kv_heads:
        yield f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"


def _factor_complaints(rope: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[str]:
    """Longrope's lists have one factor for each rotary frequency, all of one length."""
    lists = {key: rope[key] for key in FACTORS if rope.get(key) is not None}
    for key, factors in lists.items():
        if not (isinstance(factors, list) and all(_is_number(factor) and factor > 0 for factor in factors)):
            yield f"{key} is {reprlib.repr(factors)}, it must be a list of numbers above 0"
        part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1.0
        width, heads = config.get("hidden_size"), config.get("num_attention_heads")
        size = config.get("head_dim") or (width // heads if width and heads else None)
        if size is not None and len(factors) != int(size * part) // 2:
            yield f"{key} has {len(factors)} numbers, it must have {int(size * part) // 2}, half a head's rotary size"
