"""A container that breaks a rule is refused with a typed error, before a weight is used."""

import json
import math
import re
import struct

import gguf
import numpy as np
import pytest
from golden_package import make_container, make_golden, make_tokenizer_folder, sign
from synthetic import random_llama

from mgptq_runtime.container import read_container
from mgptq_runtime.errors import ContainerError, MgptqError, UnsupportedModelError
from mgptq_runtime.golden import GoldenVectors

TINY = {"layers": 1, "hidden": 64, "intermediate": 64, "heads": 2, "kv_heads": 1, "vocabulary": 32}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("tiny")
    model = random_llama(**TINY)
    return make_container(folder, model, golden=make_golden(model, prompts=1, length=3, k=2)).read_bytes()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.gguf"


def test_trailing_bytes_are_refused(tiny, path):
    path.write_bytes(tiny + bytes(32))
    with pytest.raises(ContainerError, match="32 bytes follow the last tensor"):
        read_container(path)


@pytest.mark.parametrize("content", [b"", b"GGU", b"not a container at all", bytes(4096)])
def test_other_files_are_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(ContainerError, match="GGUF"):
        read_container(path)


def test_a_folder_and_a_missing_file_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none.gguf"):
        with pytest.raises(ContainerError, match="is not a file"):
            read_container(path)


def header(tensors: int = 0, keys: int = 0, *, magic: bytes = b"GGUF", version: int = 3) -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def entry(name: bytes, dimensions: list[int], tensor_type: int, offset: int) -> bytes:
    shape = struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
    return text(name) + shape + struct.pack("<IQ", tensor_type, offset)


HUGE = 2**64 - 1
UINT32, STRING, ARRAY, BOOL = 4, 8, 9, 7
IDENTITY = text(b"general.architecture") + struct.pack("<I", STRING) + text(b"mgptq")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(version=2), "version 2"),
        (header(version=3 << 24), "big endian"),
        (header(tensors=HUGE), "tensors, at most"),
        (header(keys=HUGE), "metadata keys, at most"),
        (header(keys=1) + struct.pack("<Q", HUGE), "at most 256"),
        (header(keys=1) + text(b"") + struct.pack("<II", UINT32, 1), "is empty"),
        (header(keys=2) + (text(b"a") + struct.pack("<II", UINT32, 1)) * 2, "a second 'a'"),
        (header(keys=1) + text(b"\xff") + struct.pack("<II", UINT32, 1), "not UTF-8"),
        (header(keys=1) + text(b"a") + struct.pack("<I", 13), "value type 13"),
        (header(keys=1) + text(b"a") + struct.pack("<IB", BOOL, 2), "bool of 2"),
        (header(keys=1) + text(b"a") + struct.pack("<IQ", STRING, 1 << 40), "at most 41943040"),
        (header(keys=1) + text(b"a") + struct.pack("<IQ", STRING, 100), "needs 100 bytes"),
        (header(keys=1) + text(b"a") + struct.pack("<IIQ", ARRAY, ARRAY, 1), "value type 9"),
        (header(keys=1) + text(b"a") + struct.pack("<IIQ", ARRAY, UINT32, HUGE), "needs"),
        (header(keys=1) + text(b"a") + struct.pack("<IIQ", ARRAY, STRING, 1 << 60), "needs"),
        (
            header(keys=2) + IDENTITY + text(b"general.alignment") + struct.pack("<II", UINT32, 64) + bytes(64),
            "general.alignment is 64",
        ),
        (header() + bytes(8), "general.architecture is missing"),
    ],
)
def test_broken_syntax_is_named(path, content, message):
    path.write_bytes(content)
    with pytest.raises(ContainerError, match=message):
        read_container(path)


def test_a_sound_gguf_file_of_another_architecture_gets_that_answer(path):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 18), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ContainerError, match=r"general\.architecture is 'llama'; only 'mgptq' containers run here"):
        read_container(path)


@pytest.mark.parametrize(
    ("entries", "data", "message"),
    [
        ([entry(b"", [1], 0, 0)], b"", "is empty"),
        ([entry(b"t", [1], 0, 0), entry(b"t", [1], 0, 32)], bytes(64), "a second 't'"),
        ([entry(b"t" * 64, [1], 0, 0)], b"", "at most 63"),
        ([entry(b"t", [], 0, 0)], b"", "0 dimensions"),
        ([entry(b"t", [1] * 5, 0, 0)], b"", "5 dimensions"),
        ([entry(b"t", [0], 0, 0)], b"", "shape"),
        ([entry(b"t", [1 << 63, 2], 0, 0)], b"", "shape"),
        ([entry(b"t", [60, 60, 60, 60], 0, 0)], bytes(64), "needs 51840000 bytes"),
        ([entry(b"t", [1], 2, 0)], b"", "type 2, allowed are"),
        ([entry(b"t", [1], 0, 32)], bytes(128), "offset 32"),
        ([entry(b"t", [1], 0, HUGE)], bytes(128), "it must be 0"),
        ([entry(b"t", [8], 0, 0), entry(b"u", [8], 0, 0)], bytes(128), "it must be 32"),
        ([entry(b"t", [1], 0, 0)], b"\1" * 128, "padding must be zero"),
        ([entry(b"t", [1], 0, 0)], b"", "it is cut"),
    ],
)
def test_a_broken_tensor_table_is_named(path, entries, data, message):
    path.write_bytes(header(tensors=len(entries), keys=1) + IDENTITY + b"".join(entries) + data)
    with pytest.raises(ContainerError, match=message):
        read_container(path)


class Rewriter:
    """Takes a sound container apart and writes it again with one thing wrong and a valid hash."""

    def __init__(self, path) -> None:
        self.path = path
        reader = gguf.GGUFReader(path)
        fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        self.keys = {name: (field.contents(), field.types[0], field.types[-1]) for name, field in fields.items()}
        del self.keys["general.architecture"]
        self.tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}

    def put(self, key: str, value, value_type: gguf.GGUFValueType) -> None:
        self.keys[key] = (value, value_type, value_type)

    def find(self, part: str) -> str:
        return next(name for name in self.tensors if part in name)

    def write(self) -> None:
        writer = gguf.GGUFWriter(None, "mgptq")
        for key, (value, value_type, element_type) in self.keys.items():
            is_array = value_type == gguf.GGUFValueType.ARRAY
            writer.add_key_value(key, value, value_type, element_type if is_array else None)
        for name, tensor in self.tensors.items():
            writer.add_tensor(name, tensor)
        writer.write_header_to_file(self.path)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        sign(self.path)


@pytest.fixture
def rewriter(tmp_path):
    model = random_llama(vocabulary=420)
    return Rewriter(make_container(tmp_path, model, tokenizer_folder=make_tokenizer_folder(tmp_path / "tokenizer")))


def refused(rewriter: Rewriter, message: str, error: type[MgptqError] = ContainerError) -> None:
    rewriter.write()
    with pytest.raises(error, match=message):
        read_container(rewriter.path)


def test_rewritten_without_a_change_it_is_accepted(rewriter):
    rewriter.write()
    assert read_container(rewriter.path).name == "tiny"


def test_missing_and_unexpected_tensors_are_refused(rewriter):
    removed = rewriter.tensors.pop("blk.1.ffn_norm")
    refused(rewriter, "tensor 'blk.1.ffn_norm' is missing")
    rewriter.tensors |= {"blk.1.ffn_norm": removed, "blk.2.ffn_norm": removed}
    refused(rewriter, "'blk.2.ffn_norm' is not part of a llama model")


def test_a_missing_segment_is_refused(rewriter):
    del rewriter.tensors[rewriter.find("attn_k.segment.0")]
    refused(rewriter, "columns left for segment 0")


def test_segments_wider_than_the_columns_are_refused(rewriter):
    name = rewriter.find("token_embd.segment.0.b4")
    rewriter.tensors[name] = np.concatenate([rewriter.tensors[name]] * 2, axis=1)
    refused(rewriter, "covers 256 columns, 128 are left")


def test_a_segment_in_two_formats_is_refused(rewriter):
    rewriter.tensors["token_embd.segment.0.b2"] = rewriter.tensors["token_embd.segment.0.b4"]
    refused(rewriter, "exactly one of")


def test_rows_that_are_no_whole_blocks_are_refused(rewriter):
    name = "token_embd.segment.0.b4"
    rewriter.tensors[name] = np.ascontiguousarray(rewriter.tensors[name][:, :-1])
    refused(rewriter, "a multiple of 34 bytes")


@pytest.mark.parametrize("scale", [math.inf, -math.inf, math.nan])
def test_scales_that_are_not_finite_are_refused(rewriter, scale):
    rewriter.tensors["token_embd.segment.0.b4"][5, 34:36] = np.array([scale], "<f2").view(np.int8)
    refused(rewriter, "has a scale that is NaN or infinity")


def test_a_byte_that_is_no_code_is_refused(rewriter):
    rewriter.tensors[rewriter.find(".b8")][0, 10] = -128
    refused(rewriter, "-128 is not a code")


def test_float_tensors_that_are_not_finite_are_refused(rewriter):
    rewriter.tensors["output_norm"][3] = np.nan
    refused(rewriter, "'output_norm'.*NaN")


def test_float_tensors_of_another_shape_or_type_are_refused(rewriter):
    norm = rewriter.tensors["output_norm"]
    rewriter.tensors["output_norm"] = norm[:-1]
    refused(rewriter, r"'output_norm' is F32 \[127\], it must be F32 \[128\]")
    rewriter.tensors["output_norm"] = norm.astype(np.int32)
    refused(rewriter, r"is I32 \[128\]")


@pytest.mark.parametrize("value", [-1, 5, 128])
def test_permutations_that_are_none_are_refused(rewriter, value):
    permutation = rewriter.tensors["blk.0.attn_qkv.permutation"]
    permutation[int(np.flatnonzero(permutation == 17)[0])] = value
    refused(rewriter, "'blk.0.attn_qkv.permutation'.*is not a permutation of 0 to 127")


def test_a_token_list_of_another_length_than_the_embedding_is_refused(rewriter):
    value, value_type, element_type = rewriter.keys["tokenizer.ggml.tokens"]
    rewriter.keys["tokenizer.ggml.tokens"] = (value[:-1], value_type, element_type)
    refused(rewriter, "tokenizer.ggml.tokens has 419 entries, the embedding has 420 rows")


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("vocab", 421, "model.vocab is 421, it must be a number from 0 to 420"),
        ("vocab", -1, "model.vocab is -1"),
        ("vocab", True, "model.vocab is true"),
        ("vocab", {"a": 0}, 'model.vocab is {"a":0}'),
        ("merges", 10**9, "model.merges is 1000000000, it must be a number from 0 to"),
        ("merges", None, "model.merges is null"),
    ],
)
def test_a_tokenizer_that_refers_to_tokens_that_are_not_listed_is_refused(rewriter, key, change, message):
    value, *types = rewriter.keys["mgptq.tokenizer_json"]
    tokenizer = json.loads(value)
    tokenizer["model"][key] = change
    rewriter.keys["mgptq.tokenizer_json"] = (json.dumps(tokenizer), *types)
    refused(rewriter, f"key 'mgptq.tokenizer_json' is not the rest of a tokenizer.json: {re.escape(message)}")


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "Expecting"), ("[]", "expected a JSON object"), ('{"model": 1}', "it has no object 'model'")],
)
def test_a_tokenizer_that_is_no_json_is_refused(rewriter, text, message):
    _, *types = rewriter.keys["mgptq.tokenizer_json"]
    rewriter.keys["mgptq.tokenizer_json"] = (text, *types)
    refused(rewriter, f"not the rest of a tokenizer.json: {message}")


def test_two_tokenizers_are_refused(rewriter):
    rewriter.keys["tokenizer.huggingface.json"] = rewriter.keys["mgptq.tokenizer_json"]
    refused(rewriter, "'mgptq.tokenizer_json' and 'tokenizer.huggingface.json' exclude each other")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llama.block_count", 4_000_000_000, "llama.block_count is 4000000000, allowed are 1 to 1024"),
        ("llama.block_count", 1024, "a model of 1024 layers has at least"),
        ("llama.block_count", 0, "allowed are"),
        ("llama.attention.head_count", 3, "must be a multiple"),
        ("llama.attention.key_length", 31, "must be even"),
        ("llama.vocab_size", 421, r"it must be \[421"),
        ("llama.sliding_window", 128, "llama.sliding_window is not known"),
        ("mgptq.format_version", 2, "mgptq.format_version is 2"),
        ("mgptq.shiny", 1, "'mgptq.shiny' is not known"),
    ],
)
def test_absurd_values_are_named(rewriter, key, value, message):
    rewriter.put(key, value, gguf.GGUFValueType.UINT32)
    refused(rewriter, message)


def test_values_of_another_type_are_named(rewriter):
    rewriter.put("llama.attention.layer_norm_rms_epsilon", "small", gguf.GGUFValueType.STRING)
    refused(rewriter, "layer_norm_rms_epsilon is 'small'")


def test_not_a_number_is_refused_as_a_hyperparameter(rewriter):
    rewriter.put("llama.rope.attention_factor", math.nan, gguf.GGUFValueType.FLOAT64)
    refused(rewriter, "rope.attention_factor is nan")


@pytest.mark.parametrize("value", ["[1]", '{"a": 1, "a": 2}', '{"a": NaN}', "[" * 100_000, "{"])
def test_broken_json_is_refused(rewriter, value):
    rewriter.put("mgptq.recipe", value, gguf.GGUFValueType.STRING)
    refused(rewriter, "'mgptq.recipe' is not a JSON object")


def test_a_missing_hyperparameter_is_named(rewriter):
    del rewriter.keys["llama.attention.head_count_kv"]
    refused(rewriter, "llama.attention.head_count_kv is missing")


def test_stored_bits_that_the_tensors_do_not_have_are_refused(rewriter):
    rewriter.put("mgptq.bits_stored", 2.0, gguf.GGUFValueType.FLOAT64)
    refused(rewriter, "mgptq.bits_stored is 2.0")


def test_an_unknown_family_lists_the_known_ones(rewriter):
    rewriter.put("mgptq.family", "mamba", gguf.GGUFValueType.STRING)
    refused(rewriter, "'mamba' is not supported; supported are: llama", UnsupportedModelError)


@pytest.mark.parametrize("name", list(vars(GoldenVectors)["__dataclass_fields__"]))
def test_golden_vectors_of_another_shape_are_refused(rewriter, name):
    tensor = rewriter.tensors[f"golden.{name}"]
    rewriter.tensors[f"golden.{name}"] = np.concatenate([tensor, tensor])
    refused(rewriter, "golden vectors")


def test_golden_tokens_outside_the_vocabulary_are_refused(rewriter):
    rewriter.tensors["golden.top_ids"][0, 0, 0] = 420
    refused(rewriter, "top_ids has values")
