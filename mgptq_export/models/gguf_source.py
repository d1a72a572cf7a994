"""A Hugging Face model out of a GGUF file: configuration, weights, tokenizer files.

The weights are dequantized with gguf-py; llama.cpp's rotary row order of q and k is undone.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, pre_tokenizers

from mgptq_runtime.errors import BadInputError, UnsupportedModelError

__all__ = ["read_gguf_config", "read_gguf_weights", "write_gguf_tokenizer"]

_TENSOR_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_TENSOR_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def open_gguf(path: Path) -> gguf.GGUFReader:
    """Open a GGUF file.

    Raises:
        BadInputError: not a GGUF file, or cut short.
    """
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, OSError, KeyError, TypeError) as error:
        raise BadInputError(f"{path} is not a readable GGUF file ({error}); download it again") from error


def _metadata(reader: gguf.GGUFReader) -> dict[str, Any]:
    return {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}


def read_gguf_config(reader: gguf.GGUFReader) -> dict[str, Any]:
    """The Hugging Face configuration that the file's metadata describes.

    Raises:
        UnsupportedModelError: another architecture than llama, experts, or scaled rotary frequencies.
        BadInputError: a hyper-parameter is missing.
    """
    meta = _metadata(reader)
    architecture = meta.get("general.architecture")
    if architecture != "llama":
        raise UnsupportedModelError(f"GGUF architecture {architecture!r} is not supported; supported: llama")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "rope_freqs.weight" in tensors or meta.get("llama.rope.scaling.type", "none") != "none":
        raise UnsupportedModelError(
            "GGUF files with scaled rotary frequencies are not supported; use the model's Hugging Face folder instead"
        )
    if any("_exps." in name for name in tensors):
        raise UnsupportedModelError("mixture-of-experts models are not supported")
    try:
        heads = meta["llama.attention.head_count"]
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": meta["llama.embedding_length"],
            "intermediate_size": meta["llama.feed_forward_length"],
            "num_hidden_layers": meta["llama.block_count"],
            "num_attention_heads": heads,
            "num_key_value_heads": meta.get("llama.attention.head_count_kv", heads),
            "head_dim": meta.get("llama.attention.key_length", meta["llama.embedding_length"] // heads),
            "max_position_embeddings": meta["llama.context_length"],
            "rms_norm_eps": round(float(meta["llama.attention.layer_norm_rms_epsilon"]), 12),
            "rope_theta": float(meta.get("llama.rope.freq_base", 10000.0)),
            "vocab_size": int(tensors["token_embd.weight"].shape[1]),
            "tie_word_embeddings": "output.weight" not in tensors,
        }
    except KeyError as error:
        raise BadInputError(f"the GGUF file lacks {error}; convert it again with llama.cpp") from error
    for key in ("bos", "eos", "padding"):
        token = meta.get(f"tokenizer.ggml.{key}_token_id")
        if token is not None:
            config[f"{key.replace('padding', 'pad')}_token_id"] = token
    return config


def _hugging_face_name(name: str) -> str:
    if name in _TENSOR_NAMES:
        return _TENSOR_NAMES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if not match or match[2] not in _BLOCK_TENSOR_NAMES:
        raise UnsupportedModelError(f"the GGUF file holds {name!r}, which is no part of a supported llama model")
    return f"model.layers.{match[1]}.{_BLOCK_TENSOR_NAMES[match[2]]}.{match[3]}"


def _undo_rotary_interleaving(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp stores the rows of a head as rotary pairs; Hugging Face as two halves."""
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def read_gguf_weights(reader: gguf.GGUFReader, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """All weights as a float32 state dictionary under Hugging Face's names.

    Raises:
        UnsupportedModelError: an unknown tensor, or one in a type that gguf-py cannot dequantize.
    """
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    state = {}
    for tensor in reader.tensors:
        try:
            weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise UnsupportedModelError(f"{tensor.name}: type {tensor.tensor_type.name} cannot be read") from error
        kind = tensor.name.split(".")[2] if tensor.name.startswith("blk.") else ""
        if kind in heads:
            weight = _undo_rotary_interleaving(weight, heads[kind])
        state[_hugging_face_name(tensor.name)] = torch.from_numpy(np.array(weight, np.float32))
    return state


def write_gguf_tokenizer(path: Path, reader: gguf.GGUFReader, folder: Path) -> None:
    """Write the tokenizer that the file carries as Hugging Face's files into ``folder``.

    Raises:
        UnsupportedModelError: a kind of tokenizer that transformers cannot convert.
    """
    from transformers import AutoTokenizer

    meta = _metadata(reader)
    if "tokenizer.ggml.tokens" not in meta:
        raise BadInputError(f"{path} carries no tokenizer; use the model's Hugging Face folder instead")
    try:
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
    except (NotImplementedError, ValueError, KeyError) as error:
        kind = meta.get("tokenizer.ggml.model")
        raise UnsupportedModelError(f"the tokenizer of {path} ({kind!r}) cannot be converted: {error}") from error
    if meta.get("tokenizer.ggml.pre") == "smollm":
        # The conversion knows one way to split words for all byte-pair models; this family splits digits too.
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        tokenizer.save(str(folder / "tokenizer.json"))
    eos = meta.get("tokenizer.ggml.eos_token_id")
    generation = {"eos_token_id": eos} if eos is not None else {}
    if "tokenizer.ggml.bos_token_id" in meta:
        generation["bos_token_id"] = meta["tokenizer.ggml.bos_token_id"]
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
