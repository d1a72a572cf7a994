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
from mgptq_runtime.container import (
    ARCHITECTURE,
    FORMAT_VERSION,
    SHA256_KEY,
    UNSIGNED,
    content_sha256,
    read_container,
    segment_name,
    signature_offset,
)
from mgptq_runtime.errors import BadInputError
from mgptq_runtime.gguf_file import read_gguf
from mgptq_runtime.golden import GoldenVectors
from mgptq_runtime.quantized_model import QuantizedLinear, QuantizedModel, permutation_dtype

__all__ = ["write_container"]

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


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
    _add_metadata(writer, checkpoint)
    _add_tensors(writer, checkpoint.model, golden)
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
        raise BadInputError(f"{path} cannot be written: {error}") from error
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


def _compact_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _add_metadata(writer: GGUFWriter, checkpoint: Checkpoint) -> None:
    model = checkpoint.model
    writer.add_name(checkpoint.name)
    writer.add_uint32("mgptq.format_version", FORMAT_VERSION)
    writer.add_string("mgptq.family", model.family)
    writer.add_float64("mgptq.bits_stored", model.bits_stored)
    writer.add_bool("mgptq.tied_head", model.head is None)
    writer.add_string("mgptq.recipe", _compact_json(checkpoint.config["quantization_config"]["recipe"]))
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


def _add_tokenizer(writer: GGUFWriter, checkpoint: Checkpoint) -> None:
    folder = checkpoint.folder
    tokenizer = _read_json(folder / "tokenizer.json")
    config = _read_json(folder / "tokenizer_config.json")
    embedded_template = config.pop("chat_template", None)
    generation = _read_json(folder / "generation_config.json")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if generation.get(key) is None and checkpoint.config.get(key) is not None:
            generation[key] = checkpoint.config[key]

    if _is_byte_level_bpe(tokenizer):
        _add_ggml_vocabulary(writer, tokenizer, checkpoint.model.embedding.rows)
        _add_special_token_ids(writer, tokenizer, config, generation)
    writer.add_string("tokenizer.huggingface.json", _compact_json(tokenizer))
    template_file = folder / "chat_template.jinja"
    template = template_file.read_text(encoding="utf-8") if template_file.is_file() else embedded_template
    if isinstance(template, str):
        writer.add_chat_template(template)
    writer.add_string("mgptq.tokenizer_config", _compact_json(config))
    writer.add_string("mgptq.generation_config", _compact_json(generation))


def _is_byte_level_bpe(tokenizer: Mapping[str, Any]) -> bool:
    decoder = tokenizer.get("decoder") or {}
    return tokenizer["model"].get("type") == "BPE" and decoder.get("type") == "ByteLevel"


def _add_ggml_vocabulary(writer: GGUFWriter, tokenizer: Mapping[str, Any], vocabulary_size: int) -> None:
    """Tokens, their types and merges as llama.cpp's converter writes them for byte-level BPE."""
    tokens = [f"[PAD{i}]" for i in range(vocabulary_size)]
    types = [UNUSED] * vocabulary_size
    entries = [(text, token, NORMAL) for text, token in tokenizer["model"]["vocab"].items()]
    entries += [
        (added["content"], added["id"], CONTROL if added["special"] else USER_DEFINED)
        for added in tokenizer.get("added_tokens", [])
    ]
    for text, token, token_type in entries:
        if token >= vocabulary_size:
            raise BadInputError(
                f"tokenizer.json: token {text!r} has id {token}, the embedding has {vocabulary_size} rows; "
                "take the tokenizer of this model"
            )
        tokens[token], types[token] = text, token_type
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in tokenizer["model"]["merges"]])


def _add_special_token_ids(
    writer: GGUFWriter, tokenizer: Mapping[str, Any], config: Mapping[str, Any], generation: Mapping[str, Any]
) -> None:
    ids = tokenizer["model"]["vocab"] | {added["content"]: added["id"] for added in tokenizer.get("added_tokens", [])}
    for name, gguf_name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = config.get(f"{name}_token")
        content = token.get("content") if isinstance(token, dict) else token
        token_id = ids.get(content, generation.get(f"{name}_token_id"))
        if isinstance(token_id, int):
            writer.add_uint32(f"tokenizer.ggml.{gguf_name}_token_id", token_id)
    for key in ("add_bos_token", "add_eos_token"):
        if isinstance(config.get(key), bool):
            writer.add_bool(f"tokenizer.ggml.{key}", config[key])


def _add_linear(writer: GGUFWriter, linear: QuantizedLinear) -> None:
    for i, segment in enumerate(linear.segments):
        data = np.ascontiguousarray(segment.data).view(np.int8)
        writer.add_tensor(segment_name(linear.name, i, segment.format), data)


def _add_tensors(writer: GGUFWriter, model: QuantizedModel, golden: GoldenVectors) -> None:
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
