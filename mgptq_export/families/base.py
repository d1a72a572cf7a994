"""What the workstation has to know of a model family. The defaults are Llama's; a family states what differs."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from mgptq_export.compute import pieces
from mgptq_export.families.gguf_rope import check_gguf_rope, gguf_rope_metadata
from mgptq_runtime.errors import UnsupportedModelError

__all__ = ["Family", "GroupModules"]

Hyperparameters = dict[str, int | float | bool | str]

# Norms over a head; all others are over the residual stream.
HEAD_NORMS = ("attn_q_norm", "attn_k_norm")


@dataclass(frozen=True)
class GroupModules:
    """Linears of a decoder layer that read the same activation.

    Attributes:
        name: ``blk.0.attn_qkv``.
        modules: linear modules by name (``blk.0.attn_q``), in the family's order.
    """

    name: str
    modules: Mapping[str, nn.Linear]

    @property
    def first(self) -> nn.Linear:
        """The linear that reads the activation first."""
        return next(iter(self.modules.values()))

    @property
    def columns(self) -> int:
        """Inputs of every linear of the group."""
        return self.first.in_features

    @property
    def reads_hidden(self) -> bool:
        """Whether the group reads the residual stream; the others write to it."""
        return self.name.endswith(("attn_qkv", "ffn_gate_up"))


class Family:
    """One family of Hugging Face models.

    Canonical names are those of :class:`mgptq_runtime.quantized_model.QuantizedModel`; paths are Hugging Face's,
    within a decoder layer.

    Attributes:
        name: the runtime's family and llama.cpp's architecture.
        model_types: values of ``model_type`` in ``config.json``.
        architecture: the Hugging Face class, for a ``config.json`` that does not name one.
        activation: what ``activation_key`` of the configuration must be.
        rope_types: kinds of rotary frequencies that the runtime can follow.
        groups: input groups in forward order: canonical group to canonical linear to path.
        norms: canonical norm to path.
        norm_offset: what Hugging Face adds to a norm's weight before it multiplies.
        full_attention_only: no layer may have another kind of attention.
        rotary_pairs: llama.cpp keeps the rows of q and k as rotary pairs, not as two halves.
        gguf_tensors: fused tensors of llama.cpp's files: name to the path of Hugging Face's fused module.
        gguf_fused: linears that llama.cpp's files hold as one tensor, by its name, rows one after another.
        gguf_biases: linears whose bias llama.cpp's loader takes.
        gguf_rope_types: kinds of rotary frequencies that a llama.cpp file can express.
        gguf_square_attention: llama.cpp's loader wants all heads together to be as wide as the residual stream.
        gguf_rotary: tensors of llama.cpp's files that belong to the configuration: rotary factors.
        onnx_builder: class of ``onnxruntime_genai.models.builders`` that makes the graph.
    """

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    architecture: ClassVar[str]
    onnx_builder: ClassVar[str]

    activation: ClassVar[str] = "silu"
    activation_key: ClassVar[str] = "hidden_act"
    rope_types: ClassVar[tuple[str, ...]] = ("default", "linear", "dynamic", "yarn", "llama3")
    groups: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "attn_qkv": {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"},
        "attn_output": {"attn_output": "self_attn.o_proj"},
        "ffn_gate_up": {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj"},
        "ffn_down": {"ffn_down": "mlp.down_proj"},
    }
    norms: ClassVar[Mapping[str, str]] = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    norm_offset: ClassVar[float] = 0.0
    full_attention_only: ClassVar[bool] = True
    rotary_pairs: ClassVar[bool] = False
    gguf_tensors: ClassVar[Mapping[str, str]] = {}
    gguf_fused: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    gguf_biases: ClassVar[tuple[str, ...]] = ()
    gguf_rope_types: ClassVar[tuple[str, ...]] = ("default", "linear", "yarn")
    gguf_square_attention: ClassVar[bool] = False
    gguf_rotary: ClassVar[tuple[str, ...]] = ()

    def check_config(self, config: Mapping[str, Any]) -> None:
        """Raise UnsupportedModelError for a variant that the runtime cannot run."""
        if config.get("num_hidden_layers") == 0:
            raise UnsupportedModelError(f"the model has no layers; a {self.name} model has at least one")
        activation = config.get(self.activation_key, self.activation)
        if activation != self.activation:
            raise UnsupportedModelError(
                f"{self.activation_key} {activation!r} is not supported for {self.name} models; "
                f"supported: {self.activation}"
            )
        for rope in self.rope_settings(config):
            if not isinstance(rope, Mapping):
                raise UnsupportedModelError(f"rotary parameters {rope!r} are not supported; supported: a JSON object")
            kind = rope.get("rope_type") or rope.get("type") or "default"
            if kind not in self.rope_types:
                raise UnsupportedModelError(
                    f"rotary type {kind!r} is not supported for {self.name} models; "
                    f"supported: {', '.join(self.rope_types)}"
                )
        types = config.get("layer_types") or []
        if not (isinstance(types, list) and all(isinstance(kind, str) for kind in types)):
            raise UnsupportedModelError(f"layer_types {types!r} are not supported; supported: a list of names")
        if self.full_attention_only and set(types) - {"full_attention"}:
            raise UnsupportedModelError(
                f"layer_types {types} are not supported for {self.name} models; supported: full_attention everywhere"
            )
        window = config.get("sliding_window")
        if window is not None and (not isinstance(window, int) or window < 1):
            raise UnsupportedModelError(
                f"sliding_window {window!r} is not supported for {self.name} models; supported: 1 and more, or null"
            )
        if config.get("use_sliding_window"):
            raise UnsupportedModelError(f"use_sliding_window is not supported for {self.name} models; supported: false")

    def rope_settings(self, config: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
        """Every set of rotary parameters in a configuration, in the old or the new spelling."""
        return [config.get("rope_parameters") or config.get("rope_scaling") or {}]

    def config_from_gguf(self, meta: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
        """The Hugging Face configuration that a GGUF file describes.

        Args:
            meta: the file's hyper-parameters without the architecture's prefix; a missing one raises BadInputError.
            tensors: the file's :class:`mgptq_export.models.gguf_file.GgufTensor` by name.

        Raises:
            UnsupportedModelError: rotary frequencies that are not supported.
        """
        width, heads = int(meta["embedding_length"]), int(meta["attention.head_count"])
        size = int(meta.get("attention.key_length", width // heads))
        rope = self.rope_from_gguf(meta, tensors)
        rotary_size = int(meta.get("rope.dimension_count", size))
        if rotary_size != size and "partial_rotary_factor" not in rope:
            raise UnsupportedModelError(
                f"rope.dimension_count {rotary_size} is not supported for {self.name} models; "
                f"supported: the head size, {size}"
            )
        return {
            "architectures": [self.architecture],
            "model_type": self.model_types[0],
            self.activation_key: self.activation,
            "hidden_size": width,
            "intermediate_size": int(meta["feed_forward_length"]),
            "num_hidden_layers": int(meta["block_count"]),
            "num_attention_heads": heads,
            "num_key_value_heads": int(meta.get("attention.head_count_kv", heads)),
            "head_dim": size,
            "max_position_embeddings": int(meta["context_length"]),
            # The file holds a float32: 1e-6 reads as 9.99999997e-07.
            "rms_norm_eps": round(float(meta["attention.layer_norm_rms_epsilon"]), 12),
            "rope_parameters": rope,
            "vocab_size": tensors["token_embd.weight"].shape[0],
            "tie_word_embeddings": "output.weight" not in tensors,
        }

    def rope_from_gguf(self, meta: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
        """``rope_parameters`` of the configuration that a GGUF file describes, of the default or the linear type.

        Raises:
            UnsupportedModelError: frequencies scaled in another way.
        """
        theta = {"rope_theta": float(meta.get("rope.freq_base", 10_000.0))}
        factor = meta.get("rope.scaling.factor", meta.get("rope.scale_linear"))
        kind = meta.get("rope.scaling.type", "none" if factor is None else "linear")
        if meta.get("rope.scaling.attn_factor", 1.0) == 1.0:
            if kind == "none":
                return {"rope_type": "default", **theta}
            if kind == "linear" and factor is not None:
                return {"rope_type": "linear", "factor": float(factor), **theta}
        raise UnsupportedModelError(
            f"GGUF files of {self.name} models with scaled rotary frequencies of type {kind!r}, factor {factor}, are "
            "not supported; supported: none, or linear with a factor; use the model's Hugging Face folder instead"
        )

    def gguf_paths(self) -> dict[str, str]:
        """A layer's tensors in llama.cpp's files to paths, before :meth:`prepare`."""
        fused = {part for parts in self.gguf_fused.values() for part in parts}
        linears = {name: path for name, path in self.linear_paths().items() if name not in fused}
        return {**linears, **self.gguf_tensors, **self.norms}

    @property
    def adds_to_stream(self) -> bool:
        """Whether what attn_output and ffn_down put out is added to the residual stream as it is."""
        return "post_attention_norm" not in self.norms

    def prepare(self, model: Any) -> None:
        """Make every linear of :attr:`groups` a module of its own, in place; the model computes the same."""

    def layer_groups(self, layer: nn.Module, index: int) -> list[GroupModules]:
        """Input groups of decoder layer ``index`` in forward order."""
        return [
            GroupModules(
                f"blk.{index}.{group}",
                {f"blk.{index}.{name}": layer.get_submodule(path) for name, path in linears.items()},  # type: ignore[misc]
            )
            for group, linears in self.groups.items()
        ]

    def hyperparameters(self, model: Any) -> Hyperparameters:
        """llama.cpp's key names without the architecture's prefix."""
        config = model.config
        return {
            "block_count": config.num_hidden_layers,
            "context_length": config.max_position_embeddings,
            "embedding_length": config.hidden_size,
            "feed_forward_length": config.intermediate_size,
            "attention.head_count": config.num_attention_heads,
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.key_length": head_size(config),
            "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
            "rope.attention_factor": self.rope_attention_factor(model),
            "vocab_size": config.vocab_size,
        }

    def rope_attention_factor(self, model: Any) -> float:
        """What the rotary cosines and sines are multiplied by."""
        return float(model.model.rotary_emb.attention_scaling)

    def rotary_tensors(self, model: Any) -> dict[str, np.ndarray]:
        """Rotary frequencies, float32 by canonical name."""
        return {"rope_inverse_frequencies": array(model.model.rotary_emb.inv_freq)}

    def other_tensors(self, model: Any) -> dict[str, np.ndarray]:
        """Everything that is not quantized, float32 by canonical name: norms, rotary frequencies, biases."""
        tensors = {"output_norm": array(model.model.norm.weight) + np.float32(self.norm_offset)}
        tensors |= self.rotary_tensors(model)
        for i, layer in enumerate(model.model.layers):
            for name, path in self.norms.items():
                weight = array(layer.get_submodule(path).weight)
                tensors[f"blk.{i}.{name}"] = weight + np.float32(self.norm_offset)
            for group in self.layer_groups(layer, i):
                for name, module in group.modules.items():
                    if module.bias is not None:
                        tensors[f"{name}_bias"] = array(module.bias)
        return tensors

    def check_gguf_config(self, config: Any) -> None:
        """Raise UnsupportedModelError for what llama.cpp would refuse to load, or compute otherwise.

        Args:
            config: a transformers configuration.
        """
        self.check_gguf_frequencies(config)
        width = config.num_attention_heads * head_size(config)
        if self.gguf_square_attention and width != config.hidden_size:
            raise UnsupportedModelError(
                f"{config.num_attention_heads} heads of {head_size(config)} are {width} wide, llama.cpp takes "
                f"{self.name} models only where that is hidden_size, {config.hidden_size}"
            )
        for flag, group in (("attention_bias", ("attn_qkv", "attn_output")), ("mlp_bias", ("ffn_gate_up", "ffn_down"))):
            linears = [linear for name in group for linear in self.groups[name]]
            if getattr(config, flag, False) and not set(linears) <= set(self.gguf_biases):
                raise UnsupportedModelError(f"llama.cpp takes no {flag} for {self.name} models")

    def check_gguf_frequencies(self, config: Any) -> None:
        """The part of :meth:`check_gguf_config` about rotary frequencies."""
        check_gguf_rope(self.name, config.rope_parameters, self.gguf_rope_types)

    def gguf_metadata(self, config: Any, hyperparameters: Mapping[str, Any]) -> Hyperparameters:
        """What llama.cpp has to know beyond sizes: keys without the architecture's prefix.

        Args:
            config: a transformers configuration.
            hyperparameters: those of :meth:`hyperparameters`.
        """
        return gguf_rope_metadata(config.rope_parameters, config.max_position_embeddings)

    def gguf_rotary_tensors(self, config: Any, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Rotary factors that llama.cpp reads as tensors, float32 by its name.

        Args:
            tensors: the model's, by canonical name.
        """
        return {}

    def reorder_intermediate(self, layer: nn.Module, order: torch.Tensor) -> None:
        """Renumber the neurons between gate/up and down, in place; the layer computes the same.

        Args:
            order: int64 [intermediate], the old number of each new neuron.
        """
        gate_up, down = self.groups["ffn_gate_up"], self.groups["ffn_down"]
        for path in gate_up.values():
            module: Any = layer.get_submodule(path)
            renumber(module.weight, order)
            if module.bias is not None:
                renumber(module.bias, order)
        for path in down.values():
            module = layer.get_submodule(path)
            renumber_columns(module.weight, order)

    def reorder_hidden(self, model: Any, order: torch.Tensor) -> None:
        """Renumber the channels of the residual stream, in place; the model computes the same.

        Args:
            order: int64 [hidden], the old number of each new channel.
        """
        for table in {id(m.weight): m for m in (model.model.embed_tokens, model.lm_head)}.values():
            renumber_columns(table.weight, order)
        renumber(model.model.norm.weight, order)
        for i, layer in enumerate(model.model.layers):
            for name, path in self.norms.items():
                if name not in HEAD_NORMS:
                    norm: Any = layer.get_submodule(path)
                    renumber(norm.weight, order)
            for group in self.layer_groups(layer, i):
                for module in group.modules.values():
                    if group.reads_hidden:
                        renumber_columns(module.weight, order)
                    else:
                        renumber(module.weight, order)
                        if module.bias is not None:
                            renumber(module.bias, order)

    def load_tensors(self, model: Any, tensors: Mapping[str, np.ndarray]) -> None:
        """Put norms and biases, as :meth:`other_tensors` gives them, back into a model of the same shape."""
        for parameter, value in model.named_parameters():
            name = self.tensor_of_parameter(parameter)
            if name is not None:
                offset = 0.0 if name.endswith("_bias") else self.norm_offset
                value.data.copy_(torch.from_numpy(tensors[name] - np.float32(offset)))

    def linear_paths(self) -> dict[str, str]:
        """Canonical linear to path, all groups."""
        return {name: path for linears in self.groups.values() for name, path in linears.items()}

    def tensor_of_parameter(self, parameter: str) -> str | None:
        """The canonical tensor of a Hugging Face parameter, or None for one that is quantized."""
        if parameter == "model.norm.weight":
            return "output_norm"
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", parameter)
        if not match:
            return None
        layer, path, kind = match.groups()
        tables = self.linear_paths() if kind == "bias" else self.norms
        for name, known in tables.items():
            if known == path:
                return f"blk.{layer}.{name}" + ("_bias" if kind == "bias" else "")
        return None


def head_size(config: Any) -> int:
    """Values per attention head of a transformers configuration."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def array(tensor: Any) -> np.ndarray:
    """A tensor's values, float32, in memory of their own."""
    return tensor.detach().float().cpu().numpy().copy()


def renumber(parameter: Any, order: torch.Tensor) -> None:
    """Put rows, or a vector's numbers, in another order, in place."""
    parameter.data.copy_(parameter.data[order])


def renumber_columns(parameter: Any, order: torch.Tensor) -> None:
    """Put columns in another order, in place and some rows at a time: tables of embeddings are large."""
    for piece in pieces(parameter.data):
        parameter.data[piece] = parameter.data[piece][:, order]
