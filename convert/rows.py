"""Rows of weights from one type to another, and the check that what was written stands for what was read."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np

from pydiffusion import _native
from pydiffusion.errors import ConversionError

# Root of the summed squared errors, relative to that of the weights, that a quantized chunk may show. About
# the worst a block can do by design, not the usual (a tenth to a half of it): what exceeds it is the wrong
# data, not coarse rounding. Rows mixed up show 1.4; types of few bits come near 1 on rows with outliers.
_MAX_ERROR = MappingProxyType(
    {"Q8_0": 0.03, "Q6_K": 0.10, "Q5_0": 0.25, "Q5_1": 0.25, "Q5_K": 0.15, "Q4_K": 0.25}
    | dict.fromkeys(("Q4_0", "Q4_1", "IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4"), 0.5)
    | dict.fromkeys(("Q3_K", "IQ3_S", "IQ3_XXS"), 0.7)
    | dict.fromkeys(("Q2_K", "IQ2_S", "IQ2_XS", "IQ2_XXS"), 0.9)
    | dict.fromkeys(("IQ1_M", "IQ1_S"), 1.0)
    | dict.fromkeys(("TQ1_0", "TQ2_0"), 1.1)
)
# With an importance, columns of little weight may be rounded worse.
_WEIGHTED = 1.5
_NO_CLOSER = 1.1
# Blocks keep a float16 scale, so weights below about 127 * 2**-25 may vanish.
_ABSOLUTE_ERROR = 1e-5


def row_bytes(type_name: str, n_per_row: int) -> int:
    """Bytes that a row takes in a type; ConversionError for a type that is not known or does not divide the
    row.
    """
    try:
        _, block, size = _native.tensor_types()[type_name]
    except KeyError:
        raise ConversionError(f"tensor type {type_name!r} is not known") from None
    if n_per_row % block:
        raise ConversionError(
            f"rows of {n_per_row} weights are no multiple of the {block} of a {type_name} block"
        )
    return n_per_row // block * size


def to_float32(data: np.ndarray, type_name: str, n_per_row: int) -> np.ndarray:
    """(n_rows, bytes_per_row) uint8 of any type -> (n_rows, n_per_row) float32, a view where that is
    possible.
    """
    if type_name == "F32":
        return data.view(np.float32)
    if type_name == "F16":
        return data.view(np.float16).astype(np.float32)
    if type_name == "BF16":
        wide = data.view(np.uint16).astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return _native.dequantize_rows(data, type_name, n_per_row)


def from_float32(
    rows: np.ndarray, type_name: str, n_threads: int, importance: np.ndarray | None = None
) -> np.ndarray:
    """(n_rows, n_per_row) float32 -> (n_rows, bytes_per_row) uint8; ``importance``: (n_per_row,) float32."""
    if type_name == "F32":
        return np.ascontiguousarray(rows).view(np.uint8)
    return _native.quantize_rows(np.ascontiguousarray(rows), type_name, n_threads, importance)


def convert_rows(
    data: np.ndarray,
    source: str,
    target: str,
    n_per_row: int,
    n_threads: int,
    name: str,
    importance: np.ndarray | None = None,
    keeps_nonfinite: bool = False,
) -> np.ndarray:
    """Rows of type ``source`` as rows of type ``target``, both (n_rows, bytes_per_row) uint8.

    Equal types are passed through byte by byte. ConversionError names the tensor when a weight is not finite,
    unless ``keeps_nonfinite``, or does not fit.
    """
    if source == target:
        if source in ("F32", "F16", "BF16") and not keeps_nonfinite:
            _require_finite(to_float32(data, source, n_per_row), name)
        return data
    rows = to_float32(data, source, n_per_row)
    if not keeps_nonfinite:
        _require_finite(rows, name)
    result = from_float32(rows, target, n_threads, importance)
    if target == "F16" and not np.isfinite(result.view(np.float16)).all():
        raise ConversionError(
            f"{name}: has weights beyond the range of F16 (65504); convert to bf16 or f32 instead"
        )
    return result


def _require_finite(rows: np.ndarray, name: str) -> None:
    # The sum of finite rows may overflow, never the other way round, so the costly test is rare.
    with np.errstate(all="ignore"):
        suspicious = not np.isfinite(rows.sum())
    if suspicious and not np.isfinite(rows).all():
        raise ConversionError(
            f"{name}: holds NaN or infinite weights; the checkpoint is damaged (--allow-nonfinite keeps them)"
        )


def check_rows(
    written: np.ndarray,
    data: np.ndarray,
    source: str,
    target: str,
    n_per_row: int,
    name: str,
    weighted: bool = False,
) -> None:
    """Compare rows found in the target with those of the source, read again; ConversionError if they
    disagree.

    Types that keep every weight apart must match bit by bit what numpy (not the code that wrote them) makes
    of the source; quantized ones must, dequantized, be as close to it as their blocks allow, and rows of
    zeros (padding is made of them) be zeros still. ``weighted``: they were quantized with an importance.
    """
    if source == target:
        agrees = np.array_equal(written, data)
    else:
        rows = to_float32(data, source, n_per_row)
        if target == "F32":
            agrees = np.array_equal(written.view(np.uint32), rows.view(np.uint32))
        elif target == "F16":
            agrees = np.array_equal(written.view(np.uint16), rows.astype(np.float16).view(np.uint16))
        elif target == "BF16":
            agrees = np.array_equal(written.view(np.uint16), _round_to_bfloat16(rows))
        else:
            agrees = _is_close(to_float32(written, target, n_per_row), rows, max_error(target, weighted))
    if not agrees:
        raise ConversionError(
            f"{name}: what was written as {target} does not agree with the source ({source}); "
            "the weights don't suit this type, or memory or disk is faulty: try again, or convert to bf16"
        )


def _round_to_bfloat16(rows: np.ndarray) -> np.ndarray:
    bits = rows.view(np.uint32)
    rounded = (bits >> 16) & 1
    rounded += 0x7FFF
    rounded += bits
    return (rounded >> 16).astype(np.uint16)


def max_error(type_name: str, weighted: bool) -> float:
    """Root of the summed squared errors, relative to that of the weights, that this type may show."""
    limit = _MAX_ERROR[type_name]
    return max(limit, min(_WEIGHTED * limit, _NO_CLOSER)) if weighted else limit


def _is_close(found: np.ndarray, rows: np.ndarray, limit: float) -> bool:
    """Whether their difference, which takes the place of ``found``, is within the limit."""
    squares = _row_squares(rows)
    suspects = np.flatnonzero(squares == 0)  # zeros, or so small that their squares vanish
    empty = suspects[~rows[suspects].any(axis=1)]
    if len(empty) and found[empty].any():
        return False
    np.subtract(found, rows, out=found)
    error = float(_row_squares(found).sum(dtype=np.float64)) ** 0.5
    return error <= limit * float(squares.sum(dtype=np.float64)) ** 0.5 + _ABSOLUTE_ERROR * rows.size**0.5


def _row_squares(rows: np.ndarray) -> np.ndarray:
    """Sum of squares of each row: (n_rows,)."""
    with np.errstate(all="ignore"):
        squares = np.einsum("ij,ij->i", rows, rows)
    if not np.isfinite(squares).all():  # beyond float32; einsum converts in small pieces, without a copy
        squares = np.einsum("ij,ij->i", rows, rows, dtype=np.float64)
    return squares
