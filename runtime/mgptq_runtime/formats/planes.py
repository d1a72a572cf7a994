"""Planes of codes narrower than a byte."""

from functools import cache

import numpy as np

__all__ = ["pack_lanes", "pack_plane", "plane_codes", "plane_values", "unpack_lanes", "unpack_plane"]


def pack_plane(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack ``bits``-bit codes, lowest bits first: uint8 [..., n] to uint8 [..., n * bits / 8]."""
    per_byte = 8 // bits
    lanes = codes.reshape(*codes.shape[:-1], -1, per_byte)
    packed = np.zeros(lanes.shape[:-1], np.uint8)
    for lane in range(per_byte):
        packed |= lanes[..., lane] << np.uint8(lane * bits)
    return packed


@cache
def plane_codes(bits: int) -> np.ndarray:
    """The codes in every byte value: uint8 [256, 8 / bits]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return (np.arange(256, dtype=np.uint8)[:, None] >> shifts) & np.uint8((1 << bits) - 1)


@cache
def plane_values(bits: int, step: int, offset: int) -> np.ndarray:
    """The values ``step * code + offset`` in every byte value: float32 [256, 8 / bits]."""
    return plane_codes(bits).astype(np.float32) * step + offset


def unpack_plane(packed: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Look every byte up: uint8 [..., n] to [..., n * table.shape[1]]."""
    return np.take(table, packed, axis=0).reshape(*packed.shape[:-1], -1)


def pack_lanes(codes: np.ndarray, bits: int, width: int) -> np.ndarray:
    """Pack ``bits``-bit codes as ggml does: the first ``width`` codes take the lowest bits of ``width`` bytes, the next
    ``width`` codes the bits above them, and so on.

    Args:
        codes: uint8 [..., n], bits above ``bits`` being ignored.

    Returns:
        uint8 [..., n * bits / 8].
    """
    per_byte = 8 // bits
    lanes = (codes & np.uint8((1 << bits) - 1)).reshape(*codes.shape[:-1], -1, per_byte, width)
    packed = np.zeros((*lanes.shape[:-2], width), np.uint8)
    for lane in range(per_byte):
        packed |= lanes[..., lane, :] << np.uint8(lane * bits)
    return packed.reshape(*codes.shape[:-1], -1)


def unpack_lanes(packed: np.ndarray, bits: int, width: int) -> np.ndarray:
    """The inverse of :func:`pack_lanes`: uint8 [..., n * bits / 8] to uint8 [..., n]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    lanes = packed.reshape(*packed.shape[:-1], -1, 1, width) >> shifts
    return (lanes & np.uint8((1 << bits) - 1)).reshape(*packed.shape[:-1], -1)
