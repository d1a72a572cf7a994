"""Reading hyper-parameters from a stranger's file: every key known, typed and within bounds."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from mgptq_runtime.errors import UnsupportedModelError

__all__ = ["read_fields"]

T = TypeVar("T")


def _read(family: str, key: str, kind: type, bounds: tuple[float, float], value: Any) -> int | float:
    allowed_types = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, allowed_types):
        raise UnsupportedModelError(f"{family}.{key} is {value!r}, it must be of type {kind.__name__}")
    low, high = bounds
    if not low <= value <= high:
        raise UnsupportedModelError(f"{family}.{key} is {value}, allowed are {low} to {high}")
    return kind(value)


def read_fields(family: str, cls: type[T], hyperparameters: Mapping[str, Any]) -> T:
    """Make the dataclass ``cls`` from hyper-parameters.

    Args:
        cls: each field has the metadata ``key`` and ``bounds`` (lowest and highest value allowed) and the type
            int or float; a field with a default may be missing.

    Raises:
        UnsupportedModelError: a key that is missing, unknown, of another type or out of bounds.
    """
    known = {f.metadata["key"]: f for f in fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(hyperparameters) - set(known)):
        raise UnsupportedModelError(
            f"hyper-parameter {family}.{unknown[0]} is not known; known are: {', '.join(sorted(known))}"
        )
    values = {}
    for key, f in known.items():
        if key in hyperparameters:
            kind = int if f.type is int else float
            values[f.name] = _read(family, key, kind, f.metadata["bounds"], hyperparameters[key])
        elif f.default is MISSING:
            raise UnsupportedModelError(f"hyper-parameter {family}.{key} is missing")
    return cls(**values)
