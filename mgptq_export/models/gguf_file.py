"""Any GGUF file, read by the container's parser as far as both are alike: the metadata.

The table of tensors is read here, as a model to quantize has llama.cpp's tensor types. Nothing is used before all of
it was found to be inside the file, and nothing is allocated that the file's size does not justify.
"""

import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from mgptq_runtime.errors import BadInputError, ContainerError, UnsupportedModelError
from mgptq_runtime.gguf_file import (
    ALIGNMENT,
    MAGIC,
    MAX_DIMENSIONS,
    MAX_TENSOR_NAME_BYTES,
    Cursor,
    MetadataValue,
    read_counts,
    read_metadata,
)

__all__ = ["GgufModel", "GgufTensor", "read_gguf_file"]

VERSIONS = (2, 3)
MAX_ALIGNMENT = 1 << 16


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file.

    Attributes:
        name: unique in the file.
        type: how its values are stored.
        shape: in NumPy's order, the contiguous dimension last.
        data: uint8 [bytes], a read-only view of the file.
    """

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    data: np.ndarray

    def values(self) -> np.ndarray:
        """Float32 in :attr:`shape`, in memory of their own.

        Raises:
            UnsupportedModelError: a type that gguf-py cannot dequantize.
        """
        rows = self.data.reshape(*self.shape[:-1], -1)
        try:
            return np.array(gguf.dequantize(rows, self.type), np.float32)
        except NotImplementedError as error:
            raise UnsupportedModelError(
                f"{self.name}: type {self.type.name} cannot be read; take a file in another type"
            ) from error


@dataclass(frozen=True)
class GgufModel:
    """A GGUF file whose syntax is sound.

    Attributes:
        path: where it lies.
        metadata: by key: str, int, float, bool, or a list of them.
        tensors: by name, in the file's order.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


@dataclass(frozen=True)
class _Entry:
    """A tensor's entry in the table; the offset is relative to the data section."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    bytes: int
    offset: int


def read_gguf_file(path: Path) -> GgufModel:
    """Map a GGUF file and validate its syntax.

    Raises:
        BadInputError: not a GGUF file, cut short, or broken; the text names the byte offset. Or one that this program
            made.
        UnsupportedModelError: tensors in a type that gguf-py does not know.
    """
    try:
        with path.open("rb") as file:
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return _read(path, Cursor(path, buffer))
    except (OSError, ValueError) as error:  # an empty file is a ValueError
        raise BadInputError(f"{path} is not a readable GGUF file ({error}); download it again") from error
    except ContainerError as error:
        raise BadInputError(f"not a readable GGUF file: {error}; download it again") from error


def _read(path: Path, cursor: Cursor) -> GgufModel:
    if cursor.buffer[:4] != MAGIC:
        raise BadInputError(
            f"{path} is no model: not a readable GGUF file, which starts with {MAGIC!r}; give a folder with "
            "config.json and safetensors, a .gguf file, or a hub id"
        )
    cursor.offset = 4
    version = cursor.unpack("I", "the version")
    if version not in VERSIONS:
        cursor.fail(f"GGUF version {version}, supported are 2 and 3, little endian", 4)
    tensor_count, key_count = read_counts(cursor)
    values = read_metadata(cursor, key_count)
    _check_original(path, values)
    alignment = _alignment(cursor, values.get("general.alignment"))
    entries = [_read_entry(cursor, index) for index in range(tensor_count)]
    tensors = _place(cursor, entries, alignment)
    metadata = {key: v.value.tolist() if isinstance(v.value, np.ndarray) else v.value for key, v in values.items()}
    return GgufModel(path, metadata, tensors)


def _check_original(path: Path, values: Mapping[str, MetadataValue]) -> None:
    """Before the tensors, some of whose types gguf-py does not know.

    Nobody means to quantize this program's 2 or 3 bits again: what they lost would be lost twice, unseen.
    """
    architecture = values.get("general.architecture")
    if "mgptq.recipe" in values or (architecture is not None and architecture.value == "mgptq"):
        raise BadInputError(f"{path} is quantized already, by this program; start from the original model")


def _alignment(cursor: Cursor, found: MetadataValue | None) -> int:
    if found is None:
        return ALIGNMENT
    value = found.value
    if type(value) is not int or not 1 <= value <= MAX_ALIGNMENT or value & (value - 1):
        cursor.fail(f"general.alignment is {value!r}, it must be a power of two up to {MAX_ALIGNMENT}", found.offset)
    return value


def _read_entry(cursor: Cursor, index: int) -> _Entry:
    name = cursor.string(f"the name of tensor {index}", MAX_TENSOR_NAME_BYTES)
    what = f"tensor {name!r}"
    dimensions = cursor.unpack("I", f"the number of dimensions of {what}")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        cursor.fail(f"{what} has {dimensions} dimensions, allowed are 1 to {MAX_DIMENSIONS}")
    shape = tuple(cursor.unpack("Q", f"the shape of {what}") for _ in range(dimensions))[::-1]
    number = cursor.unpack("I", f"the type of {what}")
    try:
        kind = GGMLQuantizationType(number)
    except ValueError as error:
        raise UnsupportedModelError(
            f"{cursor.path}: {what} is in a type that gguf-py cannot read ({number}); take a file in another type"
        ) from error
    block, block_bytes = GGML_QUANT_SIZES[kind]
    count = math.prod(shape)
    if count < 1 or shape[-1] % block:
        cursor.fail(f"{what} has shape {list(shape)}; in type {kind.name}, rows must be multiples of {block}")
    return _Entry(name, kind, shape, count // block * block_bytes, cursor.unpack("Q", f"the offset of {what}"))


def _place(cursor: Cursor, entries: list[_Entry], alignment: int) -> dict[str, GgufTensor]:
    """Check that every tensor lies in the data section, and no two in the same place."""
    start = -(-cursor.offset // alignment) * alignment
    free = 0
    for entry in sorted(entries, key=lambda entry: entry.offset):
        if entry.offset < free or entry.offset % alignment:
            cursor.fail(f"tensor {entry.name!r} has offset {entry.offset}: inside another one, or not aligned")
        free = entry.offset + entry.bytes
        if start + free > cursor.size:
            cursor.fail(f"tensor {entry.name!r} ends at byte {start + free}, the file at {cursor.size}; it is cut")
    tensors: dict[str, GgufTensor] = {}
    for entry in entries:
        if entry.name in tensors:
            cursor.fail(f"there are two tensors {entry.name!r}")
        data = np.frombuffer(cursor.buffer, np.uint8, entry.bytes, start + entry.offset)
        tensors[entry.name] = GgufTensor(entry.name, entry.type, entry.shape, data)
    return tensors
