"""Llama 1 to 3 and models of the same shape (SmolLM2, TinyLlama, ...)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from mgptq_runtime.errors import UnsupportedModelError

MODEL_TYPES: tuple[str, ...] = ("llama",)


def check_config(config: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError for a variant that the runtime cannot run."""
    if config.get("num_hidden_layers") == 0:
        raise UnsupportedModelError("the model has no layers; a llama model has at least one")
    if (config.get("num_local_experts") or 0) > 1:
        raise UnsupportedModelError("mixture-of-experts models are not supported; supported: dense llama models")
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedModelError(f"hidden_act {activation!r} is not supported for llama models; supported: silu")


def layer_groups(layer: nn.Module, index: int) -> dict[str, dict[str, nn.Linear]]:
    """Linear modules of decoder layer ``index`` by group name and linear name."""
    block = f"blk.{index}"
    attention: Any = layer.self_attn
    mlp: Any = layer.mlp
    return {
        f"{block}.attn_qkv": {
            f"{block}.attn_q": attention.q_proj,
            f"{block}.attn_k": attention.k_proj,
            f"{block}.attn_v": attention.v_proj,
        },
        f"{block}.attn_output": {f"{block}.attn_output": attention.o_proj},
        f"{block}.ffn_gate_up": {f"{block}.ffn_gate": mlp.gate_proj, f"{block}.ffn_up": mlp.up_proj},
        f"{block}.ffn_down": {f"{block}.ffn_down": mlp.down_proj},
    }


def hyperparameters(model: Any) -> dict[str, int | float | bool | str]:
    """llama.cpp's key names without the ``llama.`` prefix."""
    config = model.config
    return {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.attention_factor": float(model.model.rotary_emb.attention_scaling),
        "vocab_size": config.vocab_size,
    }


def other_tensors(model: Any) -> dict[str, np.ndarray]:
    """Norms, rotary frequencies and, where the model has them, biases: float32 by name."""

    def array(tensor: Any) -> np.ndarray:
        return tensor.detach().float().cpu().numpy().copy()

    tensors = {
        "output_norm": array(model.model.norm.weight),
        "rope_inverse_frequencies": array(model.model.rotary_emb.inv_freq),
    }
    for i, layer in enumerate(model.model.layers):
        tensors[f"blk.{i}.attn_norm"] = array(layer.input_layernorm.weight)
        tensors[f"blk.{i}.ffn_norm"] = array(layer.post_attention_layernorm.weight)
        for linears in layer_groups(layer, i).values():
            for name, module in linears.items():
                if module.bias is not None:
                    tensors[f"{name}_bias"] = array(module.bias)
    return tensors


def reorder_intermediate(layer: Any, order: torch.Tensor) -> None:
    """Renumber the neurons between gate/up and down, in place; the layer computes the same.

    Args:
        order: int64 [intermediate], the old number of each new neuron.
    """
    mlp = layer.mlp
    for module in (mlp.gate_proj, mlp.up_proj):
        module.weight.data = module.weight.data[order]
        if module.bias is not None:
            module.bias.data = module.bias.data[order]
    mlp.down_proj.weight.data = mlp.down_proj.weight.data[:, order]
