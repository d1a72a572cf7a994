"""The reference backend: float32 NumPy, weights dequantized one matrix at a time."""

import numpy as np

from mgptq_runtime.backends.checks import check_tokens
from mgptq_runtime.families import make_family
from mgptq_runtime.formats import format_named, padded_columns
from mgptq_runtime.golden import hidden_digest
from mgptq_runtime.quantized_model import QuantizedLinear, QuantizedModel

__all__ = ["KeyValueCache", "NumpyBackend"]

HEAD_CHUNK_ROWS = 4096


class KeyValueCache:
    """Keys and values of all layers, in buffers that double when full.

    Attributes:
        batch: number of sequences.
        length: positions that all layers hold.
    """

    def __init__(self, layer_count: int, batch: int) -> None:
        self.batch = batch
        self.length = 0
        self._buffers: list[list[np.ndarray] | None] = [None] * layer_count

    def append(self, layer: int, keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Add new positions to a layer.

        Args:
            keys, values: float32 [batch, kv_heads, sequence, head_size].

        Returns:
            All keys and all values, float32 [batch, kv_heads, positions, head_size], views of the buffers.
        """
        end = self.length + keys.shape[2]
        buffers = self._buffers[layer]
        if buffers is None or buffers[0].shape[2] < end:
            shape = (*keys.shape[:2], max(end, 2 * self.length), keys.shape[3])
            grown = [np.empty(shape, np.float32) for _ in range(2)]
            if buffers is not None:
                for old, new in zip(buffers, grown, strict=True):
                    new[:, :, : self.length] = old[:, :, : self.length]
            self._buffers[layer] = buffers = grown
        for buffer, new in zip(buffers, (keys, values), strict=True):
            buffer[:, :, self.length : end] = new
        return buffers[0][:, :, :end], buffers[1][:, :, :end]


def _pad(activation: np.ndarray) -> np.ndarray:
    columns = activation.shape[-1]
    missing = padded_columns(columns) - columns
    return np.pad(activation, [(0, 0)] * (activation.ndim - 1) + [(0, missing)]) if missing else activation


def _apply_segments(linear: QuantizedLinear, activation: np.ndarray, rows: slice) -> np.ndarray:
    """One matmul per segment, summed.

    Args:
        activation: float32 [tokens, padded columns], in the storage order.
        rows: the outputs wanted.

    Returns:
        float32 [tokens, wanted rows].
    """
    output: np.ndarray | None = None
    start = 0
    for segment in linear.segments:
        weight = format_named(segment.format).dequantize(segment.data[rows])
        part = activation[:, start : start + segment.columns] @ weight.T
        if output is None:
            output = part
        else:
            output += part
        start += segment.columns
    assert output is not None
    return output


class NumpyBackend:
    """Runs a quantized model in float32; implements :class:`mgptq_runtime.backends.Backend`.

    A model may compute infinity or NaN; that is for the caller to find in the logits.

    Raises:
        UnsupportedModelError: an unknown family or unusable hyper-parameters.
    """

    name = "numpy"

    def __init__(self, model: QuantizedModel) -> None:
        self._model = model
        self._family = make_family(model.family, model.hyperparameters)
        self._groups = {group.name: group for group in model.groups}
        self.vocabulary_size = self._family.vocabulary_size
        self.context_length = self._family.context_length
        self.short_context = self._family.short_context

    def new_cache(self, batch: int = 1) -> KeyValueCache:
        """An empty KV cache for ``batch`` sequences of equal length."""
        return KeyValueCache(self._family.layer_count, batch)

    @np.errstate(all="ignore")
    def forward(self, token_ids: np.ndarray, cache: KeyValueCache, *, first_logit: int = 0) -> np.ndarray:
        """Append tokens to the cached sequences.

        Args:
            token_ids: int64 [batch, sequence], the new tokens only.
            cache: from :meth:`new_cache`; extended in place.
            first_logit: the first of the new positions whose logits are computed; -1 for the last alone.

        Returns:
            logits, float32 [batch, positions, vocabulary].

        Raises:
            BadInputError: shapes that do not fit, a token id or a position out of range, or more tokens than the
                context holds.
        """
        self._check_tokens(token_ids, cache, first_logit)
        return self._family.forward(self, token_ids, cache, lambda hidden: None, first_logit=first_logit)

    @np.errstate(all="ignore")
    def forward_with_digests(self, token_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Run whole sequences from the start and digest what each layer computes.

        Args:
            token_ids: int64 [batch, sequence].

        Returns:
            logits, float32 [batch, sequence, vocabulary], and digests, float32 [layers + 1, batch, DIGEST_SIZE]:
            of the embedding output, then of each layer's output, at the last position.
        """
        cache = self.new_cache(len(token_ids))
        self._check_tokens(token_ids, cache)
        digests: list[np.ndarray] = []
        logits = self._family.forward(
            self, token_ids, cache, lambda hidden: digests.append(hidden_digest(hidden[:, -1]))
        )
        return logits, np.stack(digests)

    def _check_tokens(self, token_ids: np.ndarray, cache: KeyValueCache, first_logit: int = 0) -> None:
        check_tokens(token_ids, cache.batch, cache.length, self.vocabulary_size, self.context_length, first_logit)

    def embed(self, token_ids: np.ndarray) -> np.ndarray:
        """int64 [batch, sequence] to float32 [batch, sequence, hidden]; only these rows are dequantized."""
        embedding = self._model.embedding
        rows = token_ids.reshape(-1)
        parts = [format_named(segment.format).dequantize(segment.data[rows]) for segment in embedding.segments]
        return np.concatenate(parts, axis=1)[:, : embedding.columns].reshape(*token_ids.shape, -1)

    def project(self, group: str, activation: np.ndarray) -> list[np.ndarray]:
        """Apply an input group: float32 [batch, sequence, columns] to [batch, sequence, rows] for each linear."""
        linears = self._groups[group]
        permutation = linears.permutation
        ordered = activation if permutation is None else activation[..., permutation]
        flat = _pad(ordered).reshape(-1, padded_columns(activation.shape[-1]))
        return [self._linear(linear, flat).reshape(*activation.shape[:-1], -1) for linear in linears.linears]

    def _linear(self, linear: QuantizedLinear, flat: np.ndarray) -> np.ndarray:
        output = _apply_segments(linear, flat, slice(None))
        bias = self._model.tensors.get(f"{linear.name}_bias")
        return output if bias is None else output + bias

    def head(self, hidden: np.ndarray) -> np.ndarray:
        """float32 [batch, sequence, hidden] to logits, the head dequantized a few thousand rows at a time."""
        head = self._model.head or self._model.embedding
        flat = _pad(hidden).reshape(-1, padded_columns(hidden.shape[-1]))
        logits = np.empty((len(flat), head.rows), np.float32)
        for start in range(0, head.rows, HEAD_CHUNK_ROWS):
            rows = slice(start, start + HEAD_CHUNK_ROWS)
            logits[:, rows] = _apply_segments(head, flat, rows)
        return logits.reshape(*hidden.shape[:-1], -1)

    def tensor(self, name: str) -> np.ndarray:
        """A float32 tensor."""
        return self._model.tensors[name]
