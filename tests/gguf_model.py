"""A GGUF file of a small Hugging Face model of any family, as llama.cpp's converter writes it.

The tests' oracle: nothing here comes from the packages' own tables.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3", "phi3": "phi3"}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's row order of q and k: the two halves of a head, one row of each in turn."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def gguf_name(name: str, names: dict[str, str]) -> str:
    """llama.cpp's name of a Hugging Face parameter."""
    name, kind = name.rsplit(".", 1)
    if not name.startswith("model.layers."):
        return f"{names[name]}.{kind}"
    _, _, layer, part = name.split(".", 3)
    return f"blk.{layer}.{names[part]}.{kind}"


def write_gguf(
    path: Path,
    model: Any,
    folder: Path,
    matrix_type: GGMLQuantizationType = GGMLQuantizationType.F32,
    without: str = "",
    rope_scaling: gguf.RopeScalingType | None = None,
    metadata: dict[str, int | float | str] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
) -> None:
    """Write a GGUF file.

    Args:
        path: the file.
        model: a transformers model, as it was loaded.
        folder: holds its ``tokenizer.json``.
        matrix_type: of the matrices; norms and biases are F32.
        without: a tensor, or a hyper-parameter without the architecture's prefix, to leave out.
        rope_scaling: a kind of scaled rotary frequencies to state, whatever the model's.
        metadata: more hyper-parameters, by key without the architecture's prefix.
        tensors: more tensors.
    """
    writer = gguf.GGUFWriter(path, ARCHITECTURES[model.config.model_type])
    values = hyperparameters(model.config) | (metadata or {})
    if rope_scaling is not None:
        values["rope.scaling.type"] = rope_scaling.value
    values.pop(without, None)
    for key, value in values.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{writer.arch}.{key}", value)
    _add_tokenizer(writer, folder, model.config.vocab_size)
    stored = dict(stored_tensors(model)) | (tensors or {})
    stored.pop(without, None)
    for name, weight in stored.items():
        if weight.ndim == 2 and matrix_type != GGMLQuantizationType.F32:
            writer.add_tensor(name, gguf.quantize(weight, matrix_type), raw_dtype=matrix_type)
        else:
            writer.add_tensor(name, np.ascontiguousarray(weight, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def hyperparameters(config: Any) -> dict[str, Any]:
    """What the converter writes of a configuration, without the architecture's prefix."""
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    values = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if config.model_type == "phi3":
        return values | _phi3_hyperparameters(config, rope)
    if getattr(config, "head_dim", None) is not None:
        values |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    if rope["rope_type"] in ("linear", "yarn"):
        values |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if config.model_type == "llama":
        values["vocab_size"] = config.vocab_size
        values["rope.dimension_count"] = config.head_dim or config.hidden_size // config.num_attention_heads
    if config.model_type == "gemma3_text":
        values["attention.sliding_window"] = config.sliding_window
        values["rope.freq_base_swa"] = float(config.rope_parameters["sliding_attention"]["rope_theta"])
        if config.final_logit_softcapping:
            values["final_logit_softcapping"] = float(config.final_logit_softcapping)
    return values


def _phi3_hyperparameters(config: Any, rope: dict[str, Any]) -> dict[str, Any]:
    original = config.original_max_position_embeddings
    rotary_size = int(rope.get("partial_rotary_factor", 1.0) * config.hidden_size) // config.num_attention_heads
    values = {
        "rope.scaling.original_context_length": original,
        "rope.dimension_count": rotary_size,
        "attention.sliding_window": config.sliding_window or 0,
    }
    if rope.get("long_factor"):
        scale = config.max_position_embeddings / original
        usual = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
        values["rope.scaling.attn_factor"] = usual
    return values


def stored_tensors(model: Any) -> Iterator[tuple[str, np.ndarray]]:
    """llama.cpp's tensors by name, float32."""
    config = model.config
    gemma = config.model_type == "gemma3_text"
    names = NAMES | (GEMMA_NAMES if gemma else {})
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stored, weight = gguf_name(name, names), tensor.numpy()
        kind = stored.split(".")[-2]
        if config.model_type == "llama" and kind in heads:
            weight = interleave(weight, heads[kind])
        if gemma and stored.endswith("norm.weight"):
            weight = weight + np.float32(1.0)
        yield stored, weight
    rope = config.rope_parameters
    if rope.get("rope_type") == "llama3":
        yield "rope_freqs.weight", llama3_factors(config)
    for length in ("long", "short"):
        if rope.get(f"{length}_factor"):
            yield f"rope_factors_{length}.weight", np.array(rope[f"{length}_factor"], np.float32)


def llama3_factors(config: Any) -> np.ndarray:
    """What Llama 3.1 divides its rotary frequencies by, float32 [head size / 2]."""
    rope = config.rope_parameters
    size = config.head_dim or config.hidden_size // config.num_attention_heads
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    context = rope["original_max_position_embeddings"]
    factors = []
    for i in range(0, size, 2):
        turns = context / (2 * math.pi * rope["rope_theta"] ** (i / size))
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1.0 / ((1.0 - kept) / factor + kept))
    return np.array(factors, np.float32)


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocabulary_size: int) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    assert len(vocabulary) == vocabulary_size
    special = {token["content"] for token in tokenizer["added_tokens"]}
    types = [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in vocabulary]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
