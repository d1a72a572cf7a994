"""The formats of containers and ONNX graphs: blocks of 64 columns with one scale.

A weight matrix row is cut into blocks of 64 columns. A block stores one scale and 64 codes:

    [ d: float16, little endian, may be negative ][ codes, packed, lowest bits first ]

and a code ``c`` means the weight ``(step * c + offset) * d``. There are no zero points.

=======  =========================  ============  ===============
format   weight                     bytes/block   bits per weight
=======  =========================  ============  ===============
b1       ``(2c - 1) * d``           10            1.25
b2       ``(c - 1) * d``            18            2.25
b3       ``(c - 3) * d``            26            3.25
b4       ``(c - 8) * d``            34            4.25
b8       ``(c - 127) * d``          66            8.25
=======  =========================  ============  ===============

A b2 block is, byte for byte, a ggml ``Q2_0`` block. b8 stores ``c - 127`` as a signed byte.
"""

from typing import ClassVar

import numpy as np

from mgptq_runtime.errors import ContainerError
from mgptq_runtime.formats.base import Format
from mgptq_runtime.formats.planes import pack_plane, plane_codes, plane_values, unpack_plane

__all__ = ["BLOCK_COLUMNS", "FORMATS", "ColumnFormat", "padded_columns"]

BLOCK_COLUMNS = 64
SCALE_BYTES = 2

FORMATS: dict[str, "ColumnFormat"] = {}


def padded_columns(columns: int) -> int:
    """``columns`` rounded up to whole blocks."""
    return -(-columns // BLOCK_COLUMNS) * BLOCK_COLUMNS


class ColumnFormat(Format):
    """One format of 64-column blocks. Subclasses hold only the packing of 64 codes into bytes.

    Class attributes:
        name: the name in files, ``b1`` to ``b8``.
        levels: number of codes; a code is in ``0 .. levels - 1``.
        step, offset: a code ``c`` means ``(step * c + offset) * d``.
        code_bytes: bytes of 64 packed codes.
    """

    block_columns = BLOCK_COLUMNS
    levels: ClassVar[int]
    step: ClassVar[int] = 1
    offset: ClassVar[int]
    code_bytes: ClassVar[int]

    def __init_subclass__(cls) -> None:
        if not hasattr(cls, "name"):
            return
        cls.block_bytes = SCALE_BYTES + cls.code_bytes
        cls.bits_per_weight = cls.block_bytes * 8 / BLOCK_COLUMNS
        FORMATS[cls.name] = cls()

    def _pack_codes(self, codes: np.ndarray) -> np.ndarray:
        """uint8 [..., 64] to uint8 [..., code_bytes]."""
        raise NotImplementedError

    def _unpack_codes(self, packed: np.ndarray) -> np.ndarray:
        """uint8 [..., code_bytes] to uint8 [..., 64]."""
        raise NotImplementedError

    def _unpack_values(self, packed: np.ndarray) -> np.ndarray:
        """uint8 [..., code_bytes] to the codes' weights at scale 1, float32 [..., 64]."""
        raise NotImplementedError

    def pack(self, codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """Pack codes and scales into stored bytes.

        Args:
            codes: uint8 [rows, blocks * 64], each below ``levels``.
            scales: float16 [rows, blocks].

        Returns:
            uint8 [rows, blocks * block_bytes].

        Raises:
            ValueError: shapes or types that do not fit, or a code out of range.
        """
        rows, columns = codes.shape
        blocks = columns // BLOCK_COLUMNS
        if columns % BLOCK_COLUMNS or scales.shape != (rows, blocks):
            raise ValueError(
                f"{self.name}: codes {codes.shape} need scales {(rows, columns / BLOCK_COLUMNS)}, got {scales.shape}"
            )
        if codes.dtype != np.uint8 or scales.dtype != np.float16:
            raise ValueError(f"{self.name}: needs uint8 codes and float16 scales, got {codes.dtype}, {scales.dtype}")
        if codes.size and codes.max() >= self.levels:
            raise ValueError(f"{self.name}: code {codes.max()} is not below {self.levels}")
        out = np.empty((rows, blocks, self.block_bytes), np.uint8)
        out[..., :SCALE_BYTES] = scales.astype("<f2").reshape(rows, blocks, 1).view(np.uint8)
        out[..., SCALE_BYTES:] = self._pack_codes(codes.reshape(rows, blocks, BLOCK_COLUMNS))
        return out.reshape(rows, -1)

    def scales(self, data: np.ndarray) -> np.ndarray:
        """Scales of packed rows: uint8 [rows, blocks * block_bytes] to float16 [rows, blocks]."""
        blocks = self._blocks(data)
        return np.ascontiguousarray(blocks[..., :SCALE_BYTES]).view("<f2")[..., 0]

    def packed_codes(self, data: np.ndarray) -> np.ndarray:
        """Packed codes alone: uint8 [rows, blocks * block_bytes] to uint8 [rows, blocks, code_bytes]."""
        return np.ascontiguousarray(self._blocks(data)[..., SCALE_BYTES:])

    def unpack(self, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The inverse of :meth:`pack`: (codes uint8 [rows, blocks * 64], scales float16 [rows, blocks])."""
        codes = self._unpack_codes(self._blocks(data)[..., SCALE_BYTES:])
        return codes.reshape(data.shape[0], -1), self.scales(data)

    def dequantize(self, data: np.ndarray) -> np.ndarray:
        """Weights of packed rows: uint8 [rows, blocks * block_bytes] to float32 [rows, blocks * 64]."""
        values = self._unpack_values(self.packed_codes(data))
        values *= self.scales(data).astype(np.float32)[..., None]
        return values.reshape(data.shape[0], -1)

    def values(self) -> np.ndarray:
        """Weight of every code at scale 1: float32 [levels]."""
        return np.arange(self.levels, dtype=np.float32) * self.step + self.offset


class _Plane(ColumnFormat):
    """Codes that lie in one plane of ``plane_bits`` each."""

    plane_bits: ClassVar[int]

    def _pack_codes(self, codes: np.ndarray) -> np.ndarray:
        return pack_plane(codes, self.plane_bits)

    def _unpack_codes(self, packed: np.ndarray) -> np.ndarray:
        return unpack_plane(packed, plane_codes(self.plane_bits))

    def _unpack_values(self, packed: np.ndarray) -> np.ndarray:
        return unpack_plane(packed, plane_values(self.plane_bits, self.step, self.offset))


class B1(_Plane):
    name, levels, step, offset, code_bytes, plane_bits = "b1", 2, 2, -1, 8, 1


class B2(_Plane):
    name, levels, offset, code_bytes, plane_bits = "b2", 4, -1, 16, 2


class B3(ColumnFormat):
    """The low two bits of 64 codes (16 bytes), then their high bits (8 bytes)."""

    name, levels, offset, code_bytes = "b3", 8, -3, 24

    def _pack_codes(self, codes: np.ndarray) -> np.ndarray:
        return np.concatenate([pack_plane(codes & 3, 2), pack_plane(codes >> 2, 1)], axis=-1)

    def _unpack_codes(self, packed: np.ndarray) -> np.ndarray:
        low = unpack_plane(packed[..., :16], plane_codes(2))
        return low | (unpack_plane(packed[..., 16:], plane_codes(1)) << np.uint8(2))

    def _unpack_values(self, packed: np.ndarray) -> np.ndarray:
        values = unpack_plane(packed[..., :16], plane_values(2, 1, self.offset))
        values += unpack_plane(packed[..., 16:], plane_values(1, 4, 0))
        return values


class B4(_Plane):
    name, levels, offset, code_bytes, plane_bits = "b4", 16, -8, 32, 4


class B8(ColumnFormat):
    """``code - 127`` as a signed byte."""

    name, levels, offset, code_bytes = "b8", 255, -127, 64

    def _pack_codes(self, codes: np.ndarray) -> np.ndarray:
        return (codes.astype(np.int16) + self.offset).astype(np.int8).view(np.uint8)

    def _signed(self, packed: np.ndarray) -> np.ndarray:
        signed = packed.view(np.int8)
        if signed.size and signed.min() < self.offset:
            raise ContainerError("b8: a stored byte of -128 is not a code; codes are -127 to 127")
        return signed

    def _unpack_codes(self, packed: np.ndarray) -> np.ndarray:
        return (self._signed(packed).astype(np.int16) - self.offset).astype(np.uint8)

    def _unpack_values(self, packed: np.ndarray) -> np.ndarray:
        return self._signed(packed).astype(np.float32)

    def validate_codes(self, data: np.ndarray) -> None:
        self._signed(self._blocks(data)[..., SCALE_BYTES:])
