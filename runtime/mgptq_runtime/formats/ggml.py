"""Stock ggml types: whole tensors that llama.cpp runs as they are.

A block holds codes and parameters in the byte layout of ggml's ``block_*`` structures (``ggml-common.h``). It is cut
into sub-blocks; a code ``c`` of sub-block ``s`` means

    (d * scales[s]) * (step * c + offset) - dmin * mins[s]

in float32, where types without sub-blocks have a scale of 1 and types without minima have none.

=======  =======  ==================  ===========================  ===============
format   columns  sub-blocks          value of a code              bits per weight
=======  =======  ==================  ===========================  ===============
q1_0     128      1                   ``2c - 1``                   1.125
q2_0     64       1                   ``c - 1``                    2.25
q2_k     256      16, 4-bit           ``c``, 4-bit minima          2.625
q3_k     256      16, -32 to 31       ``c - 4``                    3.4375
q4_0     32       1                   ``c - 8``                    4.5
q4_k     256      8, 6-bit            ``c``, 6-bit minima          4.5
q6_k     256      16, -128 to 127     ``c - 32``                   6.5625
q8_0     32       1                   ``c - 128``                  8.5
=======  =======  ==================  ===========================  ===============
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mgptq_runtime.formats.base import Format
from mgptq_runtime.formats.planes import (
    pack_lanes,
    pack_plane,
    plane_codes,
    unpack_lanes,
    unpack_plane,
)

__all__ = ["GGML_FORMATS", "BlockParameters", "GgmlFormat"]

GGML_FORMATS: dict[str, "GgmlFormat"] = {}

Fields = dict[str, np.ndarray]


@dataclass(frozen=True)
class BlockParameters:
    """Everything that a ggml block stores besides its codes.

    Attributes:
        d: float16 [rows, blocks].
        scales: int16 [rows, sub_blocks], of types with sub-blocks.
        dmin: float16 [rows, blocks], of types with minima.
        mins: int16 [rows, sub_blocks], of types with minima.
    """

    d: np.ndarray
    scales: np.ndarray | None = None
    dmin: np.ndarray | None = None
    mins: np.ndarray | None = None


class GgmlFormat(Format):
    """One ggml type. Subclasses hold the layout and the packing of codes and of sub-block parameters.

    Class attributes:
        ggml_type: the type's number in GGUF files.
        levels: number of codes; a code is in ``0 .. levels - 1``.
        step, offset: see the module.
        sub_columns: columns of a sub-block.
        scale_range: the lowest and highest scale of a sub-block, or None where a block has only ``d``.
        largest_min: the highest minimum of a sub-block, minima starting at 0; or None where there are none.
        layout: the block's fields in order.
    """

    ggml_type: ClassVar[int]
    levels: ClassVar[int]
    step: ClassVar[int] = 1
    offset: ClassVar[int] = 0
    sub_columns: ClassVar[int]
    scale_range: ClassVar[tuple[int, int] | None] = None
    largest_min: ClassVar[int | None] = None
    layout: ClassVar[np.dtype]

    def __init_subclass__(cls) -> None:
        cls.block_bytes = cls.layout.itemsize
        cls.bits_per_weight = cls.block_bytes * 8 / cls.block_columns
        GGML_FORMATS[cls.name] = cls()

    def _pack_codes(self, codes: np.ndarray) -> Fields:
        """uint8 [rows, blocks, block_columns] to the fields that hold codes."""
        raise NotImplementedError

    def _unpack_codes(self, fields: np.ndarray) -> np.ndarray:
        """Fields [rows, blocks] to uint8 [rows, blocks, block_columns]."""
        raise NotImplementedError

    def _pack_scales(self, scales: np.ndarray, mins: np.ndarray | None) -> np.ndarray:
        """int16 [rows, blocks, sub-blocks of a block] to the field ``scales``."""
        raise NotImplementedError

    def _unpack_scales(self, packed: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """The inverse of :meth:`_pack_scales`."""
        raise NotImplementedError

    def pack(self, codes: np.ndarray, parameters: BlockParameters) -> np.ndarray:
        """Pack codes and parameters into stored bytes.

        Args:
            codes: uint8 [rows, blocks * block_columns], each below ``levels``.
            parameters: exactly those that the type has.

        Returns:
            uint8 [rows, blocks * block_bytes].

        Raises:
            ValueError: shapes or types that do not fit, or a number out of range.
        """
        rows, columns = codes.shape
        blocks = columns // self.block_columns
        self._check(codes, parameters)
        fields = np.empty((rows, blocks), self.layout)
        for name, field in self._pack_codes(codes.reshape(rows, blocks, self.block_columns)).items():
            fields[name] = field
        fields["d"] = parameters.d
        if parameters.scales is not None:
            mins = None if parameters.mins is None else parameters.mins.reshape(rows, blocks, -1)
            fields["scales"] = self._pack_scales(parameters.scales.reshape(rows, blocks, -1), mins)
        if parameters.dmin is not None:
            fields["dmin"] = parameters.dmin
        return fields.view(np.uint8).reshape(rows, -1)

    def _check(self, codes: np.ndarray, parameters: BlockParameters) -> None:
        rows, columns = codes.shape
        if columns % self.block_columns:
            raise ValueError(f"{self.name}: {columns} columns are not whole blocks of {self.block_columns}")
        per_block, per_sub_block = (rows, columns // self.block_columns), (rows, columns // self.sub_columns)
        minima, integer = self.largest_min is not None, np.dtype(np.int16)
        self._check_array("codes", codes, True, (rows, columns), np.dtype(np.uint8), (0, self.levels - 1))
        self._check_array("d", parameters.d, True, per_block, np.dtype(np.float16))
        has_scales = self.scale_range is not None
        self._check_array("scales", parameters.scales, has_scales, per_sub_block, integer, self.scale_range)
        self._check_array("dmin", parameters.dmin, minima, per_block, np.dtype(np.float16))
        self._check_array("mins", parameters.mins, minima, per_sub_block, integer, (0, self.largest_min or 0))

    def _check_array(
        self,
        name: str,
        array: np.ndarray | None,
        wanted: bool,
        shape: tuple[int, int],
        dtype: np.dtype,
        bounds: tuple[int, int] | None = None,
    ) -> None:
        if array is None or not wanted:
            if wanted != (array is not None):
                raise ValueError(f"{self.name}: {name} {'are missing' if wanted else 'are no part of this type'}")
            return
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(f"{self.name}: {name} must be {dtype} {shape}, got {array.dtype} {array.shape}")
        if bounds and array.size and not (bounds[0] <= array.min() and array.max() <= bounds[1]):
            raise ValueError(
                f"{self.name}: {name} of {array.min()} to {array.max()} are not within {bounds[0]} to {bounds[1]}"
            )

    def unpack(self, data: np.ndarray) -> tuple[np.ndarray, BlockParameters]:
        """The inverse of :meth:`pack`: (codes uint8 [rows, blocks * block_columns], parameters)."""
        fields = np.ascontiguousarray(self._blocks(data)).view(self.layout)[..., 0]
        rows = len(fields)
        scales, mins = self._unpack_scales(fields["scales"]) if self.scale_range else (None, None)
        parameters = BlockParameters(
            fields["d"].astype(np.float16),
            None if scales is None else scales.reshape(rows, -1),
            None if mins is None else fields["dmin"].astype(np.float16),
            None if mins is None else mins.reshape(rows, -1),
        )
        return self._unpack_codes(fields).reshape(rows, -1), parameters

    def dequantize(self, data: np.ndarray) -> np.ndarray:
        """Weights of packed rows, bit for bit llama.cpp's: see :meth:`Format.dequantize`."""
        codes, parameters = self.unpack(data)
        rows, sub_blocks = len(codes), self.block_columns // self.sub_columns
        values = codes.astype(np.float32).reshape(rows, -1, self.sub_columns)
        values *= self.step
        values += self.offset
        scales = parameters.d.astype(np.float32).repeat(sub_blocks, axis=1)
        if parameters.scales is not None:
            scales *= parameters.scales
        values *= scales[..., None]
        if parameters.dmin is not None and parameters.mins is not None:
            mins = parameters.dmin.astype(np.float32).repeat(sub_blocks, axis=1) * parameters.mins
            values -= mins[..., None].astype(np.float32)
        return values.reshape(rows, -1)


def _layout(*fields: tuple[str, str, int] | tuple[str, str]) -> np.dtype:
    return np.dtype(list(fields))


class Q1_0(GgmlFormat):
    """One sign per weight, lowest bits first."""

    name, ggml_type, block_columns, sub_columns = "q1_0", 41, 128, 128
    levels, step, offset = 2, 2, -1
    layout = _layout(("d", "<f2"), ("codes", "u1", 16))

    def _pack_codes(self, codes: np.ndarray) -> Fields:
        return {"codes": pack_plane(codes, 1)}

    def _unpack_codes(self, fields: np.ndarray) -> np.ndarray:
        return unpack_plane(fields["codes"], plane_codes(1))


class Q2_0(GgmlFormat):
    """Four codes per byte, lowest bits first: byte for byte a ``b2`` block."""

    name, ggml_type, block_columns, sub_columns = "q2_0", 42, 64, 64
    levels, offset = 4, -1
    layout = _layout(("d", "<f2"), ("codes", "u1", 16))

    def _pack_codes(self, codes: np.ndarray) -> Fields:
        return {"codes": pack_plane(codes, 2)}

    def _unpack_codes(self, fields: np.ndarray) -> np.ndarray:
        return unpack_plane(fields["codes"], plane_codes(2))


class Q2_K(GgmlFormat):
    """A sub-block's scale and minimum share a byte, the scale in the low half."""

    name, ggml_type, block_columns, sub_columns = "q2_k", 10, 256, 16
    levels, scale_range, largest_min = 4, (0, 15), 15
    layout = _layout(("scales", "u1", 16), ("codes", "u1", 64), ("d", "<f2"), ("dmin", "<f2"))

    def _pack_codes(self, codes: np.ndarray) -> Fields:
        return {"codes": pack_lanes(codes, 2, 32)}

    def _unpack_codes(self, fields: np.ndarray) -> np.ndarray:
        return unpack_lanes(fields["codes"], 2, 32)

    def _pack_scales(self, scales: np.ndarray, mins: np.ndarray | None) -> np.ndarray:
        assert mins is not None
        return (scales | mins << 4).astype(np.uint8)

    def _unpack_scales(self, packed: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        return (packed & 15).astype(np.int16), (packed >> 4).astype(np.int16)


class Q3_K(GgmlFormat):
    """The high bits of the codes, then their low two; the scales' low four bits, then their high two."""

    name, ggml_type, block_columns, sub_columns = "q3_k", 11, 256, 16
    levels, offset, scale_range = 8, -4, (-32, 31)
    layout = _layout(("high", "u1", 32), ("low", "u1", 64), ("scales", "u1", 12), ("d", "<f2"))

    def _pack_codes(self, codes: np.ndarray) -> Fields:
        return {"low": pack_lanes(codes, 2, 32), "high": pack_lanes(codes >> 2, 1, 32)}

    def _unpack_codes(self, fields: np.ndarray) -> np.ndarray:
        return unpack_lanes(fields["low"], 2, 32) | unpack_lanes(fields["high"], 1, 32) << np.uint8(2)

    def _pack_scales(self, scales: np.ndarray, mins: np.ndarray | None) -> np.ndarray:
        shifted = (scales + 32).astype(np.uint8)
        return np.concatenate([pack_lanes(shifted, 4, 8), pack_lanes(shifted >> 4, 2, 4)], axis=-1)

    def _unpack_scales(self, packed: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        shifted = unpack_lanes(packed[..., :8], 4, 8) | unpack_lanes(packed[..., 8:], 2, 4) << np.uint8(4)
        return shifted.astype(np.int16) - 32, None


class Q4_0(GgmlFormat):
    """The low halves of 16 bytes, then their high halves."""

    name, ggml_type, block_columns, sub_columns = "q4_0", 2, 32, 32
    levels, offset = 16, -8
    layout = _layout(("d", "<f2"), ("codes", "u1", 16))

    def _pack_codes(self, codes: np.ndarray) -> Fields:
        return {"codes": pack_lanes(codes, 4, 16)}

    def _unpack_codes(self, fields: np.ndarray) -> np.ndarray:
        return unpack_lanes(fields["codes"], 4, 16)


class Q4_K(GgmlFormat):
    """Eight scales and eight minima of 6 bits each in 12 bytes, the last four's high bits above the first four."""

    name, ggml_type, block_columns, sub_columns = "q4_k", 12, 256, 32
    levels, scale_range, largest_min = 16, (0, 63), 63
    layout = _layout(("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("codes", "u1", 128))

    def _pack_codes(self, codes: np.ndarray) -> Fields:
        return {"codes": pack_lanes(codes, 4, 32)}

    def _unpack_codes(self, fields: np.ndarray) -> np.ndarray:
        return unpack_lanes(fields["codes"], 4, 32)

    def _pack_scales(self, scales: np.ndarray, mins: np.ndarray | None) -> np.ndarray:
        assert mins is not None
        first = [part[..., :4] | (part[..., 4:] >> 4) << 6 for part in (scales, mins)]
        return np.concatenate([*first, scales[..., 4:] & 15 | (mins[..., 4:] & 15) << 4], axis=-1).astype(np.uint8)

    def _unpack_scales(self, packed: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        wide = packed.astype(np.int16)
        last = wide[..., 8:]
        scales = np.concatenate([wide[..., :4] & 63, last & 15 | (wide[..., :4] >> 6) << 4], axis=-1)
        mins = np.concatenate([wide[..., 4:8] & 63, last >> 4 | (wide[..., 4:8] >> 6) << 4], axis=-1)
        return scales, mins


class Q6_K(GgmlFormat):
    """The low four bits of the codes, their high two, and scales of a byte."""

    name, ggml_type, block_columns, sub_columns = "q6_k", 14, 256, 16
    levels, offset, scale_range = 64, -32, (-128, 127)
    layout = _layout(("low", "u1", 128), ("high", "u1", 64), ("scales", "i1", 16), ("d", "<f2"))

    def _pack_codes(self, codes: np.ndarray) -> Fields:
        return {"low": pack_lanes(codes, 4, 64), "high": pack_lanes(codes >> 4, 2, 32)}

    def _unpack_codes(self, fields: np.ndarray) -> np.ndarray:
        return unpack_lanes(fields["low"], 4, 64) | unpack_lanes(fields["high"], 2, 32) << np.uint8(4)

    def _pack_scales(self, scales: np.ndarray, mins: np.ndarray | None) -> np.ndarray:
        return scales.astype(np.int8)

    def _unpack_scales(self, packed: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        return packed.astype(np.int16), None


class Q8_0(GgmlFormat):
    """``code - 128`` as a signed byte."""

    name, ggml_type, block_columns, sub_columns = "q8_0", 8, 32, 32
    levels, offset = 256, -128
    layout = _layout(("d", "<f2"), ("codes", "i1", 32))

    def _pack_codes(self, codes: np.ndarray) -> Fields:
        return {"codes": (codes.astype(np.int16) + self.offset).astype(np.int8)}

    def _unpack_codes(self, fields: np.ndarray) -> np.ndarray:
        return (fields["codes"].astype(np.int16) - self.offset).astype(np.uint8)
