"""What onnxruntime-genai's builder calls the nodes of its graphs: the same in every family."""

import re

from mgptq_runtime.errors import UnsupportedModelError

__all__ = ["EMBEDDING_NODE", "HEAD_NODE", "layer_of", "matmul_node"]

EMBEDDING_NODE = "/model/embed_tokens/Gather"
HEAD_NODE = "/lm_head/MatMul"

LINEARS = {
    "attn_q": "attn/q_proj",
    "attn_k": "attn/k_proj",
    "attn_v": "attn/v_proj",
    "attn_output": "attn/o_proj",
    "ffn_gate": "mlp/gate_proj",
    "ffn_up": "mlp/up_proj",
    "ffn_down": "mlp/down_proj",
}


def matmul_node(linear: str) -> str:
    """The MatMul node of a canonical linear, as ``blk.0.attn_q``.

    Raises:
        UnsupportedModelError: no such linear in the builder's graphs.
    """
    _, layer, name = linear.split(".")
    if name not in LINEARS:
        raise UnsupportedModelError(f"{linear}: the onnx target has no node for it; it has {', '.join(LINEARS)}")
    return f"/model/layers.{layer}/{LINEARS[name]}/MatMul"


def layer_of(node_name: str) -> int:
    """The layer that a node belongs to.

    Raises:
        ValueError: a node outside the layers.
    """
    match = re.match(r"/model/layers\.(\d+)/", node_name)
    if not match:
        raise ValueError(f"{node_name}: not a node of a layer")
    return int(match.group(1))
