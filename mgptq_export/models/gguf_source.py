"""A Hugging Face model out of a GGUF file: configuration and weights.

What a family's files look like is the family's affair: see :class:`mgptq_export.families.Family`. The weights are
dequantized with gguf-py; what llama.cpp's converter changed in them is undone.
"""

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES

from mgptq_export.families import FAMILIES, Family, family_of
from mgptq_export.memory import Memory
from mgptq_export.models.gguf_file import GgufModel
from mgptq_export.models.hyperparameters import check_hyperparameters
from mgptq_runtime.errors import BadInputError, UnsupportedModelError
from mgptq_runtime.progress import track

__all__ = ["read_gguf_config", "read_gguf_weights"]

logger = logging.getLogger(__name__)

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


def read_gguf_config(file: GgufModel) -> dict[str, Any]:
    """The Hugging Face configuration that the file's metadata describes.

    Raises:
        UnsupportedModelError: an unknown architecture, experts, or rotary frequencies that are not supported.
        BadInputError: a hyper-parameter is missing or makes no sense, or the file is a part of a model.
    """
    meta = file.metadata
    architecture = meta.get("general.architecture")
    _warn_if_quantized(file)
    tensors = _Present(file.tensors.items())
    prefix = f"{architecture}."
    parameters = _Present(
        ((key.removeprefix(prefix), value) for key, value in meta.items() if key.startswith(prefix)), prefix
    )
    _check_dense(str(architecture), parameters, tensors)
    if architecture not in FAMILIES:
        raise UnsupportedModelError(
            f"GGUF architecture {architecture!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    if meta.get("split.count", 1) not in (0, 1):
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
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise BadInputError(f"the GGUF file's hyper-parameters cannot be used: {error}") from error
    check_hyperparameters(config, family_of(config), str(file.path))
    # An id that the file does not give is None: transformers' defaults belong to other vocabularies.
    return config | {key: meta.get(f"tokenizer.ggml.{name}_token_id") for key, name in _TOKEN_IDS.items()}


def _warn_if_quantized(file: GgufModel) -> None:
    """Files that other programs quantized are taken, being often all that there is of a model."""
    counts: Counter[str] = Counter()
    for tensor in file.tensors.values():
        block, _ = GGML_QUANT_SIZES[tensor.type]
        counts[tensor.type.name] += math.prod(tensor.shape) * (block > 1)
    (name, count), *_ = counts.most_common(1) or [("", 0)]
    if count:
        logger.warning(
            "%s is quantized to %s: what that lost stays lost; a file in F32, F16 or BF16 gives better results",
            file.path,
            name,
        )


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


def read_gguf_weights(file: GgufModel, config: Mapping[str, Any], memory: Memory) -> dict[str, torch.Tensor]:
    """All weights as a float32 state dictionary under Hugging Face's names, kept in ``memory``.

    Raises:
        UnsupportedModelError: an unknown tensor, or one in a type that gguf-py cannot dequantize.
        BadInputError: rows that are no whole heads.
    """
    family = family_of(config)
    paths = family.gguf_paths()
    state = {}
    # What is not finite is refused by name, once the model is there.
    with np.errstate(all="ignore"), track("Reading weights", len(file.tensors)) as advance:
        for tensor in file.tensors.values():
            if tensor.name not in family.gguf_rotary:
                name = _hugging_face_name(tensor.name, paths, family)
                weight = _as_hugging_face(tensor.name, tensor.values(), family, config)
                state[name] = memory.keep(torch.from_numpy(weight))
            advance()
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
