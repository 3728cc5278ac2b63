"""Matrices of float codes with scales: FP8, NVFP4, MXFP4; and of bytes of integers (INT8)."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from pydiffusion.convert.checkpoint.quantized.codes import E2M1, nibbles, to_ggml_halves
from pydiffusion.convert.checkpoint.quantized.parts import Parts, lay_grid
from pydiffusion.convert.checkpoint.safetensors_files import StoredTensor
from pydiffusion.convert.checkpoint.weights import Blocks, ReadRows, RowsAsBytes, Weight
from pydiffusion.errors import ConversionError

_FP8_BLOCK = (128, 128)  # where the config names none
# dtype of the scales -> ggml's type of the same codes, weights per scale, weights per block of ggml.
_FP4 = {"F8_E4M3": ("NVFP4", 16, 64), "F8_E8M0": ("MXFP4", 32, 32)}
_E8M0_NAN, _E4M3_NAN = 255, 127


def dequantized(
    parts: Parts, codes: StoredTensor, shape: tuple[int, ...], rows: ReadRows, blocks: Blocks | None = None
) -> Weight:
    """A weight whose float32 rows ``rows`` computes."""

    def quiet_rows(first: int, count: int) -> np.ndarray:
        # Weights that are not finite are refused by name where they are stored.
        with np.errstate(over="ignore", invalid="ignore"):
            return rows(first, count)

    return Weight(parts.name, "F32", shape, codes.file, RowsAsBytes(quiet_rows, 4 * shape[-1]), blocks)


def byte_codes(
    parts: Parts, codes: StoredTensor, scales: StoredTensor, zeros: StoredTensor | None = None
) -> Weight:
    """One code per byte, of FP8 or an integer: weight = (code - zero) * scale."""
    shape = parts.matrix_shape(codes)
    block = parts.settings.block or _FP8_BLOCK
    values, scale = parts.rows(codes), lay_grid(parts, scales, shape, block)
    zero = None if zeros is None else lay_grid(parts, zeros, shape, block)

    def rows(first: int, count: int) -> np.ndarray:
        weights = values(first, count).astype(np.float32)
        if zero is not None:
            weights -= zero.expanded(first, count)
        weights *= scale.expanded(first, count)
        return weights

    return dequantized(parts, codes, shape, rows)


def fp4(parts: Parts, codes: StoredTensor, scales: StoredTensor, factors: np.ndarray | None = None) -> Weight:
    """Two codes of E2M1 per byte: weight = code * scale * factor.

    ``scales``: E4M3 for each 16 weights (NVFP4) or E8M0 for each 32 (MXFP4). ``factors``: (n_matrices,)
    float32, None for 1.
    """
    shape = parts.matrix_shape(codes, 2)
    ggml_type, group, block = _FP4[scales.dtype]
    wanted = [*shape[:-1], shape[-1] // group]
    if shape[-1] % group or list(scales.shape) != wanted:
        raise parts.error(
            f"{scales.name!r} has the shape {list(scales.shape)}, should be {wanted}: one scale for each "
            f"{group} weights",
            scales,
        )
    packed, scale_rows = parts.rows(codes), parts.rows(scales)

    def rows(first: int, count: int) -> np.ndarray:
        scale = scale_rows(first, count)
        if factors is not None:
            scale = scale * factors[np.arange(first, first + count) // shape[-2], None]
        weights = E2M1[nibbles(packed(first, count))].reshape(count, -1, group)
        weights *= scale[..., None]
        return weights.reshape(count, -1)

    blocks = None
    if shape[-1] % block == 0:
        read = RowsAsBytes(
            _block_rows(parts, codes, scales), shape[-1] // block * (block // 2 + block // group)
        )
        blocks = Blocks(ggml_type, read, factors)
    return dequantized(parts, codes, shape, rows, blocks)


def _block_rows(parts: Parts, codes: StoredTensor, scales: StoredTensor) -> ReadRows:
    """Rows of ggml's blocks: the scales of a block, then its codes."""
    ggml_type, group, block = _FP4[scales.dtype]
    packed, scale_codes = parts.rows(codes), parts.rows(replace(scales, dtype="U8"))
    # ggml reads E4M3 without its sign and NaN as 0, E8M0's NaN as a number.
    highest = _E4M3_NAN - 1 if ggml_type == "NVFP4" else _E8M0_NAN - 1

    def rows(first: int, count: int) -> np.ndarray:
        scale = scale_codes(first, count)
        if scale.size and scale.max() > highest:
            raise ConversionError(
                f"{scales.file}: quantized tensor {parts.name!r}: {scales.name!r} has negative scales or "
                "NaN; the checkpoint is damaged"
            )
        halves = to_ggml_halves(nibbles(packed(first, count)), group)
        n_blocks = halves.shape[1] * group // block
        return np.concatenate(
            [scale.reshape(count, n_blocks, -1), halves.reshape(count, n_blocks, -1)], axis=2
        )

    return rows


def matrix_factors(parts: Parts, tensor: StoredTensor, n_matrices: int, *, inverse: bool) -> np.ndarray:
    """The factor of each matrix: (n_matrices,) float32; ``inverse``: the tensor has what to divide by."""
    if math.prod(tensor.shape) not in (1, n_matrices):
        raise parts.error(
            f"{tensor.name!r} has the shape {list(tensor.shape)}, should have one value"
            + (f" or {n_matrices}" if n_matrices > 1 else ""),
            tensor,
        )
    values = parts.all_of(tensor).reshape(-1)
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise parts.error(f"{tensor.name!r} has values that are not positive numbers", tensor)
    with np.errstate(over="ignore"):
        factors = np.float32(1) / values if inverse else values
    if not np.isfinite(factors).all():
        raise parts.error(f"{tensor.name!r} has a value too small to divide by", tensor)
    return np.broadcast_to(factors, (n_matrices,)).astype(np.float32)


def n_matrices_of(codes: StoredTensor) -> int:
    """Number of matrices in a stack."""
    return math.prod(codes.shape[:-2])
