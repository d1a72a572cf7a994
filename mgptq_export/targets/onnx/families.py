"""Which builder makes a family's graph, and what the graph's and the checkpoint's names have to do with each other."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mgptq_runtime.errors import UnsupportedModelError

__all__ = ["FAMILIES", "Family", "family_named"]


@dataclass(frozen=True)
class Family:
    """One model family of the ONNX target.

    Attributes:
        architecture: the Hugging Face class, for a ``config.json`` that does not name one.
        builder: class of ``onnxruntime_genai.models.builders`` that makes the graph.
        embedding: name of the graph's embedding node.
        head: name of the graph's head node.
        linears: canonical linear to name of the graph's MatMul node; ``{i}`` is the layer.
        parameters: Hugging Face parameter to canonical tensor, for what is not quantized; ``{i}`` is the layer.
    """

    architecture: str
    builder: str
    embedding: str
    head: str
    linears: Mapping[str, str]
    parameters: Mapping[str, str]

    def node_name(self, linear: str) -> str:
        """The graph's MatMul node of a canonical linear.

        Raises:
            UnsupportedModelError: no such linear in this family.
        """
        layer = re.search(r"\d+", linear)
        generic = re.sub(r"\d+", "{i}", linear, count=1)
        if generic not in self.linears:
            raise UnsupportedModelError(f"{linear}: not a linear of {self.architecture}; it has {list(self.linears)}")
        return self.linears[generic].format(i=layer.group() if layer else "")

    def tensor_name(self, parameter: str) -> str | None:
        """The canonical tensor of a Hugging Face parameter, or None for one that is quantized."""
        layer = re.search(r"\d+", parameter)
        generic = self.parameters.get(re.sub(r"\d+", "{i}", parameter, count=1))
        return generic and generic.format(i=layer.group() if layer else "")


LLAMA_LINEARS = {
    "blk.{i}.attn_q": "/model/layers.{i}/attn/q_proj/MatMul",
    "blk.{i}.attn_k": "/model/layers.{i}/attn/k_proj/MatMul",
    "blk.{i}.attn_v": "/model/layers.{i}/attn/v_proj/MatMul",
    "blk.{i}.attn_output": "/model/layers.{i}/attn/o_proj/MatMul",
    "blk.{i}.ffn_gate": "/model/layers.{i}/mlp/gate_proj/MatMul",
    "blk.{i}.ffn_up": "/model/layers.{i}/mlp/up_proj/MatMul",
    "blk.{i}.ffn_down": "/model/layers.{i}/mlp/down_proj/MatMul",
}

LLAMA_PARAMETERS = {
    "model.layers.{i}.input_layernorm.weight": "blk.{i}.attn_norm",
    "model.layers.{i}.post_attention_layernorm.weight": "blk.{i}.ffn_norm",
    "model.norm.weight": "output_norm",
    "model.layers.{i}.self_attn.q_proj.bias": "blk.{i}.attn_q_bias",
    "model.layers.{i}.self_attn.k_proj.bias": "blk.{i}.attn_k_bias",
    "model.layers.{i}.self_attn.v_proj.bias": "blk.{i}.attn_v_bias",
    "model.layers.{i}.self_attn.o_proj.bias": "blk.{i}.attn_output_bias",
    "model.layers.{i}.mlp.gate_proj.bias": "blk.{i}.ffn_gate_bias",
    "model.layers.{i}.mlp.up_proj.bias": "blk.{i}.ffn_up_bias",
    "model.layers.{i}.mlp.down_proj.bias": "blk.{i}.ffn_down_bias",
}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        builder="LlamaModel",
        embedding="/model/embed_tokens/Gather",
        head="/lm_head/MatMul",
        linears=LLAMA_LINEARS,
        parameters=LLAMA_PARAMETERS,
    ),
}


def family_named(name: str) -> Family:
    """The family of a checkpoint.

    Raises:
        UnsupportedModelError: the ONNX target does not know it.
    """
    if name not in FAMILIES:
        raise UnsupportedModelError(f"the onnx target does not support the family {name!r}; it has {list(FAMILIES)}")
    return FAMILIES[name]
