"""What is written into a container comes out of it. Trusted: the model in memory."""

import json

import gguf
import numpy as np
import pytest
from golden_package import CHAT_TEMPLATE, make_container, make_golden, make_tokenizer_folder
from synthetic import random_llama

from mgptq_runtime.container import read_container
from mgptq_runtime.errors import BadInputError, ContainerError
from mgptq_runtime.quantized_model import InputGroup, QuantizedLinear, QuantizedModel, Segment

ODD = {"hidden": 72, "intermediate": 100, "heads": 6, "kv_heads": 3, "vocabulary": 403, "tied": False}


@pytest.mark.parametrize("shape", [{}, ODD])
def test_every_weight_survives_bit_for_bit(tmp_path, shape):
    model = random_llama(**shape)
    read = read_container(make_container(tmp_path, model)).model
    pairs = [*zip(model.linears(), read.linears(), strict=True), (model.embedding, read.embedding)]
    if model.head is not None:
        pairs.append((model.head, read.head))
    for written, found in pairs:
        assert written.name == found.name
        assert np.array_equal(written.dequantize().view(np.uint32), found.dequantize().view(np.uint32))
    assert (read.head is None) == (model.head is None)
    assert read.bits_stored == model.bits_stored
    assert dict(read.hyperparameters) == dict(model.hyperparameters)
    assert read.tensors.keys() == model.tensors.keys()
    assert all(np.array_equal(read.tensors[name], model.tensors[name]) for name in model.tensors)


def test_golden_vectors_recipe_and_name_survive(tmp_path):
    model = random_llama()
    golden = make_golden(model)
    container = read_container(make_container(tmp_path, model, golden=golden))
    assert (container.name, container.recipe) == ("tiny", {"bits": 2.5})
    for name, array in vars(golden).items():
        assert np.array_equal(getattr(container.golden, name), array)


def test_optional_biases_survive(tmp_path):
    model = random_llama()
    bias = np.arange(128, dtype=np.float32)
    model = QuantizedModel(**(vars(model) | {"tensors": {**model.tensors, "blk.1.attn_q_bias": bias}}))
    assert np.array_equal(read_container(make_container(tmp_path, model)).model.tensors["blk.1.attn_q_bias"], bias)


def test_equal_inputs_give_equal_bytes(tmp_path):
    first = make_container(tmp_path, random_llama()).read_bytes()
    assert make_container(tmp_path, random_llama()).read_bytes() == first


def test_stock_gguf_reader_lists_the_file(tmp_path):
    path = make_container(tmp_path, random_llama(), tokenizer_folder=make_tokenizer_folder(tmp_path / "tokenizer"))
    reader = gguf.GGUFReader(path)
    assert reader.get_field("general.architecture").contents() == "mgptq"
    assert reader.get_field("tokenizer.chat_template").contents() == CHAT_TEMPLATE
    assert len(reader.get_field("tokenizer.ggml.tokens").contents()) == 512
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"I8", "I16", "I32", "F32"}


def test_what_a_folder_says_about_text_is_carried(tmp_path):
    folder = make_tokenizer_folder(tmp_path / "tokenizer")
    data = read_container(make_container(tmp_path, random_llama(), tokenizer_folder=folder)).tokenizer
    assert data.chat_template == CHAT_TEMPLATE
    assert data.generation_config["eos_token_id"] == [1]
    assert data.tokenizer_config["bos_token"] == "<|start|>"
    assert json.loads(data.tokenizer_json) == json.loads((folder / "tokenizer.json").read_text())


def test_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    folder = make_tokenizer_folder(tmp_path / "tokenizer", vocabulary=600)
    with pytest.raises(BadInputError, match="the embedding has 300 rows"):
        make_container(tmp_path, random_llama(vocabulary=300), tokenizer_folder=folder)
    assert not (tmp_path / "model.mgptq.gguf").exists()


def _with_infinite_scale(model: QuantizedModel) -> QuantizedModel:
    group = model.groups[1]
    (linear,) = group.linears
    data = linear.segments[0].data.copy()
    data[3, :2] = (0x00, 0x7C)
    segments = (Segment(linear.segments[0].format, data), *linear.segments[1:])
    broken = QuantizedLinear(linear.name, linear.rows, linear.columns, segments, linear.permutation)
    groups = (model.groups[0], InputGroup(group.name, group.permutation, (broken,)), *model.groups[2:])
    return QuantizedModel(**(vars(model) | {"groups": groups}))


def test_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path):
    model = random_llama()
    old = make_container(tmp_path, model).read_bytes()
    with pytest.raises(ContainerError, match=r"blk\.0\.attn_output\.segment\.0.*NaN or infinity"):
        make_container(tmp_path, _with_infinite_scale(model), golden=make_golden(model))
    assert (tmp_path / "model.mgptq.gguf").read_bytes() == old
    assert {path.name for path in tmp_path.iterdir()} == {"quantized", "model.mgptq.gguf"}


def test_missing_output_folder_is_a_typed_error(tmp_path):
    from golden_package import write_container

    from mgptq_export.checkpoint import read_checkpoint

    model = random_llama()
    make_container(tmp_path, model)
    with pytest.raises(BadInputError, match="cannot be written"):
        write_container(read_checkpoint(tmp_path / "quantized"), make_golden(model), tmp_path / "no" / "x.gguf")
