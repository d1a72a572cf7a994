"""The written package: valid, compact, exact, deterministic, and complete or absent."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from mgptq_export.checkpoint import Checkpoint
from mgptq_export.targets.onnx import export_onnx, read_onnx_weights
from mgptq_export.targets.onnx.operators import MATMUL, PAIRS
from mgptq_runtime.errors import OutputExistsError, UnsupportedModelError
from mgptq_runtime.golden import read_golden
from mgptq_runtime.onnx_file import validate_onnx

GRAPHS = ["model.onnx", "model.exact.onnx"]


@pytest.mark.parametrize("name", GRAPHS)
def test_checker_passes_external_data_and_shape_inference_included(exported, name):
    onnx.checker.check_model(str(exported.folder / name), full_check=True)


def test_weights_are_the_checkpoints_bit_for_bit(exported):
    model, weights = exported.model, read_onnx_weights(exported.folder)
    linears = {linear.name: linear for linear in [*model.linears(), model.embedding]}
    linears["output"] = model.head or model.embedding
    assert weights.keys() == linears.keys()
    for name, linear in linears.items():
        assert np.array_equal(weights[name], linear.dequantize()), name


def test_file_holds_the_packed_bytes_and_a_tied_table_once(exported):
    model = exported.model
    packed = sum(linear.stored_bytes for linear in [*model.linears(), model.embedding])
    packed += model.head.stored_bytes if model.head else 0
    packed += sum(group.permutation_bytes for group in model.groups)
    tensors = sum(tensor.nbytes for tensor in model.tensors.values())
    initializers = onnx.load(exported.folder / "model.onnx", load_external_data=False).graph.initializer
    size = (exported.folder / "model.onnx.data").stat().st_size
    assert size <= packed + tensors + 64 * len(initializers)


@pytest.mark.parametrize("name", GRAPHS)
def test_loaded_graph_runs_low_bit_kernels_and_no_float_matmul(exported, name, tmp_path):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(exported.folder / name, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph
    operators = [node.op_type for node in graph.node]
    linears = [*exported.model.linears(), exported.model.head or exported.model.embedding]
    stored = onnx.load(exported.folder / name, load_external_data=False).graph.node
    assert operators.count("MatMulNBits") == sum(node.op_type.startswith(("MatMul", "Head")) for node in stored)
    assert len(linears) <= operators.count("MatMulNBits") < sum(len(linear.segments) for linear in linears)
    assert not {"MatMul", "Gemm", "DequantizeLinear", "BitShift"} & set(operators)
    smallest = min(linear.rows * linear.columns for linear in linears)
    floats = [i for i in graph.initializer if i.data_type == onnx.TensorProto.FLOAT]
    assert max(np.prod(i.dims) for i in floats) < smallest / 4


def test_codes_of_two_formats_must_be_where_their_operator_says(exported):
    model = onnx.load(exported.folder / "model.onnx", load_external_data=False)
    size = (exported.folder / "model.onnx.data").stat().st_size
    validate_onnx(model.SerializeToString(), "model.onnx.data", size)
    node = next(node for node in model.graph.node if node.op_type in {MATMUL[pair] for pair in PAIRS})
    codes, _, other_codes, _ = list(node.input[1:])
    node.input[1], node.input[3] = other_codes, codes
    with pytest.raises(ValueError, match=f"{node.op_type}.* has codes"):
        validate_onnx(model.SerializeToString(), "model.onnx.data", size)
    del node.input[3:]
    with pytest.raises(ValueError, match="4 behind the first must be tensors of the file"):
        validate_onnx(model.SerializeToString(), "model.onnx.data", size)


def test_same_checkpoint_gives_the_same_bytes(exported, golden, tmp_path):
    export_onnx(exported.checkpoint, golden, tmp_path / "again")

    def digests(folder):
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}

    assert digests(tmp_path / "again") == digests(exported.folder)


def test_folder_is_complete(exported, golden):
    config = json.loads((exported.folder / "genai_config.json").read_text())
    assert config["model"]["context_length"] == exported.model.hyperparameters["context_length"]
    assert (config["model"]["bos_token_id"], config["model"]["eos_token_id"]) == (1, 2)
    assert config["model"]["decoder"]["filename"] == "model.onnx"
    assert np.array_equal(read_golden(exported.folder / "golden.npz").token_ids, golden.token_ids)
    names = {path.name for path in exported.folder.iterdir()}
    assert names == {*GRAPHS, "model.onnx.data", "genai_config.json", "golden.npz"}


def test_existing_folder_is_refused(exported, golden):
    with pytest.raises(OutputExistsError, match="exists"):
        export_onnx(exported.checkpoint, golden, exported.folder)


def test_failure_leaves_nothing_behind_and_says_what_the_builder_said(exported, golden, tmp_path):
    config = {
        **exported.checkpoint.config,
        "architectures": ["LlamaForCausalLM"],
        "num_local_experts": 8,
    }
    broken = Checkpoint(exported.checkpoint.folder, exported.model, config)
    with pytest.raises(UnsupportedModelError, match="builder refused tiny"):
        export_onnx(broken, golden, tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


def test_head_size_that_no_kernel_takes_is_refused(exported, golden, tmp_path):
    config = {**exported.checkpoint.config, "head_dim": 20}
    broken = Checkpoint(exported.checkpoint.folder, exported.model, config)
    with pytest.raises(UnsupportedModelError, match="multiple of 8, this model has 20"):
        export_onnx(broken, golden, tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


def test_unknown_family_is_refused(exported, golden, tmp_path):
    model = replace(exported.model, family="mamba")
    with pytest.raises(UnsupportedModelError, match="the family 'mamba'; it has llama, "):
        export_onnx(Checkpoint(exported.checkpoint.folder, model, exported.checkpoint.config), golden, tmp_path / "o")
    assert list(tmp_path.iterdir()) == []


def test_configuration_of_another_size_is_refused(exported, golden, tmp_path):
    config = {**exported.checkpoint.config, "intermediate_size": 64}
    with pytest.raises(UnsupportedModelError, match=r"blk\.0\.ffn"):
        export_onnx(Checkpoint(exported.checkpoint.folder, exported.model, config), golden, tmp_path / "onnx")


def test_export_prints_nothing(exported, golden, tmp_path, capfd):
    export_onnx(exported.checkpoint, golden, tmp_path / "onnx")
    assert capfd.readouterr() == ("", "")
