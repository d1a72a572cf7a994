"""The syntax of a GGUF v3 file: metadata and tensor table, validated before anything is used.

Only what the container needs (FORMAT.md) is accepted: little endian, alignment 32, flat arrays, tensors of
types I8, I16, I32 and F32 that lie one after the other without gaps. The file is mapped, not read, from one
descriptor: a file put in its place later is never used. Nothing is allocated that the file's size does not justify.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from mgptq_runtime.errors import ContainerError
from mgptq_runtime.files import Buffer, map_whole, open_regular

__all__ = [
    "ALIGNMENT",
    "WAY_OUT",
    "Cursor",
    "GGUFFile",
    "MetadataValue",
    "TensorInfo",
    "map_gguf",
    "parse_gguf",
    "read_counts",
    "read_gguf",
    "read_metadata",
]

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32

MAX_METADATA_KEYS = 4096
MAX_TENSORS = 1 << 16
MAX_KEY_BYTES = 256
MAX_TENSOR_NAME_BYTES = 63
# Python holds text with one wide character in four times its bytes.
MAX_TEXT_BYTES = 40 << 20
MAX_ARRAY_STRINGS = 1 << 20
MAX_DIMENSIONS = 4

WAY_OUT = "copy the file again, or export it again"

INTEGERS = {"I": struct.Struct("<I"), "Q": struct.Struct("<Q")}
STRING, ARRAY = 8, 9
SCALAR_TYPES: Mapping[int, tuple[str, str]] = {
    0: ("uint8", "<u1"),
    1: ("int8", "<i1"),
    2: ("uint16", "<u2"),
    3: ("int16", "<i2"),
    4: ("uint32", "<u4"),
    5: ("int32", "<i4"),
    6: ("float32", "<f4"),
    7: ("bool", "|b1"),
    10: ("uint64", "<u8"),
    11: ("int64", "<i8"),
    12: ("float64", "<f8"),
}
TENSOR_TYPES: Mapping[int, tuple[str, str]] = {
    0: ("F32", "<f4"),
    24: ("I8", "<i1"),
    25: ("I16", "<i2"),
    26: ("I32", "<i4"),
}


@dataclass(frozen=True)
class MetadataValue:
    """One metadata value.

    Attributes:
        type: ``string``, ``array of string``, ``uint32``, ``array of float32``, ...
        value: str, int, float, bool, list of str, or a NumPy array (a view of the file).
        offset: where the value lies in the file, in bytes.
    """

    type: str
    value: Any
    offset: int


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's entry in the table.

    Attributes:
        name: unique.
        type: ``F32``, ``I8``, ``I16`` or ``I32``.
        shape: in NumPy's order, the contiguous dimension last.
        offset: from the start of the file, in bytes.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(next(dtype for name, dtype in TENSOR_TYPES.values() if name == self.type))

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class GGUFFile:
    """A file whose syntax is sound.

    Attributes:
        path: where it lies.
        buffer: the whole file, read-only.
        metadata: values by key, in the file's order.
        tensors: table entries by name, in the file's order.
    """

    path: Path
    buffer: Buffer
    metadata: Mapping[str, MetadataValue]
    tensors: Mapping[str, TensorInfo]

    def array(self, name: str) -> np.ndarray:
        """A read-only view of a tensor's values, in its type and shape."""
        info = self.tensors[name]
        flat = np.frombuffer(self.buffer, info.dtype, math.prod(info.shape), info.offset)
        return flat.reshape(info.shape)


class Cursor:
    """Reads forward through the file and never past its end.

    What it reads is named by ``what`` in messages.

    Raises:
        ContainerError: what is asked for is not there; the text names the byte offset.
    """

    def __init__(self, path: Path, buffer: Buffer) -> None:
        self.path = path
        self.buffer = buffer
        self.size = len(buffer)
        self.offset = 0
        self.array_strings = 0
        self.text_bytes = 0

    def fail(self, message: str, offset: int | None = None, way_out: str = WAY_OUT) -> NoReturn:
        place = self.offset if offset is None else offset
        raise ContainerError(f"{self.path}: at byte {place}: {message}; {way_out}")

    def need(self, count: int, what: str) -> None:
        if count > self.size - self.offset:
            self.fail(f"{what} needs {count} bytes, the file has {self.size - self.offset} left; it is cut or corrupt")

    def unpack(self, code: str, what: str) -> int:
        layout = INTEGERS[code]
        self.need(layout.size, what)
        (value,) = layout.unpack_from(self.buffer, self.offset)
        self.offset += layout.size
        return value

    def string(self, what: str, limit: int = MAX_TEXT_BYTES) -> str:
        start = self.offset
        length = self.unpack("Q", what)
        if length > limit:
            self.fail(f"{what} has {length} bytes, at most {limit} are allowed", start)
        self.need(length, what)
        self.text_bytes += length
        if self.text_bytes > MAX_TEXT_BYTES:
            self.fail(f"{what}: {self.text_bytes} bytes of text so far, at most {MAX_TEXT_BYTES} are allowed", start)
        raw = self.buffer[self.offset : self.offset + length]
        self.offset += length
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not UTF-8 ({error.reason})", start)

    def scalars(self, value_type: int, count: int, what: str) -> np.ndarray:
        name, dtype = SCALAR_TYPES[value_type]
        self.need(count * np.dtype(dtype).itemsize, what)
        start = self.offset
        self.offset += count * np.dtype(dtype).itemsize
        if name == "bool":
            raw = np.frombuffer(self.buffer, np.uint8, count, start)
            if raw.size and raw.max() > 1:
                self.fail(f"{what}: a bool of {raw.max()}, only 0 and 1 are allowed", start)
        return np.frombuffer(self.buffer, dtype, count, start)

    def strings(self, count: int, what: str) -> list[str]:
        self.need(count * 8, what)
        self.array_strings += count
        if self.array_strings > MAX_ARRAY_STRINGS:
            self.fail(f"{what}: {self.array_strings} strings in arrays, at most {MAX_ARRAY_STRINGS} are allowed")
        entry = f"an entry of {what}"
        return [self.string(entry) for _ in range(count)]


def read_counts(cursor: Cursor) -> tuple[int, int]:
    """How many tensors and how many entries of metadata follow, which a file says behind its version.

    Raises:
        ContainerError: more than are allowed.
    """
    tensor_count = cursor.unpack("Q", "the number of tensors")
    if tensor_count > MAX_TENSORS:
        cursor.fail(f"{tensor_count} tensors, at most {MAX_TENSORS} are allowed", 8)
    key_count = cursor.unpack("Q", "the number of metadata keys")
    if key_count > MAX_METADATA_KEYS:
        cursor.fail(f"{key_count} metadata keys, at most {MAX_METADATA_KEYS} are allowed", 16)
    return tensor_count, key_count


def _value_type_name(cursor: Cursor, value_type: int, what: str) -> str:
    if value_type == STRING:
        return "string"
    if value_type not in SCALAR_TYPES:
        allowed = sorted([*SCALAR_TYPES, STRING])
        cursor.fail(f"{what} has value type {value_type}, allowed are {allowed} and flat arrays (9)", cursor.offset - 4)
    return SCALAR_TYPES[value_type][0]


def _read_value(cursor: Cursor, key: str) -> MetadataValue:
    what = f"key {key!r}"
    value_type = cursor.unpack("I", f"the type of {what}")
    offset = cursor.offset
    if value_type == ARRAY:
        element_type = cursor.unpack("I", f"the element type of {what}")
        name = _value_type_name(cursor, element_type, f"an element of {what}")
        count = cursor.unpack("Q", f"the length of {what}")
        is_text = element_type == STRING
        values = cursor.strings(count, what) if is_text else cursor.scalars(element_type, count, what)
        return MetadataValue(f"array of {name}", values, offset)
    name = _value_type_name(cursor, value_type, what)
    if value_type == STRING:
        return MetadataValue(name, cursor.string(what), offset)
    return MetadataValue(name, cursor.scalars(value_type, 1, what)[0].item(), offset)


def read_metadata(cursor: Cursor, count: int) -> dict[str, MetadataValue]:
    """The next ``count`` entries of metadata, by key.

    Raises:
        ContainerError: broken or duplicate ones.
    """
    metadata: dict[str, MetadataValue] = {}
    for i in range(count):
        start = cursor.offset
        key = cursor.string(f"metadata key {i}", MAX_KEY_BYTES)
        if not key or key in metadata:
            cursor.fail(f"metadata key {i} is {'empty' if not key else f'a second {key!r}'}", start)
        metadata[key] = _read_value(cursor, key)
    return metadata


def _read_tensor_info(cursor: Cursor, index: int) -> TensorInfo:
    """One table entry; its offset is still relative to the data section."""
    name = cursor.string(f"the name of tensor {index}", MAX_TENSOR_NAME_BYTES)
    what = f"tensor {name!r}"
    dimensions = cursor.unpack("I", f"the number of dimensions of {what}")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        cursor.fail(f"{what} has {dimensions} dimensions, allowed are 1 to {MAX_DIMENSIONS}", cursor.offset - 4)
    shape = tuple(cursor.unpack("Q", f"the shape of {what}") for _ in range(dimensions))
    if any(size < 1 or size > cursor.size for size in shape):
        cursor.fail(f"{what} has shape {list(shape)}: each dimension must be 1 to the file's size, {cursor.size}")
    tensor_type = cursor.unpack("I", f"the type of {what}")
    if tensor_type not in TENSOR_TYPES:
        allowed = ", ".join(f"{number} ({name})" for number, (name, _) in TENSOR_TYPES.items())
        cursor.fail(f"{what} has type {tensor_type}, allowed are {allowed}", cursor.offset - 4)
    offset = cursor.unpack("Q", f"the offset of {what}")
    return TensorInfo(name, TENSOR_TYPES[tensor_type][0], shape[::-1], offset)


def _read_tensor_table(cursor: Cursor, count: int) -> list[tuple[TensorInfo, int]]:
    """Table entries, each with the file position of its entry."""
    table: list[tuple[TensorInfo, int]] = []
    names: set[str] = set()
    for i in range(count):
        start = cursor.offset
        info = _read_tensor_info(cursor, i)
        if not info.name or info.name in names:
            cursor.fail(f"the name of tensor {i} is {'empty' if not info.name else f'a second {info.name!r}'}", start)
        names.add(info.name)
        table.append((info, start))
    return table


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _place_tensors(cursor: Cursor, table: list[tuple[TensorInfo, int]]) -> dict[str, TensorInfo]:
    """Check that the tensors fill the data section in order, without gap or overlap, and the file ends there."""

    def check_padding(start: int) -> int:
        end = _aligned(start)
        if end > cursor.size:
            cursor.fail(f"the file ends before byte {end}, where the next data would be; it is cut", start)
        if any(cursor.buffer[start:end]):
            cursor.fail("padding must be zero bytes", start)
        return end

    data_start = position = check_padding(cursor.offset)
    tensors: dict[str, TensorInfo] = {}
    for info, entry in table:
        if data_start + info.offset != position:
            cursor.fail(
                f"tensor {info.name!r} has offset {info.offset}; after the tensors before it, "
                f"it must be {position - data_start}",
                entry,
            )
        placed = TensorInfo(info.name, info.type, info.shape, position)
        if placed.nbytes > cursor.size - position:
            cursor.fail(
                f"tensor {info.name!r} {info.type} {list(info.shape)} needs {placed.nbytes} bytes at byte {position}, "
                f"the file has {cursor.size - position} left; it is cut or corrupt",
                entry,
            )
        tensors[info.name] = placed
        position = check_padding(position + placed.nbytes)
    if position != cursor.size:
        cursor.fail(f"{cursor.size - position} bytes follow the last tensor, none are allowed", position)
    return tensors


def map_gguf(path: Path) -> Buffer:
    """Map a file.

    Raises:
        ContainerError: there is no regular file, or it cannot be read.
    """
    if not path.is_file():
        raise ContainerError(f"{path} is not a file; a container is one .gguf file")
    try:
        with open_regular(path) as stream:
            return map_whole(stream)
    except OSError as error:
        raise ContainerError(f"{path} cannot be read: {error.strerror or error}") from error


def _describe(found: MetadataValue | None) -> str:
    if found is None:
        return "missing"
    return f"an {found.type}" if found.type.startswith("array") else repr(found.value)


def _check_architecture(cursor: Cursor, metadata: Mapping[str, MetadataValue], architecture: str) -> None:
    """Before the tensors, so that a sound GGUF file of another kind gets this answer."""
    found = metadata.get("general.architecture")
    if found is None or found.type != "string" or found.value != architecture:
        cursor.fail(
            f"general.architecture is {_describe(found)}; only {architecture!r} containers run here",
            None if found is None else found.offset,
            "give a package or its model.mgptq.gguf, or make one with: mgptq-export run MODEL -o OUT",
        )


def _check_alignment(cursor: Cursor, metadata: Mapping[str, MetadataValue]) -> None:
    found = metadata.get("general.alignment")
    if found is not None and (found.type != "uint32" or found.value != ALIGNMENT):
        cursor.fail(
            f"general.alignment is {_describe(found)} ({found.type}), a container has {ALIGNMENT} (uint32)",
            found.offset,
        )


def read_gguf(path: Path, architecture: str) -> GGUFFile:
    """Map a file and validate its syntax: :func:`map_gguf`, then :func:`parse_gguf`."""
    return parse_gguf(path, map_gguf(path), architecture)


def parse_gguf(path: Path, buffer: Buffer, architecture: str) -> GGUFFile:
    """Validate a file's syntax.

    Args:
        path: what error messages call the file.
        buffer: the whole file.
        architecture: what ``general.architecture`` must say.

    Raises:
        ContainerError: the file breaks a rule of FORMAT.md, section "File"; the text names the byte offset, what was
            found and what is allowed.
    """
    cursor = Cursor(path, buffer)
    if buffer[:4] != MAGIC:
        cursor.fail(f"found {buffer[:4]!r}, a container starts with {MAGIC!r}")
    cursor.offset = 4
    version = cursor.unpack("I", "the version")
    if version == VERSION << 24:
        cursor.fail("the file is big endian, a container is little endian", 4)
    if version != VERSION:
        cursor.fail(f"GGUF version {version}, a container has version {VERSION}", 4)
    tensor_count, key_count = read_counts(cursor)
    metadata = read_metadata(cursor, key_count)
    _check_architecture(cursor, metadata, architecture)
    _check_alignment(cursor, metadata)
    tensors = _place_tensors(cursor, _read_tensor_table(cursor, tensor_count))
    return GGUFFile(path, buffer, metadata, tensors)
