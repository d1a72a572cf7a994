"""The building blocks of decoder layers, in float32 NumPy."""

import numpy as np

__all__ = ["attention", "gelu_tanh", "rms_norm", "rotate", "silu"]

QUERY_CHUNK = 128


def rms_norm(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    """x / sqrt(mean(x²) + ε) · weight over the last axis, float32."""
    mean_square = np.mean(np.square(x), axis=-1, keepdims=True)
    return x / np.sqrt(mean_square + np.float32(epsilon)) * weight


def silu(x: np.ndarray) -> np.ndarray:
    """x · sigmoid(x), without overflow: float32 to float32."""
    return x * (np.float32(0.5) * (np.float32(1.0) + np.tanh(np.float32(0.5) * x)))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """GELU in its tanh approximation, x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))): float32 to float32."""
    inner = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x * x * x)
    return np.float32(0.5) * x * (np.float32(1.0) + np.tanh(inner))


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotary position embedding on halves: element i turns with element i + rotary_size / 2.

    Args:
        x: float32 [batch, heads, sequence, head_size]; what lies behind the first rotary_size values stays.
        cos, sin: float32 [sequence, rotary_size / 2].
    """
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def attention(queries: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float, window: int = 0) -> np.ndarray:
    """Causal grouped-query attention; the queries are the last of the key positions.

    Args:
        queries: float32 [batch, heads, sequence, head_size].
        keys, values: float32 [batch, kv_heads, positions, head_size].
        scale: multiplies the scores.
        window: positions that a query sees, its own the last; 0 for all.

    Returns:
        float32 [batch, sequence, heads * head_size].
    """
    batch, heads, sequence, head_size = queries.shape
    kv_heads, positions = keys.shape[1:3]
    grouped = queries.reshape(batch, kv_heads, heads // kv_heads, sequence, head_size)
    grouped = grouped * np.float32(scale)
    mixed = np.empty_like(grouped)
    # In chunks, so that a long prompt needs no square matrix of scores; in place, since these are the largest arrays.
    for start in range(0, sequence, QUERY_CHUNK):
        end = min(start + QUERY_CHUNK, sequence)
        visible = positions - sequence + end
        scores = grouped[..., start:end, :] @ keys[:, :, None, :visible].swapaxes(-1, -2)
        row = np.arange(visible - (end - start), visible)[:, None]
        column = np.arange(visible)
        hidden = (column > row) | (column <= row - window) if window else column > row
        np.copyto(scores, -np.inf, where=hidden)
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        mixed[..., start:end, :] = scores @ values[:, :, None, :visible] / scores.sum(axis=-1, keepdims=True)
    return mixed.reshape(batch, heads, sequence, head_size).transpose(0, 2, 1, 3).reshape(batch, sequence, -1)
