"""The container: a whole quantized model in one GGUF file. FORMAT.md is its specification.

:mod:`mgptq_runtime.gguf_file` validates the file's syntax; here it gets its meaning, and every rule that the
model must meet is checked before a weight is used.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from mgptq_runtime.errors import ContainerError, UnsupportedModelError
from mgptq_runtime.families import FAMILIES, make_family
from mgptq_runtime.families.layout import GroupShape, Layout, LinearShape
from mgptq_runtime.files import Buffer
from mgptq_runtime.formats import FORMATS, padded_columns
from mgptq_runtime.gguf_file import WAY_OUT, GGUFFile, map_gguf, parse_gguf
from mgptq_runtime.golden import GoldenVectors, validate_golden
from mgptq_runtime.quantized_model import InputGroup, QuantizedLinear, QuantizedModel, Segment, permutation_dtype
from mgptq_runtime.strict_json import MAX_JSON_BYTES, parse_json_object
from mgptq_runtime.tokenizer import TokenizerData
from mgptq_runtime.tokenizer_json import restore_tokenizer

__all__ = [
    "ARCHITECTURE",
    "FORMAT_VERSION",
    "SHA256_KEY",
    "TOKENIZER_KEY",
    "UNSIGNED",
    "Container",
    "content_sha256",
    "decode_container",
    "parse_container",
    "read_container",
    "segment_name",
    "signature_offset",
]

ARCHITECTURE = "mgptq"
FORMAT_VERSION = 1
SHA256_KEY = "mgptq.sha256"
TOKENIZER_KEY = "mgptq.tokenizer_json"
UNSIGNED = "0" * 64
OTHER_VERSION = "use the version of mgptq-runtime that goes with it, or export it again"
KNOWN_KEYS = frozenset(
    f"mgptq.{key}"
    for key in (
        "format_version",
        "family",
        "bits_stored",
        "tied_head",
        "recipe",
        "tokenizer_json",
        "tokenizer_config",
        "generation_config",
        "sha256",
    )
)
HYPERPARAMETER_TYPES = ("uint32", "float64", "bool", "string")
GOLDEN_TYPES = {"token_ids": "I32", "top_ids": "I32"}


@dataclass(frozen=True)
class Container:
    """A container that met every rule.

    Attributes:
        path: where it lies.
        name: the model's name.
        model: the quantized weights; the packed data are read-only views of the mapped file.
        recipe: what the quantization was asked for.
        tokenizer: None in a container without text.
        golden: what the model must compute.
        sha256: the content hash that the container carries.
    """

    path: Path
    name: str
    model: QuantizedModel
    recipe: Mapping[str, Any]
    tokenizer: TokenizerData | None
    golden: GoldenVectors
    sha256: str


def segment_name(linear: str, index: int, fmt: str) -> str:
    """The tensor name of a linear's segment."""
    return f"{linear}.segment.{index}.{fmt}"


def content_sha256(buffer: Buffer, offset: int) -> str:
    """SHA-256 of a container in which the 64 characters at ``offset`` count as zeros ("0"), in hexadecimal."""
    view = memoryview(buffer)
    digest = hashlib.sha256(view[:offset])
    digest.update(UNSIGNED.encode())
    digest.update(view[offset + len(UNSIGNED) :])
    return digest.hexdigest()


def signature_offset(file: GGUFFile) -> int:
    """Where the characters of ``mgptq.sha256`` lie, in bytes from the start of the file.

    Raises:
        ContainerError: the key is missing or not a string of 64 characters.
    """
    value = file.metadata.get(SHA256_KEY)
    if value is None or value.type != "string" or len(value.value) != len(UNSIGNED):
        raise ContainerError(
            f"{file.path}: key {SHA256_KEY!r} must be there, a string of {len(UNSIGNED)} characters; {WAY_OUT}"
        )
    return value.offset + 8


class _Reader:
    """Takes what it knows out of a GGUF file; what is left over at the end is an error."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.unused = dict.fromkeys(file.tensors)

    def fail(self, message: str, way_out: str = WAY_OUT) -> NoReturn:
        raise ContainerError(f"{self.file.path}: {message}; {way_out}")

    def value(self, key: str, value_type: str) -> Any:
        found = self.file.metadata.get(key)
        if found is None:
            self.fail(f"key {key!r} is missing")
        if found.type != value_type:
            self.fail(f"at byte {found.offset}: key {key!r} has type {found.type}, it must be {value_type}")
        return found.value

    def optional(self, key: str, value_type: str) -> Any:
        return self.value(key, value_type) if key in self.file.metadata else None

    def json(self, key: str) -> dict[str, Any]:
        text = self.value(key, "string")
        try:
            return parse_json_object(text, MAX_JSON_BYTES)
        except ValueError as error:
            self.fail(f"at byte {self.file.metadata[key].offset}: key {key!r} is not a JSON object: {error}")

    def tensor(self, name: str, tensor_type: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        info = self.file.tensors.get(name)
        if info is None:
            self.fail(f"tensor {name!r} is missing")
        if info.type != tensor_type or (shape is not None and info.shape != shape):
            self.fail(
                f"tensor {name!r} is {info.type} {list(info.shape)}, "
                f"it must be {tensor_type}{'' if shape is None else f' {list(shape)}'}"
            )
        self.unused.pop(name, None)
        values = self.file.array(name)
        if tensor_type == "F32" and not np.isfinite(values).all():
            self.fail(f"tensor {name!r} at byte {info.offset} holds NaN or infinity")
        return values


def _check_version(reader: _Reader) -> None:
    version = reader.value("mgptq.format_version", "uint32")
    if version != FORMAT_VERSION:
        reader.fail(f"mgptq.format_version is {version}, this program reads {FORMAT_VERSION}", OTHER_VERSION)
    for key in reader.file.metadata:
        if key.startswith("mgptq.") and key not in KNOWN_KEYS:
            reader.fail(f"key {key!r} is not known in format version {FORMAT_VERSION}", OTHER_VERSION)


def _read_hyperparameters(reader: _Reader, family: str) -> dict[str, Any]:
    prefix = f"{family}."
    hyperparameters = {}
    for key, found in reader.file.metadata.items():
        if key.startswith(prefix):
            if found.type not in HYPERPARAMETER_TYPES:
                reader.fail(f"key {key!r} has type {found.type}, allowed are {', '.join(HYPERPARAMETER_TYPES)}")
            hyperparameters[key.removeprefix(prefix)] = found.value
    return hyperparameters


def _read_segment(reader: _Reader, linear: LinearShape, index: int, columns_left: int) -> Segment:
    names = {fmt: segment_name(linear.name, index, fmt) for fmt in FORMATS}
    present = [fmt for fmt, name in names.items() if name in reader.file.tensors]
    if len(present) != 1:
        found = ", ".join(names[fmt] for fmt in present) or "none"
        reader.fail(
            f"{linear.name}: {columns_left} columns left for segment {index}; "
            f"exactly one of {', '.join(names.values())} must be there, found {found}"
        )
    fmt = FORMATS[present[0]]
    name = names[fmt.name]
    info = reader.file.tensors[name]
    if len(info.shape) != 2 or info.shape[0] != linear.rows or info.shape[1] % fmt.block_bytes:
        reader.fail(
            f"tensor {name!r} has shape {list(info.shape)}, "
            f"it must be [{linear.rows}, a multiple of {fmt.block_bytes} bytes]"
        )
    segment = Segment(fmt.name, reader.tensor(name, "I8").view(np.uint8))
    if segment.columns > columns_left:
        reader.fail(f"tensor {name!r} covers {segment.columns} columns, {columns_left} are left of {linear.name}")
    if not np.isfinite(fmt.scales(segment.data)).all():
        reader.fail(f"tensor {name!r} at byte {info.offset} has a scale that is NaN or infinity")
    try:
        fmt.validate_codes(segment.data)
    except ContainerError as error:
        reader.fail(f"tensor {name!r} at byte {info.offset}: {error}")
    return segment


def _read_linear(reader: _Reader, linear: LinearShape, permutation: np.ndarray | None) -> QuantizedLinear:
    segments: list[Segment] = []
    columns_left = padded_columns(linear.columns)
    while columns_left:
        segments.append(_read_segment(reader, linear, len(segments), columns_left))
        columns_left -= segments[-1].columns
    return QuantizedLinear(linear.name, linear.rows, linear.columns, tuple(segments), permutation)


def _read_permutation(reader: _Reader, group: GroupShape) -> np.ndarray | None:
    name = f"{group.name}.permutation"
    if name not in reader.file.tensors:
        return None
    tensor_type = "I16" if permutation_dtype(group.columns) == np.int16 else "I32"
    stored = reader.tensor(name, tensor_type, (group.columns,))
    if not np.array_equal(np.sort(stored), np.arange(group.columns)):
        offset = reader.file.tensors[name].offset
        reader.fail(f"tensor {name!r} at byte {offset} is not a permutation of 0 to {group.columns - 1}")
    return stored.astype(np.int32)


def _read_group(reader: _Reader, group: GroupShape) -> InputGroup:
    permutation = _read_permutation(reader, group)
    return InputGroup(
        group.name, permutation, tuple(_read_linear(reader, linear, permutation) for linear in group.linears)
    )


def _read_float_tensors(reader: _Reader, layout: Layout) -> dict[str, np.ndarray]:
    tensors = {name: reader.tensor(name, "F32", shape) for name, shape in layout.tensors.items()}
    for name, shape in layout.optional_tensors.items():
        if name in reader.file.tensors:
            tensors[name] = reader.tensor(name, "F32", shape)
    return tensors


def _read_model(reader: _Reader) -> QuantizedModel:
    family_name = reader.value("mgptq.family", "string")
    hyperparameters = _read_hyperparameters(reader, family_name)
    try:
        family = make_family(family_name, hyperparameters)
    except UnsupportedModelError as error:
        if family_name in FAMILIES:
            reader.fail(str(error))
        raise
    layout = family.layout
    needed = len(layout.tensors) + sum(len(group.linears) for group in layout.groups)
    if needed > len(reader.file.tensors):
        reader.fail(f"{len(reader.file.tensors)} tensors, a model of {family.layer_count} layers has at least {needed}")
    head = LinearShape("output", layout.embedding.rows, layout.embedding.columns)
    tied = reader.value("mgptq.tied_head", "bool")
    return QuantizedModel(
        family=family_name,
        hyperparameters=hyperparameters,
        groups=tuple(_read_group(reader, group) for group in layout.groups),
        embedding=_read_linear(reader, layout.embedding, None),
        head=None if tied else _read_linear(reader, head, None),
        tensors=_read_float_tensors(reader, layout),
    )


def _read_golden(reader: _Reader, model: QuantizedModel) -> GoldenVectors:
    names = [f.name for f in fields(GoldenVectors)]
    golden = GoldenVectors(**{name: reader.tensor(f"golden.{name}", GOLDEN_TYPES.get(name, "F32")) for name in names})
    family = make_family(model.family, model.hyperparameters)
    try:
        validate_golden(golden, family.vocabulary_size, family.layer_count)
    except ValueError as error:
        reader.fail(f"golden vectors: {error}")
    return golden


def _restored_tokenizer(reader: _Reader) -> str:
    tokens, merges = (reader.optional(f"tokenizer.ggml.{key}", "array of string") or [] for key in ("tokens", "merges"))
    try:
        return restore_tokenizer(reader.value(TOKENIZER_KEY, "string"), tokens, merges)
    except ValueError as error:
        offset = reader.file.metadata[TOKENIZER_KEY].offset
        reader.fail(f"at byte {offset}: key {TOKENIZER_KEY!r} is not the rest of a tokenizer.json: {error}")


def _read_tokenizer(reader: _Reader, vocabulary_size: int) -> TokenizerData | None:
    for key, element in (("tokens", "string"), ("token_type", "int32")):
        values = reader.optional(f"tokenizer.ggml.{key}", f"array of {element}")
        if values is not None and len(values) != vocabulary_size:
            reader.fail(f"tokenizer.ggml.{key} has {len(values)} entries, the embedding has {vocabulary_size} rows")
    tokenizer_json = reader.optional("tokenizer.huggingface.json", "string")
    if TOKENIZER_KEY in reader.file.metadata:
        if tokenizer_json is not None:
            reader.fail(f"keys {TOKENIZER_KEY!r} and 'tokenizer.huggingface.json' exclude each other")
        tokenizer_json = _restored_tokenizer(reader)
    if tokenizer_json is None:
        return None
    return TokenizerData(
        tokenizer_json=tokenizer_json,
        tokenizer_config=reader.json("mgptq.tokenizer_config"),
        generation_config=reader.json("mgptq.generation_config"),
        chat_template=reader.optional("tokenizer.chat_template", "string"),
    )


def decode_container(file: GGUFFile) -> Container:
    """Give a syntactically sound file its meaning; the content hash is not compared.

    Raises:
        ContainerError: a rule of FORMAT.md is broken; the text names the key or tensor.
        UnsupportedModelError: a family that this version does not know.
    """
    reader = _Reader(file)
    _check_version(reader)
    model = _read_model(reader)
    golden = _read_golden(reader, model)
    if reader.unused:
        reader.fail(f"tensor {next(iter(reader.unused))!r} is not part of a {model.family} model")
    bits_stored = reader.value("mgptq.bits_stored", "float64")
    if not math.isclose(bits_stored, model.bits_stored, rel_tol=1e-9):
        reader.fail(f"mgptq.bits_stored is {bits_stored}, the tensors hold {model.bits_stored} bits per linear weight")
    return Container(
        path=file.path,
        name=reader.value("general.name", "string"),
        model=model,
        recipe=reader.json("mgptq.recipe"),
        tokenizer=_read_tokenizer(reader, model.embedding.rows),
        golden=golden,
        sha256=reader.value(SHA256_KEY, "string"),
    )


def read_container(path: Path) -> Container:
    """Read and validate a container file: see :func:`parse_container`.

    Raises:
        ContainerError: the file cannot be read.
    """
    return parse_container(path, map_gguf(path))


def parse_container(path: Path, buffer: Buffer) -> Container:
    """Validate a container, its content hash included.

    Args:
        path: what error messages call the file.
        buffer: the whole file; the model's weights are views of it.

    Raises:
        ContainerError: the file breaks a rule of FORMAT.md; the text names the byte offset, the key or the tensor,
            what was found and what is allowed.
        UnsupportedModelError: a family that this version does not know.
    """
    file = parse_gguf(path, buffer, ARCHITECTURE)
    _check_version(_Reader(file))
    offset = signature_offset(file)
    actual = content_sha256(file.buffer, offset)
    stored = file.metadata[SHA256_KEY].value
    if actual != stored:
        raise ContainerError(
            f"{path}: the content has SHA-256 {actual}, {SHA256_KEY} says {stored}; the file was damaged or changed: "
            "copy or export it again"
        )
    return decode_container(file)
