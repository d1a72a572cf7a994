"""A Hugging Face model out of a GGUF file: configuration and weights.

What a family's files look like is the family's affair: see :class:`mgptq_export.families.Family`. The weights are
dequantized with gguf-py; what llama.cpp's converter changed in them is undone.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from mgptq_export.families import FAMILIES, Family, family_of
from mgptq_export.models.gguf_tokenizer import write_gguf_tokenizer
from mgptq_runtime.errors import BadInputError, UnsupportedModelError

__all__ = ["open_gguf", "read_gguf_config", "read_gguf_weights", "write_gguf_tokenizer"]

_TENSOR_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_TOKEN_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


class _Present(dict[str, Any]):
    """A part of a file, whose absent members are an error of the file."""

    def __init__(self, members: Iterable[tuple[str, Any]], prefix: str = "") -> None:
        super().__init__(members)
        self.prefix = prefix

    def __missing__(self, key: str) -> Any:
        raise BadInputError(f"the GGUF file lacks {self.prefix}{key}; convert it again with llama.cpp")


def open_gguf(path: Path) -> gguf.GGUFReader:
    """Open a GGUF file.

    Raises:
        BadInputError: not a GGUF file, or cut short.
        UnsupportedModelError: tensors in a type that gguf-py does not know.
    """
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, OSError, KeyError, TypeError) as error:
        if "GGMLQuantizationType" in str(error):
            raise UnsupportedModelError(
                f"{path} holds tensors in a type that gguf-py cannot read ({error}); take a file in another type"
            ) from error
        raise BadInputError(f"{path} is not a readable GGUF file ({error}); download it again") from error


def _metadata(reader: gguf.GGUFReader) -> dict[str, Any]:
    try:
        return {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    except ValueError as error:  # text that is no UTF-8
        raise BadInputError(f"the GGUF file's metadata cannot be read ({error}); download it again") from error


def read_gguf_config(reader: gguf.GGUFReader) -> dict[str, Any]:
    """The Hugging Face configuration that the file's metadata describes.

    Raises:
        UnsupportedModelError: an unknown architecture, experts, or rotary frequencies that are not supported.
        BadInputError: a hyper-parameter is missing or of another kind, or the file is a part of a model.
    """
    meta = _metadata(reader)
    architecture = meta.get("general.architecture")
    tensors = _Present((tensor.name, tensor) for tensor in reader.tensors)
    prefix = f"{architecture}."
    parameters = _Present(
        ((key.removeprefix(prefix), value) for key, value in meta.items() if key.startswith(prefix)), prefix
    )
    _check_dense(str(architecture), parameters, tensors)
    if architecture not in FAMILIES:
        raise UnsupportedModelError(
            f"GGUF architecture {architecture!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    if meta.get("split.count", 1) > 1:
        raise BadInputError(f"the GGUF file is one of {meta['split.count']} parts; merge them with llama-gguf-split")
    for key in ("block_count", "attention.head_count", "attention.head_count_kv"):
        found = parameters.get(key, 1)
        if isinstance(found, int) and found < 1:
            raise BadInputError(f"the GGUF file's {prefix}{key} is {found}; download it again")
    if isinstance(parameters.get("block_count"), int) and parameters["block_count"] > len(tensors):
        raise BadInputError(
            f"the GGUF file says {parameters['block_count']} layers and holds {len(tensors)} tensors; download it again"
        )
    try:
        config = FAMILIES[architecture].config_from_gguf(parameters, tensors)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise BadInputError(f"the GGUF file's hyper-parameters cannot be used: {error}") from error
    # An id that the file does not give is None: transformers' defaults belong to other vocabularies.
    return config | {key: meta.get(f"tokenizer.ggml.{name}_token_id") for key, name in _TOKEN_IDS.items()}


def _check_dense(architecture: str, parameters: Mapping[str, Any], tensors: Iterable[str]) -> None:
    """Raise UnsupportedModelError for experts, and for layers of different shapes."""
    experts = parameters.get("expert_count", 0) or any("_exps." in name for name in tensors)
    if experts or "moe" in architecture:
        raise UnsupportedModelError(
            f"mixture-of-experts models are not supported, and this {architecture} model is one; supported: dense ones"
        )
    for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        if isinstance(parameters.get(key), list):
            raise UnsupportedModelError(
                f"{key} {parameters[key]} is not supported; supported: one number for all layers"
            )


def read_gguf_weights(reader: gguf.GGUFReader, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """All weights as a float32 state dictionary under Hugging Face's names.

    Raises:
        UnsupportedModelError: an unknown tensor, or one in a type that gguf-py cannot dequantize.
        BadInputError: rows that are no whole heads.
    """
    family = family_of(config)
    paths = family.gguf_paths()
    state = {}
    for tensor in reader.tensors:
        if tensor.name in family.gguf_rotary:
            continue
        name = _hugging_face_name(tensor.name, paths, family)
        try:
            weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise UnsupportedModelError(f"{tensor.name}: type {tensor.tensor_type.name} cannot be read") from error
        weight = _as_hugging_face(tensor.name, np.array(weight, np.float32), family, config)
        state[name] = torch.from_numpy(weight)
    return state


def _hugging_face_name(name: str, paths: Mapping[str, str], family: Family) -> str:
    if name in _TENSOR_NAMES:
        return _TENSOR_NAMES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if not match or match[2] not in paths:
        raise UnsupportedModelError(
            f"the GGUF file holds {name!r}, which is no part of a supported {family.name} model"
        )
    return f"model.layers.{match[1]}.{paths[match[2]]}.{match[3]}"


def _as_hugging_face(name: str, weight: np.ndarray, family: Family, config: Mapping[str, Any]) -> np.ndarray:
    """Undo what llama.cpp's converter did to the values of a tensor."""
    kind = name.split(".")[-2]
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    if family.rotary_pairs and kind in heads:
        return _undo_rotary_interleaving(name, weight, heads[kind])
    if kind in family.norms or kind == "output_norm":
        return weight - np.float32(family.norm_offset)
    return weight


def _undo_rotary_interleaving(name: str, weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp stores the rows of a head as rotary pairs; Hugging Face as two halves."""
    if len(weight) % (2 * heads):
        raise BadInputError(
            f"{name}: {len(weight)} rows are not {heads} heads of rotary pairs; download the file again"
        )
    pairs = weight.reshape(heads, len(weight) // heads // 2, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)
