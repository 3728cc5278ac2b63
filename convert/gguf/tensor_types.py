"""Writable ggml tensor types: block sizes and fallbacks."""

from __future__ import annotations

from types import MappingProxyType

from pydiffusion import _native

_WRITABLE = (
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4", "NVFP4", "Q2_K", "Q3_K",
    "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS",
    "TQ1_0", "TQ2_0",
)  # fmt: skip
_TYPES = _native.tensor_types()
# Weights per block, and fallback types for rows that are not a multiple of it.
BLOCK_SIZES = MappingProxyType({name: int(_TYPES[name][1]) for name in _WRITABLE})
LARGEST_BLOCK = max(BLOCK_SIZES.values())
FALLBACKS = MappingProxyType(
    dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL")
    | dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0")
    | {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "NVFP4": "MXFP4"}
    | dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4"), "F16")
)


def fit_to_rows(type_name: str, n_per_row: int) -> str:
    """Return ``type_name``, or the first of its fallbacks whose block size divides the row."""
    while n_per_row % BLOCK_SIZES[type_name]:
        type_name = FALLBACKS[type_name]
    return type_name
