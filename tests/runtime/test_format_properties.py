"""Every storage format: whatever is packed comes out again, bit for bit, whatever the shape."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgptq_runtime.errors import ContainerError
from mgptq_runtime.formats import FORMATS, GGML_FORMATS, BlockParameters, ColumnFormat, GgmlFormat

ROWS, BLOCKS = st.integers(1, 5), st.integers(1, 4)
SEEDS = st.integers(0, 2**32 - 1)
MANY = settings(max_examples=60, deadline=None)


def any_float16(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Any of the 65536 patterns, NaN and infinity included."""
    return rng.integers(0, 1 << 16, shape, np.uint16).view(np.float16)


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
@MANY
@given(rows=ROWS, blocks=BLOCKS, seed=SEEDS)
def test_column_formats_give_back_codes_and_scales(fmt: ColumnFormat, rows: int, blocks: int, seed: int):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, fmt.levels, (rows, blocks * fmt.block_columns), np.uint8)
    scales = any_float16(rng, (rows, blocks))
    data = fmt.pack(codes, scales)
    assert data.shape == (rows, blocks * fmt.block_bytes)
    fmt.validate_codes(data)
    found_codes, found_scales = fmt.unpack(data)
    assert same_bits(found_codes, codes) and same_bits(found_scales, scales)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
@MANY
@given(rows=ROWS, blocks=BLOCKS, seed=SEEDS)
def test_column_formats_mean_the_documented_weights(fmt: ColumnFormat, rows: int, blocks: int, seed: int):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, fmt.levels, (rows, blocks * fmt.block_columns), np.uint8)
    scales = rng.standard_normal((rows, blocks)).astype(np.float16)
    expected = fmt.values()[codes] * scales.astype(np.float32).repeat(fmt.block_columns, axis=1)
    assert same_bits(fmt.dequantize(fmt.pack(codes, scales)), expected)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
@MANY
@given(rows=ROWS, blocks=BLOCKS, seed=SEEDS)
def test_any_bytes_of_a_column_format_survive_or_are_no_codes(fmt: ColumnFormat, rows: int, blocks: int, seed: int):
    data = np.random.default_rng(seed).integers(0, 256, (rows, blocks * fmt.block_bytes), np.uint8)
    try:
        fmt.validate_codes(data)
    except ContainerError:
        assert fmt.name == "b8" and (fmt.packed_codes(data).view(np.int8) == -128).any()
        return
    assert same_bits(fmt.pack(*fmt.unpack(data)), data)


def any_block(fmt: GgmlFormat, rng: np.random.Generator, rows: int, blocks: int) -> tuple[np.ndarray, BlockParameters]:
    codes = rng.integers(0, fmt.levels, (rows, blocks * fmt.block_columns), np.uint8)
    sub_blocks = (rows, blocks * fmt.block_columns // fmt.sub_columns)
    scales = mins = dmin = None
    if fmt.scale_range is not None:
        scales = rng.integers(fmt.scale_range[0], fmt.scale_range[1] + 1, sub_blocks, np.int16)
    if fmt.largest_min is not None:
        mins = rng.integers(0, fmt.largest_min + 1, sub_blocks, np.int16)
        dmin = any_float16(rng, (rows, blocks))
    return codes, BlockParameters(any_float16(rng, (rows, blocks)), scales, dmin, mins)


@pytest.mark.parametrize("fmt", GGML_FORMATS.values(), ids=lambda fmt: fmt.name)
@MANY
@given(rows=ROWS, blocks=BLOCKS, seed=SEEDS)
def test_ggml_types_give_back_codes_and_parameters(fmt: GgmlFormat, rows: int, blocks: int, seed: int):
    codes, parameters = any_block(fmt, np.random.default_rng(seed), rows, blocks)
    found_codes, found = fmt.unpack(fmt.pack(codes, parameters))
    assert same_bits(found_codes, codes)
    for name, expected in vars(parameters).items():
        array = getattr(found, name)
        assert (array is None) == (expected is None), name
        assert array is None or same_bits(array, expected), name


@pytest.mark.parametrize("fmt", GGML_FORMATS.values(), ids=lambda fmt: fmt.name)
@MANY
@given(rows=ROWS, blocks=BLOCKS, seed=SEEDS)
def test_any_bytes_of_a_ggml_type_survive(fmt: GgmlFormat, rows: int, blocks: int, seed: int):
    data = np.random.default_rng(seed).integers(0, 256, (rows, blocks * fmt.block_bytes), np.uint8)
    assert same_bits(fmt.pack(*fmt.unpack(data)), data)
