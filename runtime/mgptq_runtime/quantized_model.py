"""A quantized model in memory: what the checkpoint, the container and the backends exchange.

Names are llama.cpp's without suffix, the same for every family: ``token_embd``, ``output``, ``blk.0.attn_q``.
Weights of q and k keep the Hugging Face row order (rotary halves, not llama.cpp's interleaved order).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mgptq_runtime.formats import FORMATS, GGML_FORMATS, format_named, padded_columns

__all__ = ["InputGroup", "QuantizedLinear", "QuantizedModel", "Segment", "bits_stored", "permutation_dtype"]


def permutation_dtype(columns: int) -> np.dtype:
    """The stored type of a permutation: int16 up to 32767 columns, else int32."""
    return np.dtype(np.int16 if columns <= 32767 else np.int32)


@dataclass(frozen=True)
class Segment:
    """A run of blocks of one linear, all in one format.

    Attributes:
        format: a key of :data:`mgptq_runtime.formats.FORMATS` or :data:`mgptq_runtime.formats.GGML_FORMATS`.
        data: uint8 [rows, blocks * block_bytes], packed.
    """

    format: str
    data: np.ndarray

    @property
    def columns(self) -> int:
        """Columns that the segment covers, padding included."""
        fmt = format_named(self.format)
        return self.data.shape[1] // fmt.block_bytes * fmt.block_columns


@dataclass(frozen=True)
class QuantizedLinear:
    """A quantized matrix ``[rows, columns]`` whose segments lie along the permuted columns.

    Attributes:
        name: ``blk.0.attn_q`` and the like.
        rows, columns: outputs and inputs, without padding.
        segments: cover ``columns`` rounded up to 64, in order; or one segment of a ggml type, which has no padding.
        permutation: int [columns], or None for the natural order: position ``i`` of the segments
            holds column ``permutation[i]``. Shared by all linears of an input group.
    """

    name: str
    rows: int
    columns: int
    segments: tuple[Segment, ...]
    permutation: np.ndarray | None = None

    def __post_init__(self) -> None:
        ggml = [segment.format for segment in self.segments if segment.format in GGML_FORMATS]
        if ggml and len(self.segments) > 1:
            raise ValueError(f"{self.name}: a segment of type {ggml[0]} must be a linear's only one")
        covered = sum(segment.columns for segment in self.segments)
        wanted = self.columns if ggml else padded_columns(self.columns)
        if covered != wanted:
            raise ValueError(f"{self.name}: segments cover {covered} columns of {wanted}")

    @property
    def stored_bytes(self) -> int:
        """Bytes of all segments, scales and padding included, the shared permutation not."""
        return sum(segment.data.nbytes for segment in self.segments)

    def dequantize_permuted(self) -> np.ndarray:
        """Weights in storage order: float32 [rows, columns], padding dropped."""
        parts = [format_named(segment.format).dequantize(segment.data) for segment in self.segments]
        return np.concatenate(parts, axis=1)[:, : self.columns]

    def dequantize(self) -> np.ndarray:
        """Weights in the model's own column order: float32 [rows, columns]."""
        permuted = self.dequantize_permuted()
        if self.permutation is None:
            return permuted
        weight = np.empty_like(permuted)
        weight[:, self.permutation] = permuted
        return weight


@dataclass(frozen=True)
class InputGroup:
    """Linears that read the same activation, and so share one column order.

    Attributes:
        name: ``blk.0.attn_qkv``, ``blk.0.attn_output``, ``blk.0.ffn_gate_up``, ``blk.0.ffn_down``.
        permutation: int [columns] or None; the linears hold the same array.
        linears: in the family's order.
    """

    name: str
    permutation: np.ndarray | None
    linears: tuple[QuantizedLinear, ...]

    @property
    def permutation_bytes(self) -> int:
        """Bytes that the stored permutation takes."""
        if self.permutation is None:
            return 0
        return self.permutation.size * permutation_dtype(self.permutation.size).itemsize


def bits_stored(groups: Sequence[InputGroup]) -> float:
    """Stored bits per linear weight of some groups: codes, scales, padding and permutations."""
    linears = [linear for group in groups for linear in group.linears]
    size = sum(linear.stored_bytes for linear in linears) + sum(group.permutation_bytes for group in groups)
    return size * 8 / sum(linear.rows * linear.columns for linear in linears)


@dataclass(frozen=True)
class QuantizedModel:
    """A whole quantized model.

    Attributes:
        family: ``llama``.
        hyperparameters: the family's values under llama.cpp's key names without the family
            prefix (``block_count``, ``embedding_length``, ``attention.head_count``, ...).
        groups: all input groups, in forward order.
        embedding: ``token_embd`` [vocabulary, hidden], natural order.
        head: ``output`` [vocabulary, hidden], or None when tied to the embedding.
        tensors: everything that is not quantized, float32 by name (``blk.0.attn_norm``, ``output_norm``,
            ``rope_inverse_frequencies`` [head_size / 2]).
    """

    family: str
    hyperparameters: Mapping[str, int | float | bool | str]
    groups: tuple[InputGroup, ...]
    embedding: QuantizedLinear
    head: QuantizedLinear | None
    tensors: Mapping[str, np.ndarray] = field(default_factory=dict)

    def linears(self) -> Iterator[QuantizedLinear]:
        """Linears of all groups, without embedding and head."""
        for group in self.groups:
            yield from group.linears

    @property
    def linear_weights(self) -> int:
        """Number of weights of all linears, without embedding and head."""
        return sum(linear.rows * linear.columns for linear in self.linears())

    def weights_by_format(self) -> dict[str, int]:
        """Weights of all linears in each format in use, padding included; fewest bits first."""
        known = sorted([*FORMATS.values(), *GGML_FORMATS.values()], key=lambda fmt: fmt.bits_per_weight)
        counts = dict.fromkeys((fmt.name for fmt in known), 0)
        for linear in self.linears():
            for segment in linear.segments:
                counts[segment.format] += linear.rows * segment.columns
        return {name: count for name, count in counts.items() if count}

    def tables(self) -> list[QuantizedLinear]:
        """The embedding, and the head where that is another matrix."""
        return [self.embedding] if self.head is None else [self.embedding, self.head]

    @property
    def bits_stored(self) -> float:
        """Stored bits per linear weight: codes, scales, padding and permutations."""
        return bits_stored(self.groups)
