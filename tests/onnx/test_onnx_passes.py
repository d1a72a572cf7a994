"""Each pass over a small graph."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from synthetic import random_linear

from mgptq_export.targets.onnx.constant_shapes import declare_constant_shapes
from mgptq_export.targets.onnx.external_data import externalize
from mgptq_export.targets.onnx.last_logits import FIRST_LOGIT, keep_last_logits
from mgptq_export.targets.onnx.node_names import layer_of, matmul_node
from mgptq_export.targets.onnx.packed_initializers import initializer
from mgptq_export.targets.onnx.standard_norms import standardize_norms
from mgptq_export.targets.onnx.swap_embedding import swap_embedding
from mgptq_export.targets.onnx.swap_linears import swap_linears
from mgptq_runtime.errors import UnsupportedModelError
from mgptq_runtime.quantized_model import InputGroup


def float_graph(matmuls: dict[str, str], columns: int = 192) -> ir.Graph:
    """MatMul nodes (name to the activation that it reads) of 32 outputs on activations ``x`` and ``z``."""
    source = ir.val("source", dtype=ir.DataType.FLOAT, shape=["batch", "sequence", columns])
    nodes = {name: ir.node("Identity", [source], name=name) for name in ("x", "z")}
    activations = {}
    for name, node in nodes.items():
        activations[name] = node.outputs[0]
        activations[name].name = name
        activations[name].type, activations[name].shape = source.type, source.shape
    graph = ir.Graph([source], [], nodes=list(nodes.values()), opset_imports={"": 23})
    for name, activation in matmuls.items():
        weight = initializer(graph, f"{name}.weight", np.zeros((columns, 32), np.float32))
        node = ir.node("MatMul", [activations[activation], weight], name=name)
        node.outputs[0].name = f"{name}/output_0"
        node.outputs[0].type = source.type
        graph.append(node)
        graph.outputs.append(node.outputs[0])
    return graph


def group(formats: dict[str, list[str]], permuted: bool = True) -> InputGroup:
    rng = np.random.default_rng(0)
    permutation = rng.permutation(192).astype(np.int32) if permuted else None
    linears = tuple(random_linear(rng, name, 32, 192, fmts, permutation) for name, fmts in formats.items())
    return InputGroup("group", permutation, linears)


def operators(graph: ir.Graph) -> list[str]:
    return [node.op_type for node in graph if node.op_type not in ("Identity", "Constant")]


def test_linears_share_one_permutation_and_equal_splits():
    graph = float_graph({"q": "x", "k": "x", "v": "x"})
    formats = {"q": ["b4", "b2", "b2"], "k": ["b3", "b1", "b1"], "v": ["b8"] * 3}
    swap_linears(graph, (group(formats),), {name: name for name in formats})
    kernels = ["MatMulB4", "MatMulB2", "Sum", "MatMulB3", "MatMulB1", "Sum", "MatMulB8"]
    assert operators(graph) == ["PermuteColumns", "Split", *kernels]
    assert [output.name for output in graph.outputs] == [f"{name}/output_0" for name in "qkv"]
    assert not [name for name in graph.initializers if name.endswith(".weight")]


def test_segments_whose_codes_a_kernel_reads_in_the_same_width_share_a_node():
    graph = float_graph({"k": "x", "v": "x"})
    formats = {"k": ["b4", "b3", "b2"], "v": ["b4", "b2", "b1"]}
    swap_linears(graph, (group(formats),), {name: name for name in formats})
    wanted = [["MatMulB4B3", "MatMulB2", "Sum"], ["MatMulB4", "MatMulB2B1", "Sum"]]
    assert operators(graph) == ["PermuteColumns", "Split", "Split", *wanted[0], *wanted[1]]


def test_head_keeps_the_last_position_and_more_where_asked():
    graph = float_graph({"logits": "x"})
    graph.outputs[0].name = "logits"
    graph.outputs[0].shape = ir.Shape(["batch", "sequence", 32])
    weight = np.random.default_rng(0).standard_normal((192, 32)).astype(np.float32)
    graph.initializers["logits.weight"].const_value = ir.tensor(weight, name="logits.weight")
    keep_last_logits(graph, "logits")
    model = ir.Model(graph, ir_version=11)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal((2, 5, 192)).astype(np.float32)
    (last,) = session.run(None, {"source": x})
    (behind,) = session.run(None, {"source": x, FIRST_LOGIT: np.array([2])})
    assert last.shape == (2, 1, 32) and np.abs(last - x[:, -1:] @ weight).max() <= 1e-4
    assert behind.shape == (2, 3, 32) and np.abs(behind - x[:, 2:] @ weight).max() <= 1e-4


def test_graph_without_the_heads_node_is_refused():
    with pytest.raises(UnsupportedModelError, match="not the output of a node head"):
        keep_last_logits(float_graph({"q": "x"}), "head")


def test_natural_order_needs_no_permutation():
    graph = float_graph({"q": "x"})
    swap_linears(graph, (group({"q": ["b2"] * 3}, permuted=False),), {"q": "q"})
    assert operators(graph) == ["MatMulB2"]


@pytest.mark.parametrize(
    ("matmuls", "columns", "message"),
    [
        ({"q": "x", "k": "z"}, 192, "do not read the same activation"),
        ({"q": "x"}, 192, "no MatMul k"),
        ({"q": "x", "k": "x", "lora": "x"}, 192, "does not quantize: .*lora"),
        ({"q": "x", "k": "x"}, 128, "32 x 192"),
    ],
)
def test_graph_that_does_not_fit_the_checkpoint_is_refused(matmuls, columns, message):
    formats = {"q": ["b2"] * 3, "k": ["b2"] * 3}
    with pytest.raises(UnsupportedModelError, match=message):
        swap_linears(float_graph(matmuls, columns), (group(formats),), {"q": "q", "k": "k"})


def test_embedding_of_two_formats_is_concatenated():
    ids = ir.val("ids", dtype=ir.DataType.INT64, shape=["batch", "sequence"])
    graph = ir.Graph([ids], [], nodes=[], opset_imports={"": 23})
    weight = initializer(graph, "weight", np.zeros((32, 100), np.float32))
    gather = ir.node("Gather", [weight, ids], name="embed")
    gather.outputs[0].shape = ir.Shape(["batch", "sequence", 100])
    graph.append(gather)
    graph.outputs.append(gather.outputs[0])
    swap_embedding(graph, random_linear(np.random.default_rng(0), "token_embd", 32, 100, ["b8", "b4"], None), "embed")
    assert operators(graph) == ["EmbeddingB8", "EmbeddingB4", "Concat"]
    assert [node.attributes["K"].as_int() for node in graph if node.op_type != "Concat"] == [64, 36]
    assert "weight" not in graph.initializers


def test_nodes_are_named_as_the_builder_names_them():
    assert matmul_node("blk.12.ffn_up") == "/model/layers.12/mlp/up_proj/MatMul"
    assert layer_of("/model/layers.12/attn/q_rotary/RotaryEmbedding") == 12
    with pytest.raises(UnsupportedModelError, match=r"blk\.0\.ssm: .*no node"):
        matmul_node("blk.0.ssm")
    with pytest.raises(ValueError, match="not a node of a layer"):
        layer_of("/lm_head/MatMul")


def test_norm_of_the_standard_domain_is_the_standards():
    x, scale = ir.val("x"), ir.val("scale")
    nodes = [
        ir.node("SimplifiedLayerNormalization", [x, scale]),
        ir.node("SkipSimplifiedLayerNormalization", [x, x, scale], domain="com.microsoft"),
    ]
    graph = ir.Graph([x, scale], [], nodes=nodes)
    standardize_norms(graph)
    assert [node.op_type for node in graph] == ["RMSNormalization", "SkipSimplifiedLayerNormalization"]


def test_constants_get_their_true_shape():
    node = ir.node("Constant", [], {"value": ir.tensor(np.array([1], np.int64))})
    node.outputs[0].shape = ir.Shape([])
    declare_constant_shapes(ir.Graph([], [], nodes=[node]))
    assert node.outputs[0].shape == (1,)


def test_external_data_is_aligned_and_equal_arrays_are_stored_once(tmp_path):
    graph = ir.Graph([], [], nodes=[])
    arrays = {"a": np.arange(5, dtype=np.uint8), "b": np.arange(7, dtype=np.float32), "c": np.arange(5, dtype=np.uint8)}
    for name, array in arrays.items():
        initializer(graph, name, array)
    externalize(graph, tmp_path / "weights")
    tensors = {name: value.const_value for name, value in graph.initializers.items()}
    assert [tensors[name].offset for name in "abc"] == [0, 64, 0]
    assert all(np.array_equal(tensors[name].numpy(), array) for name, array in arrays.items())
    assert (tmp_path / "weights").stat().st_size == 64 + 28
