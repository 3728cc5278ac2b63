"""Native conversion of rows between types, against numpy and ggml's quantizer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoint_folders import bfloat16_bits

from pydiffusion import _native
from pydiffusion.convert.gguf import rows
from pydiffusion.convert.gguf.tensor_types import BLOCK_SIZES
from pydiffusion.convert.quantization.padding import padded_read
from pydiffusion.convert.quantization.recipes import NEEDS_IMATRIX
from pydiffusion.errors import ConversionError

FLOATS = ("F32", "F16", "BF16")
# Exponent bits: all ones mean infinity or NaN.
EXPONENTS = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}
# Rows smaller than a chunk, several chunks of which the last is shorter, rows larger than a chunk.
SHAPES = [(5, 256), (37, 768), (3, 8192 + 256)]


def random_rows(n_rows: int, n_per_row: int, type: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of a type as the converter reads them, and the floats that numpy makes of them."""
    random = np.random.default_rng(seed)
    values = random.standard_normal((n_rows, n_per_row)) * 10.0 ** random.integers(-4, 3, (n_rows, 1))
    values = values.astype(np.float32)
    if type == "F16":
        values = values.astype(np.float16)
        return values.view(np.uint8), values.astype(np.float32)
    if type == "BF16":
        bits = bfloat16_bits(values)
        return bits.view(np.uint8), (bits.astype(np.uint32) << 16).view(np.float32)
    return values.view(np.uint8), values


TARGETS = [  # the first call makes tables, which takes seconds
    pytest.param(name, marks=pytest.mark.slow) if name in NEEDS_IMATRIX else name for name in BLOCK_SIZES
]


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("target", TARGETS)
def test_blocks_equal_ggmls_quantizer(source: str, target: str) -> None:
    needs = target in NEEDS_IMATRIX
    for n_rows, n_per_row in SHAPES[:1] if target.startswith("IQ") else SHAPES:
        data, values = random_rows(n_rows, n_per_row, source)
        importance = np.random.default_rng(1).random(n_per_row, np.float32) + 0.1
        for weights in [importance] if needs else [importance, None]:
            found, nonfinite = _native.convert_rows(data, source, target, n_per_row, weights)
            expected = _native.quantize_rows(values, target, 2, weights)
            assert nonfinite == -1
            assert found.shape == expected.shape == (n_rows, rows.row_bytes(target, n_per_row))
            assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("source", ["Q8_0", "Q4_K", "MXFP4"])
@pytest.mark.parametrize("target", ["F32", "F16", "BF16", "Q8_0", "Q6_K"])
def test_quantized_sources(source: str, target: str) -> None:
    data = _native.quantize_rows(random_rows(37, 768, "F32")[1], source, 1)
    found, nonfinite = _native.convert_rows(data, source, target, 768)
    values = _native.dequantize_rows(data, source, 768)
    assert nonfinite == _native.find_nonfinite(data, source, 768) == -1
    assert found.tobytes() == _native.quantize_rows(values, target, 1).tobytes()


@pytest.mark.parametrize("n_per_row", [1, 7, 8191, 8193])
@pytest.mark.parametrize("source", FLOATS)
def test_rows_of_any_length_where_there_are_no_blocks(source: str, n_per_row: int) -> None:
    data, values = random_rows(3, n_per_row, source)
    expected = {
        "F32": values,
        "F16": values.astype(np.float16),
        "BF16": bfloat16_bits(values),
    }
    for target in FLOATS:
        found, nonfinite = _native.convert_rows(data, source, target, n_per_row)
        assert nonfinite == -1
        assert found.tobytes() == expected[target].tobytes()
        no_rows, nonfinite = _native.convert_rows(data[:0], source, target, n_per_row)
        assert no_rows.shape == (0, found.shape[1]) and nonfinite == -1


@pytest.mark.parametrize("type", ["F16", "BF16"])
def test_every_16_bit_value(type: str) -> None:
    data = np.arange(1 << 16, dtype=np.uint16).reshape(64, -1)
    with np.errstate(all="ignore"):
        expected = rows.to_float32(data.view(np.uint8), type, 1024)
    found, nonfinite = _native.convert_rows(data.view(np.uint8), type, "F32", 1024, keeps_nonfinite=True)
    assert nonfinite == -1
    numbers = ~np.isnan(expected)
    assert np.array_equal(found.view(np.uint32)[numbers], expected.view(np.uint32)[numbers])
    assert np.isnan(found.view(np.float32)[~numbers]).all()
    # NaNs too keep the source's bits: sign and payload, quiet or not.
    shift = 13 if type == "F16" else 16
    assert np.array_equal(found.view(np.uint32)[~numbers] >> shift & 0x3FF, data[~numbers] & 0x3FF)
    first = data.reshape(-1)[0x7FFF & EXPONENTS[type]]
    assert _native.find_nonfinite(data.view(np.uint8), type, 1024) == first


@given(
    type=st.sampled_from(FLOATS),
    shape=st.sampled_from([(1, 1), (5, 33), (700, 32), (2, 8224)]),
    places=st.sets(st.floats(0, 1, exclude_max=True), max_size=3),
    bits=st.integers(0, 2**23 - 1),
    negative=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_the_first_nonfinite_weight_is_found(
    type: str, shape: tuple[int, int], places: set[float], bits: int, negative: bool
) -> None:
    """NaN of any payload and infinities of both signs, beside the largest numbers that are finite."""
    word, exponents = (np.uint32 if type == "F32" else np.uint16), EXPONENTS[type]
    data = np.full(shape[0] * shape[1], exponents - 1, word)  # the largest finite number
    at = sorted({int(place * len(data)) for place in places})
    sign = 1 << (8 * data.itemsize - 1) if negative else 0
    data[at] = sign | exponents | bits & ((exponents & -exponents) - 1)
    blocks = data.reshape(shape).view(np.uint8)
    first = at[0] if at else -1
    assert _native.find_nonfinite(blocks, type, shape[1]) == first
    for target in FLOATS:
        assert _native.convert_rows(blocks, type, target, shape[1])[1] == first
        assert _native.convert_rows(blocks, type, target, shape[1], None, True)[1] == -1
    if shape[1] % 32 == 0:
        assert _native.convert_rows(blocks, type, "Q8_0", shape[1])[1] == first
    for target in FLOATS if at else ():
        with pytest.raises(ConversionError, match=r"some\.weight: holds NaN or infinite weights"):
            rows.convert_rows(blocks, type, target, shape[1], "some.weight")


def test_infinite_block_scales_are_found() -> None:
    data = _native.quantize_rows(random_rows(40, 512, "F32")[1], "Q8_0", 1)
    data[33, 34:36] = np.array([0x7C00], np.uint16).view(np.uint8)  # of the row's second block
    assert _native.find_nonfinite(data, "Q8_0", 512) == 33 * 512 + 32
    assert _native.convert_rows(data, "Q8_0", "Q4_K", 512)[1] == 33 * 512 + 32


@pytest.mark.parametrize("type", ["F32", "F16", "BF16", "Q8_0", "Q4_K"])
def test_row_errors(type: str) -> None:
    for n_rows, n_per_row in SHAPES:
        values = random_rows(n_rows, n_per_row, "F32")[1]
        values[0] = 0
        data = _native.quantize_rows(values[::-1].copy(), type, 1)
        found = rows.to_float32(data, type, n_per_row).astype(np.float64)
        squares, errors = _native.row_errors(data, type, values)
        np.testing.assert_allclose(squares, (values.astype(np.float64) ** 2).sum(1), rtol=1e-12)
        np.testing.assert_allclose(errors, ((found - values) ** 2).sum(1), rtol=1e-12)
    tail = random_rows(2, 13, "F32")[1]  # no multiple of what is summed side by side
    squares, errors = _native.row_errors(tail.view(np.uint8), "F32", tail * 2)
    np.testing.assert_allclose(squares, 4 * errors, rtol=1e-12)
    smallest = np.full((1, 32), 1e-45, np.float32)
    assert _native.row_errors(smallest.view(np.uint8), "F32", smallest)[0] > 0  # no zeros


@pytest.mark.parametrize(
    ("shape", "source", "target", "n_per_row", "options"),
    [
        ((2, 63), "BF16", "Q8_0", 32, {}),
        ((2, 65), "BF16", "Q8_0", 32, {}),
        ((2, 64), "F32", "Q8_0", 32, {}),
        ((2, 64), "BF16", "Q4_K", 32, {}),
        ((2, 34), "Q8_0", "F32", 33, {}),
        ((2, 34), "Q8_0", "F32", 0, {}),
        ((2, 34), "Q8_0", "F32", -32, {}),
        ((2, 0), "F32", "F32", 0, {}),
        ((1, 0), "F32", "F32", 2**62, {}),
        ((1, 34), "Q8_0", "F32", 2**63 - 32, {}),
        ((2, 64), "BF16", "Q8_0", 32, {"importance": np.ones(31, np.float32)}),
        ((2, 512), "BF16", "Q4_K", 256, {"importance": np.ones(512, np.float32)}),
        ((2, 64), "BF16", "Q8_1", 32, {}),
        ((2, 512), "BF16", "Q8_K", 256, {}),
        ((2, 512), "BF16", "IQ2_XS", 256, {}),
        ((2, 512), "BF16", "I16", 256, {}),
        ((2, 512), "I16", "F32", 256, {}),
        ((2, 512), "Q9_X", "F32", 256, {}),
        ((2, 512), "BF16", "Q9_X", 256, {}),
    ],
)
def test_invalid_shapes_and_types_are_refused(
    shape: tuple[int, int], source: str, target: str, n_per_row: int, options: dict[str, np.ndarray]
) -> None:
    data = np.zeros(shape, np.uint8)
    with pytest.raises(ValueError, match=r"rows of|importance|quantizing|tensor type"):
        _native.convert_rows(data, source, target, n_per_row, **options)


def test_invalid_arrays_are_refused() -> None:
    data, values = random_rows(4, 64, "BF16")
    for call in (
        lambda: _native.convert_rows(data.view(np.uint16), "BF16", "Q8_0", 64),
        lambda: _native.convert_rows(data[:, ::2], "F16", "Q8_0", 32),
        lambda: _native.convert_rows(data[0], "BF16", "Q8_0", 64),
        lambda: _native.find_nonfinite(data[::2, :64], "BF16", 32),
        lambda: _native.row_errors(data, "BF16", values.astype(np.float64)),
        lambda: _native.row_errors(data, "BF16", values.T),
    ):
        with pytest.raises(TypeError):
            call()
    for other in (values[:3], values[:, :32].copy(), values.reshape(8, 32), values[:, :0].copy()):
        with pytest.raises(ValueError, match="rows"):
            _native.row_errors(data, "BF16", other)
    for n_per_row in (63, 65, 128, 0, -64):
        with pytest.raises(ValueError, match="rows of 128 bytes"):
            _native.find_nonfinite(data, "BF16", n_per_row)


@given(
    n_groups=st.integers(1, 3),
    old=st.tuples(st.integers(1, 5), st.integers(1, 4)),
    more=st.tuples(st.integers(0, 4), st.integers(0, 3)),
    type=st.sampled_from(["BF16", "F32", "Q8_0"]),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_padded_rows_equal_numpys(
    n_groups: int, old: tuple[int, int], more: tuple[int, int], type: str, data: st.DataObject
) -> None:
    height, width = old[0], old[1] * 32
    new_height, new_width = height + more[0], width + more[1] * 32
    values = random_rows(n_groups * height, width, "BF16")[1]
    blocks = _native.quantize_rows(values, type, 1).reshape(-1)
    expected = np.pad(values.reshape(n_groups, height, width), ((0, 0), (0, more[0]), (0, new_width - width)))
    expected = _native.quantize_rows(expected.reshape(-1, new_width), type, 1)
    read = padded_read(
        lambda start, count: blocks[start : start + count],
        type,
        (n_groups * height, width),
        (n_groups * new_height, new_width),
        n_groups,
        "some.weight",
    )
    first = data.draw(st.integers(0, len(expected) - 1))
    count = data.draw(st.integers(1, len(expected) - first))
    size = expected.shape[1]
    assert read(first * size, count * size).tobytes() == expected[first : first + count].tobytes()
