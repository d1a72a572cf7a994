"""Gemma 3, the text models."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np

from mgptq_export.families.base import Family, Hyperparameters, array, head_size
from mgptq_export.families.gguf_rope import check_gguf_rope, gguf_rope_metadata
from mgptq_runtime.errors import UnsupportedModelError

__all__ = ["Gemma3"]

GLOBAL, LOCAL = "full_attention", "sliding_attention"
USUAL_PATTERN = 6
LOCAL_THETA = 10_000.0
LAYERS_OF_27B = 62


class Gemma3(Family):
    """More norms, GELU, and two kinds of layers: local ones with a window and frequencies of their own."""

    name: ClassVar[str] = "gemma3"
    model_types: ClassVar[tuple[str, ...]] = ("gemma3_text",)
    architecture: ClassVar[str] = "Gemma3ForCausalLM"
    onnx_builder: ClassVar[str] = "Gemma3Model"
    activation: ClassVar[str] = "gelu_pytorch_tanh"
    activation_key: ClassVar[str] = "hidden_activation"
    rope_types: ClassVar[tuple[str, ...]] = ("default", "linear")
    gguf_rope_types: ClassVar[tuple[str, ...]] = ("default", "linear")
    norms: ClassVar[Mapping[str, str]] = {
        "attn_norm": "input_layernorm",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }
    norm_offset: ClassVar[float] = 1.0
    full_attention_only: ClassVar[bool] = False

    def check_config(self, config: Mapping[str, Any]) -> None:
        """Raise UnsupportedModelError for a variant that the runtime cannot run."""
        super().check_config(config)
        for key in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
            if config.get(key):
                raise UnsupportedModelError(f"{key} {config[key]!r} is not supported for {self.name} models")
        if "sliding_window" in config and config["sliding_window"] is None:
            raise UnsupportedModelError(f"{self.name} models need a sliding_window, and it is null")
        types = config.get("layer_types")
        if types and not _patterns(types):
            raise UnsupportedModelError(
                f"layer_types {types} are not supported for {self.name} models; "
                f"supported: {GLOBAL} at every n-th layer, {LOCAL} elsewhere"
            )

    def config_from_gguf(self, meta: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
        """The Hugging Face configuration that a GGUF file describes; see :meth:`Family.config_from_gguf`."""
        config = super().config_from_gguf(meta, tensors)
        layers = config["num_hidden_layers"]
        # llama.cpp's files do not hold the attention's scale; its loader knows the one size with another one.
        heads_share = config["hidden_size"] // config["num_attention_heads"]
        return {
            **config,
            "query_pre_attn_scalar": heads_share if layers == LAYERS_OF_27B else config["head_dim"],
            # Without a window every layer is global, and transformers still wants a number.
            "sliding_window": int(meta.get("attention.sliding_window", 0)) or config["max_position_embeddings"],
            "layer_types": _layer_types(meta, layers),
            "attn_logit_softcapping": meta.get("attn_logit_softcapping"),
            "final_logit_softcapping": meta.get("final_logit_softcapping"),
        }

    def rope_from_gguf(self, meta: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Global layers are scaled, local layers never."""
        theta = float(meta.get("rope.freq_base_swa", LOCAL_THETA))
        local = {"rope_type": "default", "rope_theta": theta}
        return {GLOBAL: super().rope_from_gguf(meta, tensors), LOCAL: local}

    def rope_settings(self, config: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
        """Global layers have their parameters, local layers theirs."""
        found = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(found, Mapping) or GLOBAL not in found:
            return [found]
        if LOCAL not in found:
            raise UnsupportedModelError(f"rope_parameters without {LOCAL} are not supported for {self.name} models")
        return [found[kind] or {} for kind in (GLOBAL, LOCAL)]

    def hyperparameters(self, model: Any) -> Hyperparameters:
        """llama.cpp's key names without the architecture's prefix."""
        config = model.config
        return {
            **super().hyperparameters(model),
            "attention.sliding_window": config.sliding_window,
            "attention.sliding_window_pattern": _patterns(config.layer_types)[0],
            "attention.scale": config.query_pre_attn_scalar**-0.5,
        }

    def rope_attention_factor(self, model: Any) -> float:
        """The kinds of rotary frequencies that are supported have none."""
        return 1.0

    def rotary_tensors(self, model: Any) -> dict[str, np.ndarray]:
        """Frequencies of the global and of the local layers; a kind that no layer has takes the other's."""
        rotary = model.model.rotary_emb
        found = {kind: getattr(rotary, f"{kind}_inv_freq", None) for kind in (GLOBAL, LOCAL)}
        present = next(value for value in found.values() if value is not None)
        return {
            name: array(present if found[kind] is None else found[kind])
            for name, kind in (("rope_inverse_frequencies", GLOBAL), ("rope_local_inverse_frequencies", LOCAL))
        }

    def check_gguf_config(self, config: Any) -> None:
        """Raise UnsupportedModelError for what llama.cpp, which has constants here, would compute otherwise."""
        super().check_gguf_config(config)
        usual = head_size(config)
        if config.num_hidden_layers == LAYERS_OF_27B:
            usual = config.hidden_size // config.num_attention_heads
        if config.query_pre_attn_scalar != usual:
            raise UnsupportedModelError(
                f"query_pre_attn_scalar {config.query_pre_attn_scalar} is not what llama.cpp computes, {usual}"
            )

    def check_gguf_frequencies(self, config: Any) -> None:
        """Local layers' frequencies are never scaled in llama.cpp."""
        check_gguf_rope("global gemma3", config.rope_parameters[GLOBAL], self.gguf_rope_types)
        check_gguf_rope("local gemma3", config.rope_parameters[LOCAL], ("default",))

    def gguf_metadata(self, config: Any, hyperparameters: Mapping[str, Any]) -> Hyperparameters:
        """llama.cpp's keys without the architecture's prefix.

        Early versions of llama.cpp ignore the pattern and the local frequencies, and take the published models'.
        """
        # A window that no layer has makes llama.cpp abort.
        has_window = LOCAL in config.layer_types
        window = ("attention.sliding_window", "attention.sliding_window_pattern") if has_window else ()
        return {
            **gguf_rope_metadata(config.rope_parameters[GLOBAL], config.max_position_embeddings),
            "rope.freq_base_swa": float(config.rope_parameters[LOCAL]["rope_theta"]),
            **{key: hyperparameters[key] for key in window},
        }


def _layer_types(meta: Mapping[str, Any], layers: int) -> list[str]:
    """Kind of every layer of a GGUF file, whose pattern is a period or a flag per layer, true for a local one."""
    if not meta.get("attention.sliding_window"):
        return [GLOBAL] * layers
    pattern = meta.get("attention.sliding_window_pattern", USUAL_PATTERN)
    local = pattern if isinstance(pattern, list) else [(i + 1) % pattern for i in range(layers)]
    return [LOCAL if flag else GLOBAL for flag in local]


def _patterns(types: list[str]) -> list[int]:
    """All n for which just every n-th layer is global; the usual one first."""
    candidates = [USUAL_PATTERN, *range(1, len(types) + 2)]
    return [n for n in candidates if all((kind == GLOBAL) == ((i + 1) % n == 0) for i, kind in enumerate(types))]
