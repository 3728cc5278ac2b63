"""Parameters for tests of the matmul kernels; kernels that the CPU can't run are skipped with a reason."""

from __future__ import annotations

import pytest

from pydiffusion import _native

#: Kernels of our own -> the instructions that they need.
_NEEDS = {"avx512-bf16": "AVX-512 BF16", "amx": "AMX"}


def needs(name: str) -> pytest.MarkDecorator:
    """Skip a test where this CPU can't run these kernels; PYDIFFUSION_REQUIRE_AMX stops the run instead."""
    reason = f"NOT CHECKED: kernels {name}; this CPU has no {_NEEDS[name]}"
    return pytest.mark.skipif(name not in _native.kernels(), reason=reason)


OWN_KERNELS = [pytest.param(name, marks=needs(name)) for name in _NEEDS]
ALL_KERNELS = ["ggml", *OWN_KERNELS]
