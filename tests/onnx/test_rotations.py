"""The pass that computes rotary cosines and sines, over a graph of two layers; NumPy's rotation is trusted."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from mgptq_export.targets.onnx.packed_initializers import initializer
from mgptq_export.targets.onnx.rotations import compute_rotations
from mgptq_runtime.families.decoder import Decoder
from mgptq_runtime.families.layers import rotate

HEADS, KV_HEADS, HEAD_SIZE, CONTEXT, SWITCH = 4, 2, 8, 64, 10
RNG = np.random.default_rng(0)


@dataclass(frozen=True)
class TwoKinds(Decoder):
    """Layer 0 has frequencies of its own, layer 1 others beyond SWITCH tokens; three quarters of a head turn."""

    name: ClassVar[str] = "two"

    @property
    def rotary_size(self) -> int:
        return 6

    @property
    def frequency_tensors(self) -> tuple[str, ...]:
        return "local", "short", "long"

    def frequencies_of(self, layer: int, positions: int) -> str:
        if layer == 0:
            return "local"
        return "long" if positions > SWITCH else "short"


DECODER = TwoKinds(2, CONTEXT, 32, 32, HEADS, KV_HEADS, HEAD_SIZE, 1e-6, 1.25, 100)
TENSORS = {name: RNG.uniform(0.1, 1, 3).astype(np.float32) for name in DECODER.frequency_tensors}


def builder_graph() -> ir.Graph:
    """What the builder makes: q and k of two layers rotated by one table."""
    shape = ["batch_size", "sequence_length"]
    ids = ir.val("position_ids", dtype=ir.DataType.INT64, shape=shape)
    graph = ir.Graph([ids], [], nodes=[], opset_imports={"": 23, "com.microsoft": 1})
    tables = [initializer(graph, name, np.zeros((2, 4), np.float32)) for name in ("cos_cache", "sin_cache")]
    for layer in range(2):
        for kind, heads in (("q", HEADS), ("k", KV_HEADS)):
            x = ir.val(f"{kind}{layer}", dtype=ir.DataType.FLOAT, shape=[*shape, heads * HEAD_SIZE])
            graph.inputs.append(x)
            name = f"/model/layers.{layer}/attn/{kind}_rotary/RotaryEmbedding"
            node = ir.node("RotaryEmbedding", [x, ids, *tables], {"num_heads": 0}, domain="com.microsoft", name=name)
            node.outputs[0].name, node.outputs[0].type = f"{kind}{layer}_rotated", x.type
            graph.append(node)
            graph.outputs.append(node.outputs[0])
    return graph


@pytest.fixture(scope="module")
def session() -> ort.InferenceSession:
    graph = builder_graph()
    compute_rotations(graph, DECODER, TENSORS)
    assert not [name for name in graph.initializers if "cache" in name]
    model = ir.Model(graph, ir_version=11)
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])


def expected(x: np.ndarray, positions: np.ndarray, frequencies: str) -> np.ndarray:
    angles = positions[:, None].astype(np.float32) * TENSORS[frequencies]
    factor = np.float32(DECODER.rope_attention_factor)
    heads = x.reshape(*x.shape[:2], -1, HEAD_SIZE).transpose(0, 2, 1, 3)
    rotated = rotate(heads, np.cos(angles) * factor, np.sin(angles) * factor)
    return rotated.transpose(0, 2, 1, 3).reshape(x.shape)


@pytest.mark.parametrize(
    ("first", "count", "later"),
    [(0, SWITCH, "short"), (0, SWITCH + 1, "long"), (SWITCH - 1, 1, "short"), (SWITCH, 1, "long"), (60, 4, "long")],
)
def test_layers_rotate_by_their_frequencies(session, first: int, count: int, later: str) -> None:
    positions = np.arange(first, first + count)
    feeds = {
        f"{kind}{layer}": RNG.standard_normal((2, count, heads * HEAD_SIZE)).astype(np.float32)
        for layer in range(2)
        for kind, heads in (("q", HEADS), ("k", KV_HEADS))
    }
    outputs = session.run(None, {"position_ids": np.tile(positions, (2, 1)), **feeds})
    for (name, x), output in zip(feeds.items(), outputs, strict=True):
        frequencies = "local" if name.endswith("0") else later
        assert np.abs(output - expected(x, positions, frequencies)).max() <= 1e-6


def test_layers_share_what_they_rotate_by() -> None:
    graph = builder_graph()
    compute_rotations(graph, DECODER, TENSORS)
    operators = [node.op_type for node in graph]
    assert (operators.count("Cos"), operators.count("Sin"), operators.count("RotaryEmbedding")) == (2, 2, 4)
    assert sum(tensor.const_value.nbytes for tensor in graph.initializers.values()) == 3 * 3 * 4
