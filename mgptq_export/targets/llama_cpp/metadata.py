"""The key-values of a stock GGUF file, as llama.cpp's own converter writes them."""

import json
import re
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, LlamaFileType

from mgptq_export.checkpoint import Checkpoint
from mgptq_export.families import FAMILIES
from mgptq_runtime.quantized_model import QuantizedModel

__all__ = ["add_metadata"]

# A name with this makes llama.cpp look these tokens up, abort where one is missing, and let all special tokens swallow
# the white space behind them.
PHI3_NAME = re.compile(r"(phi)-?(3)", re.IGNORECASE)
PHI3_TOKENS = {"</s>", "<unk>", "<s>", "<|endoftext|>"}
QUANTIZATION_VERSION = 2  # of ggml's blocks
# Those hyper-parameters that have the same key and the same meaning in llama.cpp.
COMMON_KEYS = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "vocab_size",
)
FILE_TYPES = {
    "q1_0": LlamaFileType.MOSTLY_Q1_0,
    "q2_0": 41,  # not in gguf 0.19
    "q2_k": LlamaFileType.MOSTLY_Q2_K,
    "q3_k": LlamaFileType.MOSTLY_Q3_K_M,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
    "q4_k": LlamaFileType.MOSTLY_Q4_K_M,
    "q6_k": LlamaFileType.MOSTLY_Q6_K,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
}


def add_metadata(writer: GGUFWriter, checkpoint: Checkpoint, config: Any) -> None:
    """Add everything but the tokenizer.

    Args:
        config: the checkpoint's transformers configuration.
    """
    model = checkpoint.model
    writer.add_type("model")
    writer.add_name(model_name(checkpoint))
    writer.add_file_type(file_type(model))
    writer.add_quantization_version(QUANTIZATION_VERSION)
    _add_hyperparameters(writer, model, config)
    # Loaders ignore keys that they do not know: how the file was made travels with it.
    writer.add_string("mgptq.recipe", json.dumps(checkpoint.config["quantization_config"]["recipe"]))
    writer.add_float64("mgptq.bits_stored", model.bits_stored)
    writer.add_string("mgptq.weights_by_type", json.dumps(model.weights_by_format()))


def model_name(checkpoint: Checkpoint) -> str:
    """``general.name``: the checkpoint's, with "Phi-3" in it just where the tokenizer is Phi-3's."""
    name = checkpoint.name
    if _has_phi3_tokenizer(checkpoint.folder / "tokenizer.json"):
        return name if PHI3_NAME.search(name) else f"{name} (Phi-3)"
    return PHI3_NAME.sub(r"\1 \2", name)


def _has_phi3_tokenizer(path: Path) -> bool:
    if not path.is_file():
        return False
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    added = tokenizer.get("added_tokens") or []
    swallows = any(token["special"] and token["rstrip"] for token in added)
    return swallows and {*tokenizer["model"]["vocab"], *(token["content"] for token in added)} >= PHI3_TOKENS


def file_type(model: QuantizedModel) -> int:
    """``general.file_type``: of the type that holds most weights of the linears.

    Loaders only print it, types being each tensor's own; it is what llama.cpp guesses where the key is missing.
    """
    counts = model.weights_by_format()
    return int(FILE_TYPES[max(counts, key=lambda name: counts[name])])


def _add_hyperparameters(writer: GGUFWriter, model: QuantizedModel, config: Any) -> None:
    found = model.hyperparameters
    values = {key: found[key] for key in COMMON_KEYS}
    values["attention.value_length"] = found["attention.key_length"]
    values["rope.dimension_count"] = found.get("rope.dimension_count", found["attention.key_length"])
    values |= FAMILIES[model.family].gguf_metadata(config, found)
    for key, value in values.items():
        name = f"{model.family}.{key}"
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_uint32(name, int(value))
