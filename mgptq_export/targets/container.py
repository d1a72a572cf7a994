"""The container target: one GGUF file as runtime/FORMAT.md specifies it."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

from mgptq_export.checkpoint import Checkpoint
from mgptq_export.output import reason
from mgptq_export.targets.gguf_tokenizer import add_chat_template, add_tokenizer
from mgptq_runtime.container import (
    ARCHITECTURE,
    FORMAT_VERSION,
    SHA256_KEY,
    TOKENIZER_KEY,
    UNSIGNED,
    content_sha256,
    read_container,
    segment_name,
    signature_offset,
)
from mgptq_runtime.errors import BadInputError, UnsupportedModelError
from mgptq_runtime.gguf_file import read_gguf
from mgptq_runtime.golden import GoldenVectors
from mgptq_runtime.quantized_model import QuantizedLinear, QuantizedModel, permutation_dtype
from mgptq_runtime.strict_json import compact_json
from mgptq_runtime.tokenizer_json import shorten_tokenizer

__all__ = ["add_metadata", "add_tensors", "check_container_tokenizer", "write_container"]


def write_container(checkpoint: Checkpoint, golden: GoldenVectors, path: Path) -> None:
    """Write a checkpoint as a container; equal inputs give equal bytes.

    The file is written beside ``path``, read back with the runtime's reader, and only then takes its name; on
    any failure nothing is left and an older file stays.

    Args:
        golden: what the model must compute.
        path: of the file; its folder exists.

    Raises:
        BadInputError: the tokenizer does not fit the model, or the file cannot be written.
        ContainerError: the model breaks a rule of the format, NaN in a scale for example.
    """
    writer = GGUFWriter(None, ARCHITECTURE)
    add_metadata(writer, checkpoint)
    add_tensors(writer, checkpoint.model, golden)
    temporary = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        _write(writer, temporary)
        _sign(temporary)
        read_container(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise BadInputError(f"{path} cannot be written: {reason(error)}") from error
    finally:
        writer.close()
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _write(writer: GGUFWriter, path: Path) -> None:
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.flush()


def _sign(path: Path) -> None:
    """Put the content hash where zeros hold its place, and make the file durable."""
    file = read_gguf(path, ARCHITECTURE)
    offset = signature_offset(file)
    digest = content_sha256(file.buffer, offset)
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(digest.encode())
        stream.flush()
        os.fsync(stream.fileno())


def add_metadata(writer: GGUFWriter, checkpoint: Checkpoint) -> None:
    """Add the key-values, the tokenizer included."""
    model = checkpoint.model
    writer.add_name(checkpoint.name)
    writer.add_uint32("mgptq.format_version", FORMAT_VERSION)
    writer.add_string("mgptq.family", model.family)
    writer.add_float64("mgptq.bits_stored", model.bits_stored)
    writer.add_bool("mgptq.tied_head", model.head is None)
    writer.add_string("mgptq.recipe", compact_json(checkpoint.config["quantization_config"]["recipe"]))
    for key, value in model.hyperparameters.items():
        _hyperparameter_writer(writer, value)(f"{model.family}.{key}", value)
    if (checkpoint.folder / "tokenizer.json").is_file():
        _add_tokenizer(writer, checkpoint)
    writer.add_string(SHA256_KEY, UNSIGNED)


def _hyperparameter_writer(writer: GGUFWriter, value: int | float | bool | str) -> Callable[[str, Any], None]:
    for kind, add in ((bool, writer.add_bool), (int, writer.add_uint32), (float, writer.add_float64)):
        if isinstance(value, kind):
            return add
    return writer.add_string


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def check_container_tokenizer(folder: Path, vocabulary_size: int, config: Mapping[str, Any]) -> None:
    """Raise BadInputError for tokenizer files that are broken or do not fit the model; it may have none."""
    if (folder / "tokenizer.json").is_file():
        _add_gguf_tokenizer(GGUFWriter(None, ARCHITECTURE), folder, vocabulary_size, config)


def _add_gguf_tokenizer(
    writer: GGUFWriter, folder: Path, vocabulary_size: int, config: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """Add what GGUF has names for; tokens and merges that it lists, none for a kind that it does not know."""
    try:
        return add_tokenizer(writer, folder, vocabulary_size, config, unknown_pre="default")
    except UnsupportedModelError:
        add_chat_template(writer, folder)
        return [], []


def _add_tokenizer(writer: GGUFWriter, checkpoint: Checkpoint) -> None:
    folder = checkpoint.folder
    tokenizer = _read_json(folder / "tokenizer.json")
    config = _read_json(folder / "tokenizer_config.json")
    config.pop("chat_template", None)
    generation = _read_json(folder / "generation_config.json")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if generation.get(key) is None and checkpoint.config.get(key) is not None:
            generation[key] = checkpoint.config[key]

    tokens, merges = _add_gguf_tokenizer(writer, folder, checkpoint.model.embedding.rows, checkpoint.config)
    short = shorten_tokenizer(tokenizer, tokens, merges)
    if short is None:
        writer.add_string("tokenizer.huggingface.json", compact_json(tokenizer))
    else:
        writer.add_string(TOKENIZER_KEY, short)
    writer.add_string("mgptq.tokenizer_config", compact_json(config))
    writer.add_string("mgptq.generation_config", compact_json(generation))


def _add_linear(writer: GGUFWriter, linear: QuantizedLinear) -> None:
    for i, segment in enumerate(linear.segments):
        data = np.ascontiguousarray(segment.data).view(np.int8)
        writer.add_tensor(segment_name(linear.name, i, segment.format), data)


def add_tensors(writer: GGUFWriter, model: QuantizedModel, golden: GoldenVectors) -> None:
    """Add all weights, and the golden vectors."""
    _add_linear(writer, model.embedding)
    for group in model.groups:
        if group.permutation is not None:
            dtype = permutation_dtype(group.permutation.size)
            writer.add_tensor(f"{group.name}.permutation", group.permutation.astype(dtype))
        for linear in group.linears:
            _add_linear(writer, linear)
    if model.head is not None:
        _add_linear(writer, model.head)
    for name in sorted(model.tensors):
        writer.add_tensor(name, np.ascontiguousarray(model.tensors[name], np.float32))
    for f in fields(GoldenVectors):
        writer.add_tensor(f"golden.{f.name}", np.ascontiguousarray(getattr(golden, f.name)))
