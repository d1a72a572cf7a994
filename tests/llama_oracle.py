"""The oracle of both backends' tests: transformers' Llama in float32, on the dequantized weights."""

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mgptq_runtime.quantized_model import QuantizedModel

PARAMETERS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def llama_config(model: QuantizedModel) -> dict:
    """``config.json`` of a synthetic model."""
    h = model.hyperparameters
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=h["vocab_size"],
        hidden_size=h["embedding_length"],
        intermediate_size=h["feed_forward_length"],
        num_hidden_layers=h["block_count"],
        num_attention_heads=h["attention.head_count"],
        num_key_value_heads=h["attention.head_count_kv"],
        head_dim=h["attention.key_length"],
        max_position_embeddings=h["context_length"],
        rms_norm_eps=h["attention.layer_norm_rms_epsilon"],
        tie_word_embeddings=model.head is None,
        attention_bias=any(name.endswith("attn_q_bias") for name in model.tensors),
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    ).to_dict()


def torch_llama(model: QuantizedModel) -> LlamaForCausalLM:
    """The same model in torch, in float32, biases included."""
    weights = {
        "model.embed_tokens.weight": model.embedding.dequantize(),
        "model.norm.weight": model.tensors["output_norm"],
    }
    if model.head is not None:
        weights["lm_head.weight"] = model.head.dequantize()
    for linear in model.linears():
        _, layer, name = linear.name.split(".")
        weights[f"model.layers.{layer}.{PARAMETERS[name]}.weight"] = linear.dequantize()
    for full_name, tensor in model.tensors.items():
        if full_name.startswith("blk."):
            _, layer, name = full_name.split(".")
            kind = "bias" if name.endswith("_bias") else "weight"
            weights[f"model.layers.{layer}.{PARAMETERS[name.removesuffix('_bias')]}.{kind}"] = tensor
    llama = LlamaForCausalLM(LlamaConfig(**llama_config(model), attn_implementation="eager")).eval()
    missing, unexpected = llama.load_state_dict({k: torch.tensor(v) for k, v in weights.items()}, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    return llama


def oracle_logits(model: QuantizedModel, token_ids: np.ndarray) -> np.ndarray:
    """float32 [batch, sequence, vocabulary]."""
    with torch.no_grad():
        return torch_llama(model)(torch.from_numpy(token_ids)).logits.numpy()
