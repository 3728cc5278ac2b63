"""Values and packing of the codes of quantized weights.

Sources: E4M3 and E5M2, the OCP 8-bit floating point specification 1.0; E2M1 and E8M0, the OCP microscaling
formats specification 1.0.
"""

from __future__ import annotations

import numpy as np


def _e4m3() -> np.ndarray:
    """Four bits of exponent (bias 7), three of mantissa; all ones is NaN, there is no infinity."""
    code = np.arange(128)
    exponent, mantissa = code >> 3, code & 7
    values = np.where(
        exponent == 0, np.ldexp(mantissa / 8, -6), np.ldexp(1 + mantissa / 8, exponent - 7)
    ).astype(np.float32)
    values[127] = np.nan
    return np.concatenate([values, -values])


# Values by code: (256,) float32.
E4M3 = _e4m3()
E5M2 = (np.arange(256, dtype=np.uint16) << 8).view(np.float16).astype(np.float32)  # the top byte of a float16
E8M0 = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan)).astype(np.float32)
_E2M1_POSITIVE = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
# (16,) float32
E2M1 = np.concatenate([_E2M1_POSITIVE, -_E2M1_POSITIVE])

# dtypes of safetensors whose elements are codes -> their values.
BYTE_FLOATS = {"F8_E4M3": E4M3, "F8_E5M2": E5M2, "F8_E8M0": E8M0}


def nibbles(data: np.ndarray) -> np.ndarray:
    """Two codes per byte, the lower half first: (n_rows, n) uint8 -> (n_rows, 2 n) uint8."""
    pairs = np.empty((*data.shape, 2), np.uint8)
    pairs[..., 0], pairs[..., 1] = data & 15, data >> 4
    return pairs.reshape(len(data), -1)


def unpack_words(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Codes in words of 32 bits, ``32 // bits`` in each from its lowest bits, the rest of a word unused:
    (n_rows, n_words) uint32 -> (n_rows, count) uint32.
    """
    shifts = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
    codes = (words[..., None] >> shifts) & np.uint32(2**bits - 1)
    return codes.reshape(len(words), -1)[:, :count]


def unpack_stream(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes in words of 32 bits without gaps, from the lowest bits, across the words' borders; bits at the
    end that are no whole code are left out: (n_rows, n_words) uint32 -> (n_rows, 32 n_words // bits) uint32.
    """
    if 32 % bits == 0:
        return unpack_words(words, bits, words.shape[-1] * (32 // bits))
    count = words.shape[-1] * 32 // bits
    stream = np.unpackbits(
        np.ascontiguousarray(words, "<u4").view(np.uint8).reshape(len(words), -1), axis=-1, bitorder="little"
    )
    groups = stream[:, : count * bits].reshape(len(words), count, bits).astype(np.uint32)
    return groups @ (np.uint32(1) << np.arange(bits, dtype=np.uint32))


def to_ggml_halves(codes: np.ndarray, group: int) -> np.ndarray:
    """Pack 4-bit codes as ggml's FP4 blocks do: of each ``group``, byte i has code i in its lower half and
    code i + group / 2 in its upper one. (n_rows, n) uint8 -> (n_rows, n / group, group / 2) uint8.
    """
    groups = codes.reshape(len(codes), -1, group)
    return groups[..., : group // 2] | (groups[..., group // 2 :] << 4)
