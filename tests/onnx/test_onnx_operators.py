"""Each custom operator against the format's own NumPy code, which is trusted."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from mgptq_export.targets.onnx.operators import DOMAIN, EMBEDDING, HEAD, MATMUL, OPSET, PAIRS, PERMUTE, operators
from mgptq_export.targets.onnx.storage import from_initializers, to_initializers
from mgptq_runtime.formats import FORMATS, padded_columns

ROWS = 40
COLUMNS = [64, 80, 320]


def random_segment(fmt: str, columns: int) -> np.ndarray:
    """Packed rows; the padding holds random codes too."""
    rng = np.random.default_rng(columns)
    shape = (ROWS, padded_columns(columns))
    codes = rng.integers(0, FORMATS[fmt].levels, shape).astype(np.uint8)
    scales = rng.standard_normal((ROWS, shape[1] // 64)).astype(np.float16)
    return FORMATS[fmt].pack(codes, scales)


def session(
    operator: str,
    accuracy_level: int,
    inputs: dict,
    initializers: dict,
    attributes: dict,
    output_shape: list,
    path: Path,
) -> ort.InferenceSession:
    """A graph of one operator; the optimized graph is written to ``path``."""
    nodes = [helper.make_node(operator, [*inputs, *initializers], ["y"], domain=DOMAIN, **attributes)]
    graph = helper.make_graph(
        nodes,
        operator,
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, output_shape)],
        [numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )
    opsets = {"": OPSET, "com.microsoft": 1, DOMAIN: 1}
    model = helper.make_model(
        graph,
        functions=[ir.to_proto(function) for function in operators(accuracy_level)],
        opset_imports=[helper.make_opsetid(domain, version) for domain, version in opsets.items()],
        ir_version=11,
    )
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = str(path)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def matmul_session(fmt: str, columns: int, accuracy_level: int, path: Path) -> ort.InferenceSession:
    codes, scales = to_initializers(fmt, random_segment(fmt, columns))
    return session(
        MATMUL[(fmt,)],
        accuracy_level,
        {"a": (TensorProto.FLOAT, ["m", columns])},
        {"codes": codes, "scales": scales},
        {"K": columns, "N": ROWS},
        ["m", ROWS],
        path,
    )


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_storage_takes_the_containers_bytes_and_gives_them_back(fmt, columns):
    data = random_segment(fmt, columns)
    codes, scales = to_initializers(fmt, data)
    assert codes.nbytes + scales.nbytes == data.nbytes
    assert codes.shape == (ROWS, padded_columns(columns) // 64, FORMATS[fmt].code_bytes)
    assert np.array_equal(from_initializers(fmt, codes, scales), data)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_exact_operator_times_identity_gives_the_weights_bit_for_bit(fmt, columns, tmp_path):
    weights = FORMATS[fmt].dequantize(random_segment(fmt, columns))[:, :columns]
    (y,) = matmul_session(fmt, columns, 0, tmp_path / "o.onnx").run(None, {"a": np.eye(columns, dtype=np.float32)})
    assert np.array_equal(y, weights.T)


def emulate_int8(activations: np.ndarray) -> np.ndarray:
    """What the fast kernels see: int8 activations, one scale per block of 64 columns."""
    columns = activations.shape[1]
    padded = np.zeros((len(activations), padded_columns(columns)), np.float32)
    padded[:, :columns] = activations
    blocks = padded.reshape(len(activations), -1, 64)
    scales = np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(127)
    return (np.round(blocks / scales) * scales).reshape(len(activations), -1)[:, :columns]


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_fast_operator_rounds_the_activations_of_low_bit_formats_and_nothing_else(fmt, columns, rows, tmp_path):
    weights = FORMATS[fmt].dequantize(random_segment(fmt, columns))[:, :columns]
    a = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)
    (y,) = matmul_session(fmt, columns, 4, tmp_path / "o.onnx").run(None, {"a": a})
    expected = (emulate_int8(a) if fmt in ("b1", "b2") else a) @ weights.T
    # A rounding tie may fall the other way, which moves a result by one step of one activation.
    assert np.abs(y - expected).max() <= 1e-4 * np.abs(expected).max() + np.abs(weights).max() * np.abs(a).max() / 127
    assert np.median(np.abs(y - expected)) <= 1e-5 * np.abs(expected).max()


def head_session(fmt: str, columns: int, accuracy_level: int, path: Path) -> ort.InferenceSession:
    codes, scales = to_initializers(fmt, random_segment(fmt, columns))
    shape = ["batch", "sequence", columns]
    inputs, stored = {"a": (TensorProto.FLOAT, shape)}, {"codes": codes, "scales": scales}
    output = ["batch", "sequence", ROWS]
    return session(HEAD[(fmt,)], accuracy_level, inputs, stored, {"K": columns, "N": ROWS}, output, path)


@pytest.mark.parametrize("accuracy_level", [0, 4])
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_head_is_precise_at_either_level(fmt, columns, accuracy_level, tmp_path):
    weights = FORMATS[fmt].dequantize(random_segment(fmt, columns))[:, :columns]
    a = np.random.default_rng(0).standard_normal((2, 3, columns)).astype(np.float32)
    a[0, 0, :64], a[0, 0, 0] = 0, 1000  # a block of zeros but for an outlier, and one of zeros
    a[1, 1] = 0
    (y,) = head_session(fmt, columns, accuracy_level, tmp_path / "o.onnx").run(None, {"a": a})
    error = np.abs(y - a @ weights.T)
    # Of what an int8 part leaves over, half a step of 1/127, the second part holds all but half a step of 1/127 of it.
    bound = np.abs(a).max(axis=-1, keepdims=True) / 254**2 * np.abs(weights).sum(axis=-1)
    assert (error <= 1e-5 * np.abs(a @ weights.T).max() + bound).all()


@pytest.mark.parametrize("fmt", FORMATS)
def test_head_lets_no_nan_pass_for_a_number(fmt, tmp_path):
    a = np.ones((1, 2, 80), np.float32)
    a[0, 1, 70] = np.nan
    (y,) = head_session(fmt, 80, 4, tmp_path / "o.onnx").run(None, {"a": a})
    assert np.isfinite(y[0, 0]).all() and not np.isfinite(y[0, 1]).any()


@pytest.mark.parametrize("accuracy_level", [0, 4])
@pytest.mark.parametrize("formats", PAIRS)
def test_two_formats_in_one_node_are_the_sum_of_both(formats, accuracy_level, tmp_path):
    widths = (128, 80)
    data = [random_segment(fmt, width) for fmt, width in zip(formats, widths, strict=True)]
    stored = [array for fmt, part in zip(formats, data, strict=True) for array in to_initializers(fmt, part)]
    names = ["codes", "scales", "codes2", "scales2"]
    pair = session(
        MATMUL[formats],
        accuracy_level,
        {"a": (TensorProto.FLOAT, ["m", 208])},
        dict(zip(names, stored, strict=True)),
        {"K": 208, "N": ROWS},
        ["m", ROWS],
        tmp_path / "o.onnx",
    )
    weights = np.concatenate([FORMATS[f].dequantize(part) for f, part in zip(formats, data, strict=True)], axis=1)
    if accuracy_level == 0:
        (y,) = pair.run(None, {"a": np.eye(208, dtype=np.float32)})
        assert np.array_equal(y, weights[:, :208].T)
    operators_left = [node.op_type for node in onnx.load(tmp_path / "o.onnx").graph.node]
    assert operators_left == ["MatMulNBits"]


@pytest.mark.parametrize("accuracy_level", [0, 4])
@pytest.mark.parametrize("fmt", FORMATS)
def test_operator_folds_to_one_low_bit_kernel(fmt, accuracy_level, tmp_path):
    matmul_session(fmt, 320, accuracy_level, tmp_path / "o.onnx")
    graph = onnx.load(tmp_path / "o.onnx").graph
    assert [node.op_type for node in graph.node] == ["MatMulNBits"]
    widest = {"b1": 2, "b2": 2, "b3": 4, "b4": 4, "b8": 8}[fmt]
    sizes = {TensorProto.UINT8: ROWS * 320 * widest // 8, TensorProto.FLOAT: ROWS * 5 * 4}
    assert {i.data_type: len(numpy_helper.to_array(i).tobytes()) for i in graph.initializer} == sizes


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_embedding_gathers_the_weights_bit_for_bit(fmt, columns, tmp_path):
    data = random_segment(fmt, columns)
    codes, scales = to_initializers(fmt, data)
    ids = {"ids": (TensorProto.INT64, ["batch", "sequence"])}
    initializers = {"codes": codes, "scales": scales}
    embed = session(
        EMBEDDING[(fmt,)], 4, ids, initializers, {"K": columns}, ["batch", "sequence", columns], tmp_path / "o.onnx"
    )
    token_ids = np.random.default_rng(0).integers(0, ROWS, (2, 9))
    (y,) = embed.run(None, {"ids": token_ids})
    assert np.array_equal(y, FORMATS[fmt].dequantize(data)[token_ids][..., :columns])


def test_permutation_takes_columns_in_storage_order(tmp_path):
    order = np.random.default_rng(0).permutation(80).astype(np.uint16)
    shape = ["batch", "sequence", 80]
    permute = session(PERMUTE, 4, {"x": (TensorProto.FLOAT, shape)}, {"order": order}, {}, shape, tmp_path / "o.onnx")
    x = np.random.default_rng(1).standard_normal((2, 3, 80)).astype(np.float32)
    assert np.array_equal(permute.run(None, {"x": x})[0], x[..., order])
