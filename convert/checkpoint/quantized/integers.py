"""Matrices of integers packed into words of 32 bits: compressed-tensors, AWQ, GPTQ, MLX."""

from __future__ import annotations

import math

import numpy as np

from pydiffusion.convert.checkpoint.quantized.codes import unpack_stream, unpack_words
from pydiffusion.convert.checkpoint.quantized.floats import dequantized
from pydiffusion.convert.checkpoint.quantized.parts import FLOATS, Parts, lay_grid
from pydiffusion.convert.checkpoint.safetensors_files import StoredTensor
from pydiffusion.convert.checkpoint.weights import Weight

# AWQ's "gemm" version packs eight columns per word in this order; here: the position of each column.
_AWQ_POSITIONS = np.array([0, 4, 1, 5, 2, 6, 3, 7], np.uint32)
_AWQ_BITS = 4
_MLX_BITS = (1, 2, 3, 4, 5, 6, 8)


def compressed_integers(parts: Parts, codes: StoredTensor) -> Weight:
    """compressed-tensors' ``pack-quantized``: weight = (code - zero) * scale. Codes and zeros are stored
    plus half their range, codes packed along a row, zeros along a column.
    """
    shape = _stored_shape(parts, codes)
    bits = _bits_of_width(parts, codes, shape[1], codes.shape[1])
    half = 1 << (bits - 1)
    scale = lay_grid(parts, parts.need(f"{parts.name}_scale", *FLOATS), shape, None)
    groups = _groups(parts, f"{parts.name}_g_idx", shape[1], shape[1] // scale.width)
    words = parts.rows(codes)
    zeros = _compressed_zeros(parts, (shape[0], shape[1] // scale.width), bits)

    def rows(first: int, count: int) -> np.ndarray:
        weights = _unpack(words(first, count), bits, shape[1]).astype(np.float32) - half
        if zeros is not None:
            weights -= _spread(zeros[first : first + count], groups, scale.width, shape[1])
        return weights * _spread(scale.over(first, count), groups, scale.width, shape[1])

    return dequantized(parts, codes, shape, rows)


def _stored_shape(parts: Parts, codes: StoredTensor) -> tuple[int, ...]:
    tensor = parts.need(f"{parts.name}_shape", "I64", "I32")
    parts.matrix_shape(codes)
    values = parts.all_of(tensor).reshape(-1).tolist() if tensor.n_bytes <= 64 else []
    if len(codes.shape) != 2 or len(values) != 2 or values[0] != codes.shape[0] or not 0 < values[1] <= 2**31:
        raise parts.error(
            f"{tensor.name!r} is {values}, which does not suit codes of {list(codes.shape)}", tensor
        )
    return values[0], values[1]


def _bits_of_width(parts: Parts, codes: StoredTensor, n_columns: int, width: int) -> int:
    """Bits of a code, by the number of words in a row."""
    allowed = (parts.settings.bits,) if parts.settings.bits else (4, 8, 2, 3, 5, 6, 7)
    for bits in allowed:
        if width in (-(-n_columns * bits // 32), -(-n_columns // (32 // bits))):
            return bits
    raise parts.error(f"its rows of {width} words do not hold {n_columns} codes", codes)


def _unpack(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Codes of either packing, by the width of the rows: (n_rows, n_words) -> (n_rows, count) uint32."""
    words = words.view("<u4")
    if words.shape[1] == -(-count * bits // 32):
        return unpack_stream(words, bits)[:, :count]
    return unpack_words(words, bits, count)


def _compressed_zeros(parts: Parts, shape: tuple[int, int], bits: int) -> np.ndarray | None:
    """Zero points of ``shape`` (n_rows, n_groups), float32; None without any."""
    tensor = parts.zeros(f"{parts.name}_zero_point", "I32", "I8")
    if tensor is None:
        return None
    n_rows, n_groups = shape
    if tensor.dtype == "I8" and tensor.shape == shape:
        return parts.all_of(tensor).astype(np.float32)
    heights = (-(-n_rows * bits // 32), -(-n_rows // (32 // bits)))
    if tensor.dtype != "I32" or tensor.shape not in [(height, n_groups) for height in heights]:
        raise parts.error(
            f"{tensor.name!r} has the shape {list(tensor.shape)}, which does not suit {n_rows} rows of "
            f"{n_groups} groups",
            tensor,
        )
    words = np.ascontiguousarray(parts.all_of(tensor).T)
    return _unpack(words, bits, n_rows).T.astype(np.float32) - (1 << (bits - 1))


def _groups(parts: Parts, name: str, n_columns: int, n_groups: int) -> np.ndarray | None:
    """Group of each column where columns are not grouped in order: (n_columns,), else None."""
    tensor = parts.find(name, "I32", "I64")
    if tensor is None:
        return None
    fits = math.prod(tensor.shape) == n_columns
    values = parts.all_of(tensor).reshape(-1) if fits else np.empty(0)
    if not fits or values.min() < 0 or values.max() >= n_groups:
        raise parts.error(
            f"{name!r} should name one of {n_groups} groups for each of {n_columns} columns", tensor
        )
    return values


def _spread(values: np.ndarray, groups: np.ndarray | None, width: int, n_columns: int) -> np.ndarray:
    """The value of each column from those of its row's groups: (n_rows, n_groups) -> (n_rows, n_columns)."""
    if groups is not None:
        return values[:, groups]
    return np.repeat(values, n_columns // values.shape[1], axis=1)


def awq(parts: Parts) -> Weight:
    """AutoAWQ's ``gemm`` version, stored transposed: weight = (code - zero) * scale."""
    codes = parts.need(f"{parts.module}.qweight", "I32")
    n_columns, n_words = parts.matrix_shape(codes)[-2:]
    shape = (n_columns, n_words * 8)[::-1]
    scales, n_groups = _transposed_scales(parts, codes, shape)
    _check_groups(parts, scales, n_columns, n_groups)
    zero_words = _transposed_words(parts, (n_groups, n_words))

    def unpack(words: np.ndarray) -> np.ndarray:
        shifted = words.view("<u4")[..., None] >> (_AWQ_POSITIONS * np.uint32(_AWQ_BITS))
        return (shifted & 15).reshape(len(words), -1).astype(np.float32)

    def rows(first: int, count: int) -> np.ndarray:
        low, high = first // 8, -(-(first + count) // 8)
        part = slice(first - 8 * low, first - 8 * low + count)
        weights = unpack(parts.all_of(codes)[:, low:high])[:, part]
        zeros = np.full((n_groups, count), 8, np.float32)
        if zero_words is not None:
            zeros = unpack(parts.all_of(zero_words)[:, low:high])[:, part]
        scale = parts.all_of(scales)[:, first : first + count]
        grouped = weights.reshape(n_groups, -1, count)
        return ((grouped - zeros[:, None]) * scale[:, None]).reshape(n_columns, count).T

    return dequantized(parts, codes, shape, rows)


def gptq(parts: Parts) -> Weight:
    """GPTQ, stored transposed, codes packed along a row: weight = (code - zero) * scale, of the column's
    group. The first format stores zeros less one.
    """
    codes = parts.need(f"{parts.module}.qweight", "I32")
    n_words, n_rows = parts.matrix_shape(codes)[-2:]
    bits = parts.settings.bits
    n_columns = n_words * 32 // bits
    shape = (n_rows, n_columns)
    scales, n_groups = _transposed_scales(parts, codes, shape)
    width = -(-n_rows * bits // 32)
    zero_words = _transposed_words(parts, (n_groups, width))
    groups = _groups(parts, f"{parts.module}.g_idx", n_columns, n_groups)
    if groups is None:
        if parts.settings.any_order:
            parts.need(f"{parts.module}.g_idx")
        _check_groups(parts, scales, n_columns, n_groups)
        groups = np.repeat(np.arange(n_groups), n_columns // n_groups)

    def rows(first: int, count: int) -> np.ndarray:
        part = slice(first, first + count)
        words = np.ascontiguousarray(parts.all_of(codes)[:, part].T).view("<u4")
        weights = unpack_stream(words, bits).astype(np.float32)
        zeros = np.full((count, n_groups), 1 << (bits - 1), np.float32)
        if zero_words is not None:
            stored = _gptq_zeros(parts.all_of(zero_words), bits, parts.settings.zeros_minus_one)
            zeros = stored[:, part].T.astype(np.float32)
        scale = parts.all_of(scales)[:, part].T
        return (weights - zeros[:, groups]) * scale[:, groups]

    return dequantized(parts, codes, shape, rows)


def _gptq_zeros(words: np.ndarray, bits: int, minus_one: bool) -> np.ndarray:
    """Zero points of the words, to which one is added if each was stored less one: (n_groups, n_words) uint32
    -> (n_groups, n).

    That was one subtraction per word, so a zero point of 0 took one from the next field as well; one addition
    undoes it. Codes of 3 bits, which cross the words' borders, were made less one each for itself.
    """
    words = words.view("<u4")
    if not minus_one:
        return unpack_stream(words, bits)
    if 32 % bits == 0:
        return unpack_stream(words + np.uint32((2**32 - 1) // (2**bits - 1)), bits)
    return (unpack_stream(words, bits) + 1) & np.uint32(2**bits - 1)


def _transposed_scales(parts: Parts, codes: StoredTensor, shape: tuple[int, ...]) -> tuple[StoredTensor, int]:
    """Scales of (n_groups, n_rows), and the number of groups."""
    tensor = parts.need(f"{parts.module}.scales", *FLOATS)
    n_groups = tensor.shape[0] if len(tensor.shape) == 2 else 0
    if len(codes.shape) != 2 or n_groups == 0 or tensor.shape[1] != shape[0] or shape[1] < n_groups:
        raise parts.error(
            f"{tensor.name!r} has the shape {list(tensor.shape)}, should have {shape[0]} columns and a "
            "row per group",
            tensor,
        )
    return tensor, n_groups


def _check_groups(parts: Parts, scales: StoredTensor, n_columns: int, n_groups: int) -> None:
    if n_columns % n_groups:
        raise parts.error(f"{scales.name!r} has {n_groups} groups for rows of {n_columns}", scales)


def _transposed_words(parts: Parts, shape: tuple[int, int]) -> StoredTensor | None:
    tensor = parts.zeros(f"{parts.module}.qzeros", "I32")
    if tensor is not None and tensor.shape != shape:
        raise parts.error(
            f"{tensor.name!r} has the shape {list(tensor.shape)}, should be {list(shape)}", tensor
        )
    return tensor


def mlx_affine(parts: Parts, codes: StoredTensor, bits: int, group: int) -> Weight:
    """MLX's affine mode: weight = code * scale + bias of its group."""
    parts.matrix_shape(codes)
    scales = parts.need(f"{parts.module}.scales", *FLOATS)
    biases = parts.need(f"{parts.module}.biases", *FLOATS)
    shape = (*codes.shape[:-1], codes.shape[-1] * 32 // bits)
    wanted = [*shape[:-1], shape[-1] // group]
    if bits not in _MLX_BITS or codes.shape[-1] * 32 % bits or shape[-1] % group:
        raise parts.error(
            f"rows of {codes.shape[-1]} words are no whole groups of {group} codes of {bits} bits, which "
            f"{parts.settings.where} says they are",
            codes,
        )
    for tensor in (scales, biases):
        if list(tensor.shape) != wanted:
            raise parts.error(
                f"{tensor.name!r} has the shape {list(tensor.shape)}, should be {wanted}", tensor
            )
    words, scale_rows, bias_rows = parts.rows(codes), parts.rows(scales), parts.rows(biases)

    def rows(first: int, count: int) -> np.ndarray:
        weights = unpack_stream(words(first, count), bits).astype(np.float32).reshape(count, -1, group)
        weights *= scale_rows(first, count)[..., None]
        weights += bias_rows(first, count)[..., None]
        return weights.reshape(count, -1)

    return dequantized(parts, codes, shape, rows)
