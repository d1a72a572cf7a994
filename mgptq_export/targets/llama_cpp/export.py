"""Write the folder of the llama.cpp target."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from gguf import GGUFWriter
from transformers import AutoConfig

from mgptq_export.checkpoint import Checkpoint
from mgptq_export.output import reason
from mgptq_export.targets.gguf_tokenizer import add_tokenizer
from mgptq_export.targets.llama_cpp.config import check_llama_cpp_config
from mgptq_export.targets.llama_cpp.metadata import add_metadata
from mgptq_export.targets.llama_cpp.modelfile import modelfile
from mgptq_export.targets.llama_cpp.tensors import add_tensors
from mgptq_runtime.errors import BadInputError, OutputExistsError
from mgptq_runtime.golden import GoldenVectors, write_golden

__all__ = ["file_name", "fill_writer", "write_llama_cpp"]

GOLDEN = "golden.npz"
MODELFILE = "Modelfile"
CHAT_TEMPLATE_KEY = "tokenizer.chat_template"


def write_llama_cpp(checkpoint: Checkpoint, golden: GoldenVectors, folder: Path) -> None:
    """Write a stock GGUF file, a ``Modelfile`` for Ollama, and ``golden.npz``.

    The file has one of llama.cpp's own architectures and tensor types; nothing of this project is needed to run it.
    The same checkpoint gives the same bytes. The folder appears when it is complete; on any failure nothing is left.

    Args:
        checkpoint: every linear, the embedding and the head are each one segment of a ggml type; its folder holds
            the tokenizer files.
        golden: what the model must compute. Stock programs do not read it: llama.cpp rounds activations to 8 bits,
            so its logits are close to these, not equal.
        folder: where to; must not exist.

    Raises:
        OutputExistsError: ``folder`` exists.
        UnsupportedModelError: a model or a tokenizer that llama.cpp cannot represent.
        BadInputError: a checkpoint that was quantized for other targets, or a folder that cannot be written.
        ValueError: linears that llama.cpp holds as one tensor differ in type.
    """
    if folder.exists():
        raise OutputExistsError(f"{folder} exists; remove it or choose another folder")
    writer = GGUFWriter(None, checkpoint.model.family)
    try:
        fill_writer(writer, checkpoint)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
            package = Path(scratch) / "package"
            package.mkdir()
            name = file_name(checkpoint)
            _write_gguf(writer, package / name)
            (package / MODELFILE).write_text(_modelfile(writer, checkpoint, name), encoding="utf-8")
            write_golden(package / GOLDEN, golden)
            package.rename(folder)
    except OSError as error:
        raise BadInputError(f"{folder} cannot be written: {reason(error)}") from error
    finally:
        writer.close()


def fill_writer(writer: GGUFWriter, checkpoint: Checkpoint) -> None:
    """Add all that the file holds; errors are those of :func:`write_llama_cpp`."""
    settings = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    config = AutoConfig.for_model(**settings)
    check_llama_cpp_config(config)
    add_metadata(writer, checkpoint, config)
    add_tokenizer(writer, checkpoint.folder, checkpoint.model.embedding.rows, checkpoint.config)
    add_tensors(writer, checkpoint.model, config)


def file_name(checkpoint: Checkpoint) -> str:
    """Of the GGUF file."""
    bits = checkpoint.config["quantization_config"]["recipe"]["bits"]
    return f"{checkpoint.name}-MGPTQ-{bits:g}bpw.gguf"


def _write_gguf(writer: GGUFWriter, path: Path) -> None:
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.flush()
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _modelfile(writer: GGUFWriter, checkpoint: Checkpoint, name: str) -> str:
    template = writer.kv_data[0].get(CHAT_TEMPLATE_KEY)
    return modelfile(name, None if template is None else template.value, _special_tokens(checkpoint.folder))


def _special_tokens(folder: Path) -> dict[str, str]:
    """Texts of the special tokens that ``tokenizer_config.json`` names."""
    path = folder / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    tokens = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = config.get(key)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            tokens[key] = text
    return tokens
