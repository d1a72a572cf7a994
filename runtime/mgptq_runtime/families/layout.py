"""What a family says about its parts: which tensors a model of these hyper-parameters consists of."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

__all__ = ["Cache", "Family", "GroupShape", "Layout", "LinearShape", "Weights"]


@dataclass(frozen=True)
class LinearShape:
    """A quantized matrix: ``rows`` outputs, ``columns`` inputs."""

    name: str
    rows: int
    columns: int


@dataclass(frozen=True)
class GroupShape:
    """An input group: linears that read the same activation of ``columns`` values."""

    name: str
    columns: int
    linears: tuple[LinearShape, ...]


@dataclass(frozen=True)
class Layout:
    """All tensors of a model.

    Attributes:
        groups: in forward order.
        embedding: ``token_embd``; an untied head, ``output``, has the same shape.
        tensors: shapes of the float32 tensors that must be there.
        optional_tensors: shapes of those that may be there.
    """

    groups: tuple[GroupShape, ...]
    embedding: LinearShape
    tensors: Mapping[str, tuple[int, ...]]
    optional_tensors: Mapping[str, tuple[int, ...]]


class Weights(Protocol):
    """What a forward pass may ask of the weights, however they are stored."""

    def embed(self, token_ids: np.ndarray) -> np.ndarray:
        """int64 [batch, sequence] to float32 [batch, sequence, hidden]."""
        ...

    def project(self, group: str, activation: np.ndarray) -> list[np.ndarray]:
        """Apply all linears of an input group, biases included.

        Args:
            activation: float32 [batch, sequence, columns], natural column order.

        Returns:
            float32 [batch, sequence, rows] for each linear, in the group's order.
        """
        ...

    def head(self, hidden: np.ndarray) -> np.ndarray:
        """float32 [batch, sequence, hidden] to logits, float32 [batch, sequence, vocabulary]."""
        ...

    def tensor(self, name: str) -> np.ndarray:
        """A float32 tensor."""
        ...


class Cache(Protocol):
    """Keys and values of all layers."""

    length: int

    def append(self, layer: int, keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Add float32 [batch, kv_heads, sequence, head_size] to a layer; return all it holds."""
        ...


class Family(Protocol):
    """A model family: its hyper-parameters, its layout and its forward pass."""

    name: ClassVar[str]

    @property
    def layer_count(self) -> int: ...

    @property
    def context_length(self) -> int: ...

    @property
    def short_context(self) -> int: ...

    @property
    def vocabulary_size(self) -> int: ...

    @property
    def layout(self) -> Layout:
        """All tensors of a model with these hyper-parameters."""
        ...

    def forward(
        self,
        weights: Weights,
        token_ids: np.ndarray,
        cache: Cache,
        observe: Callable[[np.ndarray], None],
        *,
        first_logit: int = 0,
    ) -> np.ndarray:
        """Compute logits of new tokens.

        Args:
            token_ids: int64 [batch, sequence].
            cache: of the tokens before; extended in place.
            observe: called with the residual stream, float32 [batch, sequence, hidden]: the embedding output,
                then each layer's output.
            first_logit: the first of the new positions whose logits are computed; -1 for the last alone.

        Returns:
            float32 [batch, positions, vocabulary].
        """
        ...
