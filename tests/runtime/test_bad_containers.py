"""Every byte of a container counts: cut or changed anywhere, it is refused, or holds the same weights."""

import struct
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from fuzz_container import resign, write_seeds

from mgptq_runtime.container import ARCHITECTURE, Container, parse_container
from mgptq_runtime.errors import ContainerError, MgptqError, UnsupportedModelError
from mgptq_runtime.gguf_file import MAX_TEXT_BYTES, parse_gguf
from mgptq_runtime.golden import GoldenVectors, validate_golden

PATH = Path("tiny.gguf")
UINT8, UINT32, FLOAT32, BOOL, STRING, ARRAY = 0, 4, 6, 7, 8, 9


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> bytes:
    """A whole model in 4 KB."""
    folder = tmp_path_factory.mktemp("seeds")
    write_seeds(folder)
    return (folder / "tied.gguf").read_bytes()


def header_bytes(data: bytes) -> int:
    return min(info.offset for info in parse_gguf(PATH, data, ARCHITECTURE).tensors.values())


def weights(container: Container) -> dict[str, np.ndarray]:
    """Everything that a container computes with, but hyper-parameters."""
    model = container.model
    linears = {linear.name: linear.dequantize() for linear in (*model.linears(), model.embedding)}
    return linears | dict(model.tensors) | asdict(container.golden)


def test_a_container_cut_at_any_byte_is_refused(tiny):
    for end in range(len(tiny)):
        with pytest.raises(ContainerError, match=r"tiny\.gguf: at byte \d+: "):
            parse_container(PATH, tiny[:end])


@pytest.mark.parametrize("mask", [0x01, 0xFF])
def test_a_container_with_any_byte_changed_is_refused(tiny, mask):
    for position in range(len(tiny)):
        data = bytearray(tiny)
        data[position] ^= mask
        with pytest.raises((ContainerError, UnsupportedModelError)):
            parse_container(PATH, bytes(data))


@pytest.mark.parametrize("mask", [0x01, 0x20, 0xFF])
def test_a_signed_container_with_a_header_byte_changed_is_refused_or_holds_the_same_weights(tiny, mask):
    """The hash being right, a header may say other texts and hyper-parameters, never place the weights otherwise."""
    expected = weights(parse_container(PATH, tiny))
    accepted = 0
    for position in range(header_bytes(tiny)):
        data = bytearray(tiny)
        data[position] ^= mask
        try:
            found = weights(parse_container(PATH, resign(bytes(data))))
        except MgptqError:
            continue
        accepted += 1
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], expected[name]) for name in expected), position
    assert accepted < 200


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def key(name: bytes, value_type: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", value_type) + value


def metadata(*entries: bytes) -> bytes:
    data = b"GGUF" + struct.pack("<IQQ", 3, 0, len(entries)) + b"".join(entries)
    return data + bytes(-len(data) % 32)


def array(element: int, values: bytes, count: int) -> bytes:
    return struct.pack("<IQ", element, count) + values


IDENTITY = key(b"general.architecture", STRING, text(b"mgptq"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            metadata(key(b"general.architecture", ARRAY, array(UINT32, bytes(8), 2))),
            "general.architecture is an array of uint32; only 'mgptq' containers run here",
        ),
        (
            metadata(key(b"general.architecture", ARRAY, array(STRING, text(b"mgptq"), 1))),
            "general.architecture is an array of string",
        ),
        (metadata(key(b"general.architecture", UINT32, bytes(4))), "general.architecture is 0; only"),
        (
            metadata(IDENTITY, key(b"general.alignment", ARRAY, array(UINT32, bytes(8), 2))),
            r"general.alignment is an array of uint32 .*a container has 32 \(uint32\)",
        ),
        (
            metadata(IDENTITY, key(b"general.alignment", FLOAT32, struct.pack("<f", 32))),
            r"general.alignment is 32.0 \(float32\)",
        ),
        (metadata(IDENTITY, key(b"general.alignment", UINT32, bytes(4))), "general.alignment is 0"),
        (metadata(IDENTITY, key(b"a", ARRAY, array(BOOL, b"\1\2", 2))), "a bool of 2, only 0 and 1"),
        (metadata(IDENTITY, key(b"a", ARRAY, array(UINT8, b"", 1 << 63))), "the file has [0-9]+ left"),
        (metadata(IDENTITY) + bytes(32), "32 bytes follow the last tensor"),
        (metadata(IDENTITY)[:-1] + b"\1", "padding must be zero bytes"),
        (metadata(IDENTITY), "key 'mgptq.format_version' is missing"),
        (
            metadata(IDENTITY, key(b"mgptq.format_version", ARRAY, array(UINT32, bytes(4), 1))),
            "'mgptq.format_version' has type array of uint32, it must be uint32",
        ),
    ],
)
def test_values_of_other_types_are_refused(data, message):
    with pytest.raises(ContainerError, match=message):
        parse_container(PATH, data)


def test_all_text_together_is_bounded():
    half = text(bytes(MAX_TEXT_BYTES // 2))
    data = metadata(IDENTITY, key(b"a", STRING, half), key(b"b", STRING, half))
    with pytest.raises(ContainerError, match=f"key 'b': .* bytes of text so far, at most {MAX_TEXT_BYTES} are allowed"):
        parse_container(PATH, data)


@pytest.mark.parametrize(("prompts", "length", "vocabulary"), [(65, 2, 8), (1, 513, 8), (1, 512, 1 << 18)])
def test_golden_vectors_that_take_more_than_any_file_justifies_are_refused(prompts, length, vocabulary):
    shape = (prompts, length, 1)
    golden = GoldenVectors(
        token_ids=np.zeros(shape[:2], np.int32),
        top_ids=np.zeros(shape, np.int32),
        top_logits=np.zeros(shape, np.float32),
        log_partition=np.zeros(shape[:2], np.float32),
        hidden_digests=np.zeros((2, prompts, 8), np.float32),
    )
    with pytest.raises(ValueError, match="allowed are 64 prompts of 512 tokens and 67108864 logits"):
        validate_golden(golden, vocabulary)
