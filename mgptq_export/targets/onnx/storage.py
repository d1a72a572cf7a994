"""How codes and scales lie in initializers.

ONNX Runtime's kernels read unsigned 2-, 4- and 8-bit codes ``q`` that mean ``(q - zero) * scale``, ``zero`` being half
the range. What is stored takes the container's bytes per block, but in an order that few operations turn into ``q``,
since each operation and each intermediate result costs memory while a session loads:

b1: 8 bytes. A kernel's 2-bit codes are 1 or 3, so only bits 1, 3, 5, 7 of its bytes ``q[0..15]`` vary; byte ``j`` holds
    those of ``q[j]``, and shifted right by one those of ``q[j + 8]``.
b2: 16 bytes, as the kernel reads them: ``q = 3 - c`` with the scale negated, as zero is 1 here and 2 in the kernel.
b3: 24 bytes. 4-bit bytes ``t[0..31]`` of the codes leave bits 3 and 7 free; byte ``j`` holds ``t[j]`` and, in its free
    bits, bit ``j // 8`` of both codes of ``t[24 + j % 8]``. ``q = c + 5``.
b4: 32 bytes, as the kernel reads them: ``q = c``.
b8: 64 bytes, as the kernel reads them: ``q = c + 1``.
"""

import numpy as np

from mgptq_runtime.formats import BLOCK_COLUMNS, FORMATS

__all__ = ["from_initializers", "to_initializers"]

STRIPS = np.arange(3, dtype=np.uint8)[:, None]


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """4-bit bytes, low nibble first: uint8 [..., n] to uint8 [..., n / 2]."""
    packed: np.ndarray = codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))
    return packed


def _split_nibbles(packed: np.ndarray) -> np.ndarray:
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def _pairs(codes: np.ndarray) -> np.ndarray:
    """2-bit bytes, lowest bits first: uint8 [..., n] to uint8 [..., n / 4]."""
    shifts = np.arange(0, 8, 2, dtype=np.uint8)
    packed: np.ndarray = np.bitwise_or.reduce(codes.reshape(*codes.shape[:-1], -1, 4) << shifts, axis=-1)
    return packed


def _split_pairs(packed: np.ndarray) -> np.ndarray:
    shifts = np.arange(0, 8, 2, dtype=np.uint8)
    return ((packed[..., None] >> shifts) & 3).reshape(*packed.shape[:-1], -1)


def _pack_b1(codes: np.ndarray) -> np.ndarray:
    wide = _pairs(codes << 1)
    packed: np.ndarray = wide[..., :8] | (wide[..., 8:] >> 1)
    return packed


def _unpack_b1(packed: np.ndarray) -> np.ndarray:
    wide = np.concatenate([packed, packed << 1], axis=-1)
    return _split_pairs(wide) >> 1


def _pack_b3(codes: np.ndarray) -> np.ndarray:
    strips = _nibbles(codes).reshape(*codes.shape[:-1], 4, 8)
    spread = ((strips[..., 3:, :] >> STRIPS) & 0x11) << 3
    return (strips[..., :3, :] | spread).reshape(*codes.shape[:-1], 24)


def _unpack_b3(packed: np.ndarray) -> np.ndarray:
    strips = packed.reshape(*packed.shape[:-1], 3, 8)
    last = np.bitwise_or.reduce(((strips >> 3) & 0x11) << STRIPS, axis=-2, keepdims=True)
    wide = np.concatenate([strips & 0x77, last], axis=-2)
    return _split_nibbles(wide.reshape(*packed.shape[:-1], 32))


PACK = {
    "b1": _pack_b1,
    "b2": lambda codes: _pairs(3 - codes),
    "b3": _pack_b3,
    "b4": _nibbles,
    "b8": lambda codes: codes + np.uint8(1),
}
UNPACK = {
    "b1": _unpack_b1,
    "b2": lambda packed: 3 - _split_pairs(packed),
    "b3": _unpack_b3,
    "b4": _split_nibbles,
    "b8": lambda packed: packed - np.uint8(1),
}
NEGATED_SCALES = {"b2"}


def to_initializers(fmt: str, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A packed segment as initializers.

    Args:
        fmt: a key of :data:`mgptq_runtime.formats.FORMATS`.
        data: uint8 [rows, blocks * block_bytes], as that format packs it.

    Returns:
        codes, uint8 [rows, blocks, code_bytes], and scales, float16 [rows, blocks].
    """
    codes, scales = FORMATS[fmt].unpack(data)
    packed = PACK[fmt](codes.reshape(len(codes), -1, BLOCK_COLUMNS))
    return packed, -scales if fmt in NEGATED_SCALES else scales


def from_initializers(fmt: str, codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The inverse of :func:`to_initializers`."""
    return FORMATS[fmt].pack(UNPACK[fmt](codes).reshape(len(codes), -1), -scales if fmt in NEGATED_SCALES else scales)
