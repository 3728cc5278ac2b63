"""Convert rows of weights between tensor types, and check written rows against their source."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np

from pydiffusion import _native
from pydiffusion.errors import ConversionError

# Maximum relative error (root of summed squares) of a quantized chunk. About the worst case of a block, not
# the usual error (a tenth to a half of it): anything above is wrong data, not rounding. Swapped rows give
# 1.4; types with few bits come close to 1 on rows with outliers.
_MAX_ERROR = MappingProxyType(
    {"Q8_0": 0.03, "Q6_K": 0.10, "Q5_0": 0.25, "Q5_1": 0.25, "Q5_K": 0.15, "Q4_K": 0.25}
    | dict.fromkeys(("Q4_0", "Q4_1", "IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4"), 0.5)
    | dict.fromkeys(("Q3_K", "IQ3_S", "IQ3_XXS"), 0.7)
    | dict.fromkeys(("Q2_K", "IQ2_S", "IQ2_XS", "IQ2_XXS"), 0.9)
    | dict.fromkeys(("IQ1_M", "IQ1_S"), 1.0)
    | dict.fromkeys(("TQ1_0", "TQ2_0"), 1.1)
)
# With an importance matrix, columns of low importance may be rounded worse.
_WEIGHTED = 1.5
_NO_CLOSER = 1.1
# Blocks have a float16 scale, so weights below about 127 * 2**-25 may become 0.
_ABSOLUTE_ERROR = 1e-5


def row_bytes(type_name: str, n_per_row: int) -> int:
    """Bytes per row in a type. Raises ConversionError for an unknown type or one whose blocks don't divide
    the row.
    """
    try:
        _, block, size = _native.tensor_types()[type_name]
    except KeyError:
        raise ConversionError(f"tensor type {type_name!r} is not known") from None
    if n_per_row % block:
        raise ConversionError(
            f"rows of {n_per_row} weights are not a multiple of the {block} of a {type_name} block"
        )
    return n_per_row // block * size


def to_float32(data: np.ndarray, type_name: str, n_per_row: int) -> np.ndarray:
    """Dequantize: (n_rows, bytes_per_row) uint8 of any type -> (n_rows, n_per_row) float32, a view if
    possible.
    """
    if type_name == "F32":
        return data.view(np.float32)
    if type_name == "F16":
        return data.view(np.float16).astype(np.float32)
    if type_name == "BF16":
        return np.left_shift(data.view(np.uint16), 16, dtype=np.uint32).view(np.float32)
    return _native.dequantize_rows(data, type_name, n_per_row)


def convert_rows(
    data: np.ndarray,
    source: str,
    target: str,
    n_per_row: int,
    name: str,
    importance: np.ndarray | None = None,
    keeps_nonfinite: bool = False,
) -> np.ndarray:
    """Convert rows from type ``source`` to type ``target``, both (n_rows, bytes_per_row) uint8.

    Equal types are copied. ``importance``: importance of each column, (n_per_row,) float32. Raises
    ConversionError naming the tensor if a weight is out of range, or not finite (unless ``keeps_nonfinite``).
    """
    if source == target:
        if (
            source in ("F32", "F16", "BF16")
            and not keeps_nonfinite
            and has_nonfinite(data, source, n_per_row)
        ):
            raise _nonfinite(name)
        return data
    result, nonfinite = _native.convert_rows(data, source, target, n_per_row, importance, keeps_nonfinite)
    if nonfinite >= 0:
        raise _nonfinite(name)
    if target == "F16" and has_nonfinite(result, target, n_per_row):
        raise ConversionError(
            f"{name}: has weights beyond the range of F16 (65504); convert to bf16 or f32 instead"
        )
    return result


def has_nonfinite(data: np.ndarray, type_name: str, n_per_row: int) -> bool:
    """Whether any weight of (n_rows, bytes_per_row) uint8 of any type is NaN or infinite."""
    return _native.find_nonfinite(data, type_name, n_per_row) >= 0


def _nonfinite(name: str) -> ConversionError:
    return ConversionError(
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
    """Compare rows of the target with those of the source, read again. Raises ConversionError on a mismatch.

    Unquantized types must equal bit by bit what numpy (not the code that wrote them) computes from the
    source; quantized ones must be, after dequantizing, as close as their blocks allow, and zero rows (such as
    padding) must still be zeros. ``weighted``: they were quantized with an importance matrix.
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
            agrees = _is_close(written, target, rows, max_error(target, weighted))
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
    """Maximum relative error (root of summed squares) of this type."""
    limit = _MAX_ERROR[type_name]
    return max(limit, min(_WEIGHTED * limit, _NO_CLOSER)) if weighted else limit


def _is_close(written: np.ndarray, type_name: str, rows: np.ndarray, limit: float) -> bool:
    """Whether zero rows are zeros in ``written``, and the others are within the limit."""
    squares, errors = _native.row_errors(written, type_name, rows)
    if errors[squares == 0].any():
        return False
    error = float(errors.sum()) ** 0.5
    return error <= limit * float(squares.sum()) ** 0.5 + _ABSOLUTE_ERROR * rows.size**0.5
