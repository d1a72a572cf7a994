"""Stock ggml types against llama.cpp and gguf-py, which are trusted."""

import ctypes

import gguf
import numpy as np
import pytest
from llama_cpp import library, quantize_rows

from mgptq_runtime.errors import ContainerError
from mgptq_runtime.formats import FORMATS, GGML_FORMATS, BlockParameters, GgmlFormat, format_named
from mgptq_runtime.quantized_model import InputGroup, QuantizedLinear, QuantizedModel, Segment

ALL_TYPES = list(GGML_FORMATS)
OF_GGUF_PY = ["q4_0", "q8_0", "q2_k", "q3_k", "q4_k", "q6_k"]


def floats(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def llama_dequantize(fmt: GgmlFormat, data: np.ndarray) -> np.ndarray:
    out = np.empty((len(data), data.shape[1] // fmt.block_bytes * fmt.block_columns), np.float32)
    function = getattr(library(), f"dequantize_row_{fmt.name.replace('_k', '_K')}")
    function(floats(data), floats(out), ctypes.c_int64(out.size))
    return out


def random_block(fmt: GgmlFormat, rows: int = 5, blocks: int = 3) -> tuple[np.ndarray, BlockParameters]:
    generator = np.random.default_rng(fmt.ggml_type)
    codes = generator.integers(0, fmt.levels, (rows, blocks * fmt.block_columns), np.uint8)
    sub_blocks = blocks * fmt.block_columns // fmt.sub_columns
    scales = mins = dmin = None
    if fmt.scale_range is not None:
        low, high = fmt.scale_range
        scales = generator.integers(low, high + 1, (rows, sub_blocks), np.int16)
    if fmt.largest_min is not None:
        mins = generator.integers(0, fmt.largest_min + 1, (rows, sub_blocks), np.int16)
        dmin = generator.standard_normal((rows, blocks)).astype(np.float16)
    return codes, BlockParameters(generator.standard_normal((rows, blocks)).astype(np.float16), scales, dmin, mins)


def assert_same_parameters(found: BlockParameters, expected: BlockParameters) -> None:
    for name in ("d", "scales", "dmin", "mins"):
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None), name
        assert one is None or (one.dtype == other.dtype and np.array_equal(one, other)), name


@pytest.mark.parametrize("name", ALL_TYPES)
def test_llama_cpp_reads_packed_blocks_bit_for_bit(name):
    fmt = GGML_FORMATS[name]
    data = fmt.pack(*random_block(fmt))
    assert data.shape == (5, 3 * fmt.block_bytes)
    assert fmt.dequantize(data).tobytes() == llama_dequantize(fmt, data).tobytes()


@pytest.mark.parametrize("name", OF_GGUF_PY)
def test_gguf_py_reads_packed_blocks_bit_for_bit(name):
    fmt = GGML_FORMATS[name]
    data = fmt.pack(*random_block(fmt))
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(fmt.ggml_type))
    assert fmt.dequantize(data).tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", ALL_TYPES)
def test_packed_blocks_mean_the_documented_weights(name):
    fmt = GGML_FORMATS[name]
    codes, parameters = random_block(fmt)
    scales = parameters.d.astype(np.float64).repeat(fmt.block_columns // fmt.sub_columns, 1)
    if parameters.scales is not None:
        scales = scales * parameters.scales
    expected = scales.repeat(fmt.sub_columns, 1) * (fmt.step * codes.astype(np.float64) + fmt.offset)
    if parameters.mins is not None:
        mins = parameters.dmin.astype(np.float64).repeat(fmt.block_columns // fmt.sub_columns, 1) * parameters.mins
        expected -= mins.repeat(fmt.sub_columns, 1)
    assert np.allclose(fmt.dequantize(fmt.pack(codes, parameters)), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ALL_TYPES)
def test_unpack_is_the_inverse_of_pack(name):
    fmt = GGML_FORMATS[name]
    codes, parameters = random_block(fmt)
    found, found_parameters = fmt.unpack(fmt.pack(codes, parameters))
    assert found.dtype == np.uint8 and np.array_equal(found, codes)
    assert_same_parameters(found_parameters, parameters)


@pytest.mark.parametrize("name", ALL_TYPES)
def test_blocks_of_llama_cpps_quantizer_are_read_bit_for_bit(name):
    fmt = GGML_FORMATS[name]
    weight = np.random.default_rng(7).standard_normal((4, 512)).astype(np.float32) * np.float32(0.1)
    data = quantize_rows(fmt.ggml_type, weight, weight.shape[1] // fmt.block_columns * fmt.block_bytes)
    assert fmt.dequantize(data).tobytes() == llama_dequantize(fmt, data).tobytes()
    codes, parameters = fmt.unpack(data)
    assert np.array_equal(fmt.pack(codes, parameters), data)


def test_the_registry_is_sorted_and_agrees_with_gguf_py():
    bits = [fmt.bits_per_weight for fmt in GGML_FORMATS.values()]
    assert bits == sorted(bits) == [1.125, 2.25, 2.625, 3.4375, 4.5, 4.5, 6.5625, 8.5]
    for fmt in GGML_FORMATS.values():
        if fmt.name != "q2_0":
            known = gguf.GGMLQuantizationType[fmt.name.upper()]
            assert known == fmt.ggml_type and gguf.GGML_QUANT_SIZES[known] == (fmt.block_columns, fmt.block_bytes)


def test_q2_0_blocks_are_b2_blocks():
    codes, parameters = random_block(GGML_FORMATS["q2_0"])
    assert np.array_equal(GGML_FORMATS["q2_0"].pack(codes, parameters), FORMATS["b2"].pack(codes, parameters.d))


def test_the_container_formats_are_the_same_as_ever():
    assert [(fmt.name, fmt.block_bytes) for fmt in FORMATS.values()] == [
        ("b1", 10),
        ("b2", 18),
        ("b3", 26),
        ("b4", 34),
        ("b8", 66),
    ]


def test_formats_are_found_by_name_in_both_registries():
    assert format_named("b3") is FORMATS["b3"] and format_named("q4_k") is GGML_FORMATS["q4_k"]
    with pytest.raises(ValueError, match=r"unknown format 'q5_k'; the formats are b1, .*q8_0"):
        format_named("q5_k")


def test_numbers_that_do_not_fit_are_refused():
    fmt = GGML_FORMATS["q2_k"]
    codes, good = random_block(fmt)
    with pytest.raises(ValueError, match="q2_k: codes of 0 to 4 are not within 0 to 3"):
        fmt.pack(np.minimum(codes + 1, 4).clip(0, 4) * (codes > 0), good)
    with pytest.raises(ValueError, match=r"q2_k: scales of .* to 16 are not within 0 to 15"):
        fmt.pack(codes, BlockParameters(good.d, good.scales * 0 + 16, good.dmin, good.mins))
    with pytest.raises(ValueError, match="q2_k: mins are missing"):
        fmt.pack(codes, BlockParameters(good.d, good.scales, good.dmin))
    with pytest.raises(ValueError, match="q2_k: d must be float16"):
        fmt.pack(codes, BlockParameters(good.d.astype(np.float32), good.scales, good.dmin, good.mins))
    with pytest.raises(ValueError, match="q2_k: 700 columns are not whole blocks of 256"):
        fmt.pack(codes[:, :700], good)
    with pytest.raises(ValueError, match="q2_0: scales are no part of this type"):
        GGML_FORMATS["q2_0"].pack(codes, BlockParameters(good.d.repeat(4, 1), good.scales))
    with pytest.raises(ContainerError, match="whole 84-byte blocks"):
        fmt.dequantize(np.zeros((2, 85), np.uint8))


def ggml_segment(name: str, columns: int, rows: int = 2) -> Segment:
    fmt = GGML_FORMATS[name]
    return Segment(name, np.zeros((rows, columns // fmt.block_columns * fmt.block_bytes), np.uint8))


def test_a_linear_is_one_ggml_segment_that_covers_its_columns_exactly():
    linear = QuantizedLinear("output", 2, 96, (ggml_segment("q4_0", 96),))
    assert linear.dequantize().shape == (2, 96) and linear.stored_bytes == 2 * 3 * 18
    with pytest.raises(ValueError, match="output: segments cover 128 columns of 96"):
        QuantizedLinear("output", 2, 96, (ggml_segment("q4_0", 128),))
    with pytest.raises(ValueError, match="output: a segment of type q4_0 must be a linear's only one"):
        QuantizedLinear("output", 2, 128, (ggml_segment("q4_0", 64), ggml_segment("q4_0", 64)))


def test_a_model_counts_weights_and_bits_of_both_registries():
    b2 = QuantizedLinear("blk.0.attn_q", 2, 256, (Segment("b2", np.zeros((2, 72), np.uint8)),))
    k_quant = QuantizedLinear("blk.0.attn_k", 2, 256, (ggml_segment("q2_k", 256),))
    group = InputGroup("blk.0.attn_qkv", None, (k_quant, b2))
    model = QuantizedModel(
        "llama", {}, (group,), QuantizedLinear("token_embd", 2, 32, (ggml_segment("q8_0", 32),)), None
    )
    assert list(model.weights_by_format().items()) == [("b2", 512), ("q2_k", 512)]
    assert model.bits_stored == (2.25 + 2.625) / 2
