"""An ONNX package from a stranger: what is wrong with it is found before ONNX Runtime sees it."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from golden_package import make_golden, write_manifest
from llama_oracle import llama_config
from synthetic import random_llama

from mgptq_export.checkpoint import write_checkpoint
from mgptq_export.targets.onnx import export_onnx
from mgptq_runtime.backends import onnx_backend
from mgptq_runtime.backends.onnx_backend import OnnxBackend
from mgptq_runtime.errors import PackageError
from mgptq_runtime.onnx_file import validate_onnx
from mgptq_runtime.package import open_package

WEIGHTS = "model.onnx.data"
TINY = {"layers": 1, "hidden": 64, "intermediate": 64, "heads": 2, "kv_heads": 1, "vocabulary": 32}


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    model = random_llama(**TINY)
    config = llama_config(model)
    checkpoint = write_checkpoint(
        folder / "quantized", model, name="tiny", config=config, recipe={}, tokenizer_folder=folder
    )
    export_onnx(checkpoint, make_golden(model, prompts=1, length=3, k=2), folder / "onnx")
    return folder / "onnx"


@pytest.fixture
def package(sound, tmp_path) -> Path:
    """A sound package with nothing but an ONNX folder, copied byte by byte."""
    (tmp_path / "onnx").mkdir()
    for file in sound.iterdir():
        (tmp_path / "onnx" / file.name).write_bytes(file.read_bytes())
    list_files(tmp_path)
    return tmp_path


def list_files(package: Path) -> None:
    write_manifest(package, sorted(f"onnx/{path.name}" for path in (package / "onnx").iterdir()))


def load(package: Path) -> OnnxBackend:
    return open_package(package).backend("onnx", threads=1)


def refused(sound: Path, change: Callable[[onnx.ModelProto], object], message: str) -> None:
    """The changed model, every hash being right, is refused; and so it would be alone."""
    model = onnx.load(sound / "model.onnx", load_external_data=False)
    change(model)
    size = (sound / WEIGHTS).stat().st_size
    with pytest.raises(ValueError, match=message):
        validate_onnx(model.SerializeToString(), WEIGHTS, size)


def first_weight(model: onnx.ModelProto) -> onnx.TensorProto:
    """The codes of a matrix."""
    return next(tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.UINT8)


def matmul(model: onnx.ModelProto) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type.startswith("MatMulB"))


def test_a_sound_package_computes(package):
    backend = load(package)
    assert backend.forward(np.array([[1, 2, 3]]), backend.new_cache()).shape == (1, 3, 32)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("location", "/etc/passwd", "lies in '/etc/passwd'; all weights must lie in 'model.onnx.data'"),
        ("location", "../model.onnx.data", "all weights must lie in"),
        ("location", "x/../model.onnx.data", "all weights must lie in"),
        ("location", "other.data", "all weights must lie in"),
        ("location", "", "all weights must lie in"),
        ("offset", "-64", "must be numbers of 0 or more"),
        ("offset", "1e3", "must be numbers of 0 or more"),
        ("offset", "9" * 19, "which has [0-9]+ bytes"),
        ("length", "1", "has 1 bytes, its shape and type need"),
        ("length", "9" * 30, "must be numbers of 0 or more"),
    ],
)
def test_external_data_outside_their_place_are_refused(sound, key, value, message):
    def change(model: onnx.ModelProto) -> None:
        next(entry for entry in first_weight(model).external_data if entry.key == key).value = value

    refused(sound, change, message)


def test_a_key_of_external_data_that_is_there_twice_is_refused(sound):
    refused(sound, lambda model: first_weight(model).external_data.add(key="location", value=WEIGHTS), "keys twice")


@pytest.mark.parametrize("dimension", [0, 2**40, 2**63 - 1, -1])
def test_shapes_that_the_bytes_do_not_fill_are_refused(sound, dimension):
    def change(model: onnx.ModelProto) -> None:
        first_weight(model).dims[0] = dimension

    refused(sound, change, "its shape and type need")


def test_element_types_that_packages_do_not_have_are_refused(sound):
    def change(model: onnx.ModelProto) -> None:
        first_weight(model).data_type = onnx.TensorProto.STRING

    refused(sound, change, "element type 8, allowed are")


def test_tensors_with_one_name_and_with_none_are_refused(sound):
    def double(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(first_weight(model))

    def unname(model: onnx.ModelProto) -> None:
        first_weight(model).name = ""

    refused(sound, double, "a second")
    refused(sound, unname, "is empty")


def test_few_bytes_that_pass_for_many_tensors_are_refused(sound):
    def change(model: onnx.ModelProto) -> None:
        embedding = max(model.graph.initializer, key=lambda tensor: int(np.prod(tensor.dims)))
        for i in range(20_000):
            copy = model.graph.initializer.add()
            copy.CopyFrom(embedding)
            copy.name = f"copy{i}"

    refused(sound, change, "share [0-9]+ bytes of weights")


def test_weights_inside_the_graph_must_fill_their_shape(sound):
    def change(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer.add(name="new", data_type=onnx.TensorProto.FLOAT, dims=[1 << 20])
        tensor.raw_data = b"abcd"

    refused(sound, change, "holds 4 bytes")


def test_constants_must_not_lie_in_files(sound):
    def change(model: onnx.ModelProto) -> None:
        node = next(n for n in model.graph.node for a in n.attribute if n.op_type == "Constant" and a.HasField("t"))
        node.attribute[0].t.data_location = onnx.TensorProto.EXTERNAL
        node.attribute[0].t.external_data.add(key="location", value="/etc/passwd")

    refused(sound, change, "lies in another file")


@pytest.mark.parametrize("operator", ["Loop", "If", "Scan", "ConstantOfShape", "Expand", "Tile", "MatMulB9"])
def test_operators_that_packages_do_not_have_are_refused(sound, operator):
    def change(model: onnx.ModelProto) -> None:
        next(node for node in model.graph.node if node.op_type == "Mul").op_type = operator

    refused(sound, change, f"operator '{operator}' of domain '' is no part of a package; known are: Add, Cast")


def test_graphs_in_attributes_are_refused(sound):
    def change(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == "Mul")
        node.attribute.add(name="body", type=onnx.AttributeProto.GRAPH, g=onnx.GraphProto(name="inner"))

    refused(sound, change, "holds a graph")


def test_functions_that_are_not_ours_are_refused(sound):
    def rename(model: onnx.ModelProto) -> None:
        model.functions[0].name = "MatMulB7"

    def recurse(model: onnx.ModelProto) -> None:
        model.functions[0].node[0].op_type = model.functions[0].name
        model.functions[0].node[0].domain = "ai.mgptq"

    def double(model: onnx.ModelProto) -> None:
        model.functions.append(model.functions[0])

    refused(sound, rename, "function 'MatMulB7' of domain 'ai.mgptq' is no part of a package")
    refused(sound, recurse, "is no part of a package")
    refused(sound, double, "a function is there twice")


@pytest.mark.parametrize(("name", "value"), [("bits", 8), ("bits", 3), ("block_size", 32), ("block_size", 2**30)])
def test_kernels_of_another_format_are_refused(sound, name, value):
    def change(model: onnx.ModelProto) -> None:
        function = next(function for function in model.functions if function.name in ("MatMulB2", "MatMulB4"))
        kernel = next(node for node in function.node if node.domain == "com.microsoft")
        next(attribute for attribute in kernel.attribute if attribute.name == name).i = value

    refused(sound, change, r"computes with .*, it must be \[\('MatMulNBits', ")


@pytest.mark.parametrize(("name", "value"), [("K", 0), ("K", 65), ("K", 2**30), ("N", 63), ("N", -1), ("N", 2**30)])
def test_attributes_of_low_bit_nodes_must_agree_with_their_tensors(sound, name, value):
    def change(model: onnx.ModelProto) -> None:
        next(attribute for attribute in matmul(model).attribute if attribute.name == name).i = value

    refused(sound, change, r"node .* \(MatMulB[1-8]\) has codes \[.*its attributes .* need uint8")


@pytest.mark.parametrize("value", [0, -1, 513, 1 << 40])
@pytest.mark.parametrize("name", ["num_heads", "kv_num_heads"])
def test_numbers_of_heads_that_would_end_onnx_runtime_are_refused(sound, name, value):
    def change(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == "GroupQueryAttention")
        next(attribute for attribute in node.attribute if attribute.name == name).i = value

    refused(sound, change, f"attribute '{name}' is {value}, allowed (are 1 to 512|is at most 2147483647)")


def test_splits_into_other_outputs_than_they_say_are_refused(sound):
    def change(model: onnx.ModelProto) -> None:
        node = model.graph.node.add(op_type="Split", input=["input_ids"], output=["first", "second"])
        node.attribute.add(name="num_outputs", type=onnx.AttributeProto.INT, i=1)

    refused(sound, change, "has 2 outputs, attribute 'num_outputs' must say so")


def test_missing_inputs_are_refused(sound):
    def change(model: onnx.ModelProto) -> None:
        next(node for node in model.graph.node if node.op_type == "Mul").input[0] = ""

    refused(sound, change, "lacks an input, which only GroupQueryAttention may")


def test_low_bit_nodes_read_tensors_of_the_file(sound):
    def change(model: onnx.ModelProto) -> None:
        matmul(model).input[1] = "input_ids"

    refused(sound, change, "must be tensors of the file")


def test_training_graphs_sparse_tensors_and_empty_models_are_refused(sound):
    refused(sound, lambda model: model.training_info.add(), "training graphs or sparse tensors")
    refused(sound, lambda model: model.graph.sparse_initializer.add(), "training graphs or sparse tensors")
    refused(sound, lambda model: model.Clear(), "no graph")


def test_two_graphs_in_one_file_are_refused(sound):
    """ONNX Runtime would merge them."""
    model = (sound / "model.onnx").read_bytes()
    with pytest.raises(ValueError, match="field 7 is there 2 times"):
        validate_onnx(model + model, WEIGHTS, 1 << 30)


def test_a_model_cut_or_flipped_anywhere_is_valid_or_a_value_error(sound):
    """Behind the hash the rules alone must hold. Only what breaks a rule raises, and only ValueError."""
    model = (sound / "model.onnx").read_bytes()
    size = (sound / WEIGHTS).stat().st_size
    rng = np.random.default_rng(0)
    outcomes = {"valid": 0, "refused": 0}
    for position in range(0, len(model), 29):
        flipped = bytearray(model)
        flipped[position] ^= int(rng.integers(1, 256))
        for broken in (model[:position], bytes(flipped)):
            try:
                validate_onnx(broken, WEIGHTS, size)
                outcomes["valid"] += 1
            except ValueError:
                outcomes["refused"] += 1
    assert outcomes["refused"] > outcomes["valid"] > 0


@pytest.mark.parametrize("name", [WEIGHTS, "model.onnx", "genai_config.json"])
def test_links_are_refused(package, tmp_path_factory, name):
    path = package / "onnx" / name
    outside = tmp_path_factory.mktemp("outside") / name
    path.rename(outside)
    path.symlink_to(outside)
    with pytest.raises(PackageError, match=f"{name} is a link; a package holds its files themselves"):
        load(package)
    path.unlink()
    os.link(outside, path)
    with pytest.raises(PackageError, match=f"{name} is a hard link, 2 names of one file"):
        load(package)


def test_a_folder_that_is_a_link_is_refused(package, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "onnx"
    (package / "onnx").rename(outside)
    (package / "onnx").symlink_to(outside)
    with pytest.raises(PackageError, match="onnx is a link; a package holds its files themselves"):
        load(package)


def test_a_pipe_in_the_place_of_a_file_is_refused_without_waiting(package):
    path = package / "onnx" / WEIGHTS
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(PackageError, match="not a regular file"):
        load(package)


@pytest.mark.parametrize("name", [WEIGHTS, "model.onnx", "genai_config.json", "golden.npz"])
def test_a_changed_file_is_refused_with_both_hashes(package, name):
    path = package / "onnx" / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(PackageError, match=r" has SHA-256 [0-9a-f]{64}, the manifest says [0-9a-f]{64}"):
        opened = open_package(package)
        opened.golden(opened.backend("onnx"))


@pytest.mark.parametrize("in_place", [True, False])
def test_weights_swapped_after_they_were_hashed_are_not_used(package, monkeypatch, in_place):
    path = package / "onnx" / WEIGHTS
    other = bytes(255 - byte for byte in path.read_bytes())

    def session(*arguments, **options):
        if in_place:
            with path.open("r+b") as stream:
                stream.write(other)
        else:
            (package / "other").write_bytes(other)
            (package / "other").rename(path)
        return load_session(*arguments, **options)

    load_session = onnx_backend.ort.InferenceSession
    monkeypatch.setattr(onnx_backend.ort, "InferenceSession", session)
    with pytest.raises(PackageError, match="was changed while it was read"):
        load(package)


def test_a_graph_swapped_after_it_was_hashed_is_not_used(package, monkeypatch):
    path = package / "onnx" / "model.onnx"
    validate = onnx_backend.validate_onnx

    def swap_and_validate(*arguments):
        path.write_bytes(b"another graph")
        validate(*arguments)

    monkeypatch.setattr(onnx_backend, "validate_onnx", swap_and_validate)
    assert load(package).vocabulary_size == 32


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_hidden_layers", 10**9), ("head_size", 10**12), ("num_key_value_heads", 0), ("num_key_value_heads", True)],
)
def test_absurd_numbers_of_the_configuration_are_refused(package, key, value):
    path = package / "onnx" / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"]["decoder"][key] = value
    path.write_text(json.dumps(config))
    list_files(package)
    with pytest.raises(PackageError, match=r"must be an integer of 1 to [0-9]+, found"):
        load(package)


def test_a_cache_of_another_rank_is_refused(package):
    path = package / "onnx" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    value = next(value for value in model.graph.input if value.name == "past_key_values.0.key")
    del value.type.tensor_type.shape.dim[1:]
    path.write_bytes(model.SerializeToString())
    list_files(package)
    with pytest.raises(PackageError, match=r"model\.onnx.*(a cache is|cannot load it)"):
        load(package)
