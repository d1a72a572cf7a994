"""Phi-3 and Phi-4-mini."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from mgptq_export.families.base import Family, Hyperparameters, array, head_size
from mgptq_export.families.gguf_rope import rope_type

__all__ = ["FusedLinear", "Phi3"]

logger = logging.getLogger(__name__)

LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"


class FusedLinear(nn.Module):
    """Linears that read one input and whose outputs lie side by side: what was one matrix, cut by rows."""

    def __init__(self, fused: nn.Linear, rows: Sequence[int]) -> None:
        super().__init__()
        self.parts = nn.ModuleList()
        for weight in fused.weight.data.split(list(rows)):
            part = nn.Linear(fused.in_features, len(weight), bias=False, device="meta")
            part.weight = nn.Parameter(weight, requires_grad=False)
            self.parts.append(part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float [..., columns] to float [..., all rows]."""
        return torch.cat([part(x) for part in self.parts], dim=-1)


class Phi3(Family):
    """q, k, v and gate, up are one matrix each in Hugging Face's and llama.cpp's files."""

    name: ClassVar[str] = "phi3"
    model_types: ClassVar[tuple[str, ...]] = ("phi3",)
    architecture: ClassVar[str] = "Phi3ForCausalLM"
    onnx_builder: ClassVar[str] = "Phi3MiniModel"
    rope_types: ClassVar[tuple[str, ...]] = ("default", "longrope")
    groups: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "attn_qkv": {f"attn_{name}": f"self_attn.qkv_proj.parts.{i}" for i, name in enumerate("qkv")},
        "attn_output": {"attn_output": "self_attn.o_proj"},
        "ffn_gate_up": {"ffn_gate": "mlp.gate_up_proj.parts.0", "ffn_up": "mlp.gate_up_proj.parts.1"},
        "ffn_down": {"ffn_down": "mlp.down_proj"},
    }
    gguf_tensors: ClassVar[Mapping[str, str]] = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
    gguf_rope_types: ClassVar[tuple[str, ...]] = ("default", "longrope")
    gguf_square_attention: ClassVar[bool] = True
    gguf_fused: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attn_qkv": ("attn_q", "attn_k", "attn_v"),
        "ffn_up": ("ffn_gate", "ffn_up"),
    }

    gguf_rotary: ClassVar[tuple[str, ...]] = (LONG_FACTORS, SHORT_FACTORS)

    def config_from_gguf(self, meta: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
        """The Hugging Face configuration that a GGUF file describes; see :meth:`Family.config_from_gguf`."""
        config = super().config_from_gguf(meta, tensors)
        return {
            **config,
            "original_max_position_embeddings": _original_context_from_gguf(meta),
            "partial_rotary_factor": config["rope_parameters"]["partial_rotary_factor"],
            # llama.cpp's converter writes 0 for "none".
            "sliding_window": int(meta.get("attention.sliding_window", 0)) or None,
        }

    def rope_from_gguf(self, meta: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Long models' factors are tensors of their own; the type of scaling is not always stated."""
        size = int(meta["embedding_length"]) // int(meta["attention.head_count"])
        part = {"partial_rotary_factor": int(meta.get("rope.dimension_count", size)) / size}
        if LONG_FACTORS not in tensors:
            return {**super().rope_from_gguf(meta, tensors), **part}
        original = _original_context_from_gguf(meta)
        rope: dict[str, Any] = {
            "rope_type": "longrope",
            "rope_theta": float(meta.get("rope.freq_base", 10_000.0)),
            "original_max_position_embeddings": original,
            "short_factor": _factors(tensors[SHORT_FACTORS]),
            "long_factor": _factors(tensors[LONG_FACTORS]),
            **part,
        }
        usual = _usual_attention_factor(int(meta["context_length"]) / original, original)
        found = float(meta.get("rope.scaling.attn_factor", 1.0))
        if not math.isclose(found, usual, rel_tol=1e-6):
            rope["attention_factor"] = found
        return rope

    def prepare(self, model: Any) -> None:
        """Cut the fused matrices, in place; the model computes the same."""
        config = model.config
        size = head_size(config)
        kv_rows = config.num_key_value_heads * size
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            attention.qkv_proj = FusedLinear(attention.qkv_proj, (config.num_attention_heads * size, kv_rows, kv_rows))
            mlp.gate_up_proj = FusedLinear(mlp.gate_up_proj, (config.intermediate_size, config.intermediate_size))

    def hyperparameters(self, model: Any) -> Hyperparameters:
        """llama.cpp's key names without the architecture's prefix."""
        config = model.config
        rotary = model.model.rotary_emb
        return {
            **super().hyperparameters(model),
            "rope.dimension_count": 2 * rotary.inv_freq.numel(),
            "rope.scaling.original_context_length": _original_context(config),
            "attention.sliding_window": config.sliding_window or 0,
        }

    def rotary_tensors(self, model: Any) -> dict[str, np.ndarray]:
        """Frequencies for short texts, and for long ones where the model has them."""
        tensors = {"rope_inverse_frequencies": array(model.model.rotary_emb.original_inv_freq)}
        parameters = model.config.rope_parameters
        if _original_context(model.config) < model.config.max_position_embeddings:
            rotary_size = 2 * tensors["rope_inverse_frequencies"].size
            powers = torch.arange(0, rotary_size, 2, dtype=torch.float) / rotary_size
            factors = torch.tensor(parameters["long_factor"], dtype=torch.float)
            tensors["rope_long_inverse_frequencies"] = array(1.0 / (factors * parameters["rope_theta"] ** powers))
        return tensors

    def check_gguf_config(self, config: Any) -> None:
        """Raise UnsupportedModelError for what llama.cpp cannot run, warn where it sees more of a long text."""
        super().check_gguf_config(config)
        if config.sliding_window and config.sliding_window < config.max_position_embeddings:
            logger.warning(
                "llama.cpp gives phi3 models no window: beyond %d tokens this model attends to more there",
                config.sliding_window,
            )

    def gguf_metadata(self, config: Any, hyperparameters: Mapping[str, Any]) -> Hyperparameters:
        """llama.cpp's keys without the architecture's prefix.

        llama.cpp takes the long factors when the *context* that it is started with is longer than the original one,
        transformers when the *text* is.
        """
        return {
            **super().gguf_metadata(config, hyperparameters),
            "rope.scaling.original_context_length": _original_context(config),
            "rope.scaling.attn_factor": float(hyperparameters["rope.attention_factor"]),
            "attention.sliding_window": config.sliding_window or 0,
        }

    def gguf_rotary_tensors(self, config: Any, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Longrope's factors for long and for short texts."""
        parameters = config.rope_parameters
        if rope_type(parameters) != "longrope":
            return {}
        factors = {LONG_FACTORS: parameters["long_factor"], SHORT_FACTORS: parameters["short_factor"]}
        return {name: np.array(values, np.float32) for name, values in factors.items()}


def _original_context(config: Any) -> int:
    """Up to how many tokens the short frequencies hold."""
    parameters = config.rope_parameters
    if parameters.get("rope_type") != "longrope":
        return config.max_position_embeddings
    return parameters.get("original_max_position_embeddings") or config.original_max_position_embeddings


def _original_context_from_gguf(meta: Mapping[str, Any]) -> int:
    """The same, of a GGUF file's hyper-parameters."""
    return int(meta.get("rope.scaling.original_context_length", meta["context_length"]))


def _usual_attention_factor(scale: float, original: int) -> float:
    """LongRoPE's factor of cosines and sines (https://arxiv.org/abs/2402.13753), which transformers assumes."""
    return math.sqrt(1.0 + math.log(scale) / math.log(original)) if scale > 1.0 else 1.0


def _factors(tensor: Any) -> list[float]:
    """A tensor of factors as the short decimal numbers that ``config.json`` had."""
    return [float(str(value)) for value in tensor.values()]
