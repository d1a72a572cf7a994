"""The oracle of the ONNX tests: transformers' Llama in float32, on the dequantized weights."""

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
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    ).to_dict()


def _layer_parameter(name: str) -> str:
    _, layer, tensor = name.split(".")
    return f"model.layers.{layer}.{PARAMETERS[tensor]}.weight"


def oracle_logits(model: QuantizedModel, token_ids: np.ndarray) -> np.ndarray:
    """float32 [batch, sequence, vocabulary]."""
    oracle = LlamaForCausalLM(LlamaConfig(**llama_config(model))).eval()
    weights = {_layer_parameter(linear.name): linear.dequantize() for linear in model.linears()}
    weights |= {_layer_parameter(name): tensor for name, tensor in model.tensors.items() if name.startswith("blk.")}
    weights["model.norm.weight"] = model.tensors["output_norm"]
    weights["model.embed_tokens.weight"] = model.embedding.dequantize()
    weights["lm_head.weight"] = (model.head or model.embedding).dequantize()
    oracle.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()}, strict=True)
    with torch.no_grad():
        return oracle(torch.from_numpy(token_ids)).logits.numpy()
