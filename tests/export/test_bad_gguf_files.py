"""GGUF files that are cut, broken, hostile, or made by this program itself."""

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_models
from bad_files import (
    Break,
    Case,
    check_refused,
)
from gguf_model import write_gguf

from mgptq_export.models import load_shape, load_source
from mgptq_export.models.gguf_file import GgufModel, read_gguf_file
from mgptq_export.models.gguf_tokenizer import write_gguf_tokenizer
from mgptq_runtime.errors import BadInputError, UnsupportedModelError


@pytest.fixture(scope="module")
def sound(odd_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "sound.gguf"
    write_gguf(path, tiny_models.make_model("llama", tie_word_embeddings=False), odd_model)
    return path


@pytest.fixture
def file(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(sound, tmp_path / "a.gguf"))


def patched(offset_of: bytes, behind: int, value: bytes) -> Break:
    """Other bytes at a distance behind the end of a text."""

    def patch(path: Path) -> None:
        data = bytearray(path.read_bytes())
        at = data.index(offset_of) + len(offset_of) + behind
        data[at : at + len(value)] = value
        path.write_bytes(data)

    return patch


def at(offset: int, value: bytes) -> Break:
    return lambda path: path.write_bytes(path.read_bytes()[:offset] + value + path.read_bytes()[offset + len(value) :])


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def endless_array(path: Path) -> None:
    """More bytes than any file has: gguf-py's own reader would count them one by one."""
    path.write_bytes(b"GGUF" + u32(3) + u64(0) + u64(1) + u64(1) + b"a" + u32(9) + u32(0) + u64(1 << 60))


def nested_arrays(path: Path) -> None:
    path.write_bytes(b"GGUF" + u32(3) + u64(0) + u64(1) + u64(1) + b"a" + (u32(9) + u32(9) + u64(1)) * 10_000)


def rewritten(add: Callable[[gguf.GGUFWriter], object]) -> Break:
    """A file with what ``add`` writes, and nothing else."""

    def write_it(path: Path) -> None:
        writer = gguf.GGUFWriter(path, "llama")
        add(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()

    return write_it


EMBEDDING = b"token_embd.weight"
SHAPE, TYPE, OFFSET = 4, 20, 24  # of a tensor of two dimensions, behind its name
GGUF_CASES: dict[str, Case] = {
    "not GGUF": (at(0, b"GGML"), BadInputError, "is no model: not a readable GGUF file, which starts with b'GGUF'"),
    "empty": (lambda path: path.write_bytes(b""), BadInputError, "not a readable GGUF file"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-1000]), BadInputError, "the file at .*; it is cut"),
    "big endian": (at(4, b"\0\0\0\3"), BadInputError, "supported are 2 and 3, little endian"),
    "endless table": (at(8, u64(1 << 62)), BadInputError, "tensors, at most 65536"),
    "endless metadata": (at(16, u64(1 << 62)), BadInputError, "metadata keys, at most 4096"),
    "endless array": (endless_array, BadInputError, "needs 1152921504606846976 bytes"),
    "nested arrays": (nested_arrays, BadInputError, "flat arrays"),
    "endless tensor": (patched(EMBEDDING, SHAPE, u64(1 << 40)), BadInputError, "the file at .*; it is cut"),
    "tensor of no size": (patched(EMBEDDING, SHAPE, u64(0)), BadInputError, "'token_embd.weight' has shape"),
    "rows that are no blocks": (patched(EMBEDDING, TYPE, u32(12)), BadInputError, "rows must be multiples of 256"),
    "unknown type": (patched(EMBEDDING, TYPE, u32(999)), UnsupportedModelError, "cannot read .999."),
    "integers": (patched(EMBEDDING, TYPE, u32(26)), UnsupportedModelError, "token_embd.weight: type I32"),
    "overlapping tensors": (patched(b"blk.0.attn_k.weight", OFFSET, u64(0)), BadInputError, "inside another one"),
    "tensor in a crooked place": (patched(EMBEDDING, OFFSET, u64(1)), BadInputError, "has offset 1: .*aligned"),
    "parts, counted in words": (
        rewritten(lambda writer: writer.add_string("split.count", "many")),
        BadInputError,
        "one of many parts",
    ),
    "our file for llama.cpp": (
        rewritten(lambda writer: writer.add_string("mgptq.recipe", "{}")),
        BadInputError,
        "quantized already, by this program; start from the original model",
    ),
}


@pytest.mark.parametrize("name", GGUF_CASES)
def test_bad_gguf_files_are_refused(name: str, file: Path) -> None:
    check_refused(GGUF_CASES, name, file, load_source)


@pytest.mark.parametrize(("target", "bits"), [("container", 4), ("llama.cpp", 3.9375)])
def test_what_this_program_made_is_no_source(
    target: str, bits: float, even_model: Path, main: Any, tmp_path: Path
) -> None:
    quick = ("--samples", 2, "--sequence-length", 16, "--allocator", "uniform", "--recovery-steps", 0)
    code, _, err = main("run", even_model, "-o", tmp_path / "out", "--targets", target, "--bits", bits, *quick)
    assert code == 0, err
    (path,) = (tmp_path / "out").rglob("*.gguf")
    with pytest.raises(BadInputError, match="quantized already, by this program"):
        load_shape(str(path))


def test_a_quantized_gguf_file_is_taken_with_a_warning(
    odd_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_models.make_model("llama", intermediate_size=224)
    write_gguf(tmp_path / "a.gguf", model, odd_model, matrix_type=gguf.GGMLQuantizationType.Q8_0)
    load_shape(str(tmp_path / "a.gguf"))
    assert "is quantized to Q8_0" in caplog.text


def with_rotary_factors(count: int, folder: Path, path: Path) -> str:
    """A file with factors that are all one, which means that no frequency is scaled."""
    write_gguf(path, tiny_models.make_model("llama"), folder, tensors={"rope_freqs.weight": np.ones(count)})
    return str(path)


def test_one_rotary_factor_for_each_frequency_of_a_head_is_taken(odd_model: Path, tmp_path: Path) -> None:
    source = load_shape(with_rotary_factors(8, odd_model, tmp_path / "a.gguf"))
    assert source.config["head_dim"] == 16 and source.config["rope_parameters"]["rope_type"] == "default"


@pytest.mark.parametrize("count", [1, 7, 16])
def test_another_number_of_rotary_factors_is_refused(count: int, odd_model: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=rf"rope_freqs\.weight has shape \[{count}\], a head of 16 .* \[8\]"):
        load_shape(with_rotary_factors(count, odd_model, tmp_path / "a.gguf"))


def tokenizer_file(path: Path, **changes: Any) -> GgufModel:
    """A file of a SentencePiece tokenizer and nothing else, its metadata changed as a file could say it."""
    rewritten(lambda writer: writer.add_tokenizer_model("llama"))(path)
    tokens = {"tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "a"], "tokenizer.ggml.scores": [0.0] * 4}
    sound = read_gguf_file(path)
    return replace(sound, metadata=sound.metadata | tokens | {f"tokenizer.{key}": v for key, v in changes.items()})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chat_template": 5}, "the tokenizer of .* is broken"),
        ({"ggml.eos_token_ids": 7}, "the tokenizer of .* is broken"),
        ({"ggml.tokens": "abcd"}, "carries no tokenizer"),
        ({"ggml.tokens": ["<unk>", "<s>", "</s>", "a" * 2000]}, "a token has 2000 characters, at most 1024"),
        ({"ggml.scores": [0.0]}, "the tokenizer of .* is broken"),
    ],
    ids=str,
)
def test_a_broken_gguf_tokenizer_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tokenizer_file(tmp_path / "a.gguf", **changes)
    with pytest.raises(BadInputError, match=message):
        write_gguf_tokenizer(file, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_a_special_token_below_zero_is_none(tmp_path: Path) -> None:
    """In Python, -1 would be the last token."""
    write_gguf_tokenizer(tokenizer_file(tmp_path / "a.gguf", **{"ggml.padding_token_id": -1}), tmp_path)
    assert "pad_token" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
