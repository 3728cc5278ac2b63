"""Matmul kernels against numpy, for every weight type that they take."""

from __future__ import annotations

import numpy as np
import pytest
from support.kernels import OWN_KERNELS, needs

from pydiffusion import _native

TYPES = (
    "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "IQ4_XS", "MXFP4", "Q2_K", "Q3_K", "Q4_K",
    "Q5_K", "Q6_K",
)  # fmt: skip


def bfloat16(x: np.ndarray) -> np.ndarray:
    """To the nearest bfloat16, halves to even; still float32."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def weights(type: str, n_rows: int, n_inner: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = (rng.standard_normal((n_rows, n_inner)) * rng.uniform(0.01, 3.0, (n_rows, 1))).astype(np.float32)
    return _native.quantize_rows(rows, type, 1, np.ones(n_inner, np.float32))


def activations(n: int, n_inner: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, n_inner)).astype(np.float32)


def exact(rows: np.ndarray, type: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The matmul of operands rounded to bfloat16, in float64, and the sum of its terms' magnitudes."""
    w = bfloat16(_native.dequantize_rows(rows, type, x.shape[1])).astype(np.float64)
    b = bfloat16(x).astype(np.float64)
    return b @ w.T, np.abs(b) @ np.abs(w).T


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("kernels", OWN_KERNELS)
def test_matmul_equals_that_of_bfloat16_operands(kernels: str, type: str) -> None:
    """No error but that of float32 sums: unpacking, layout and rounding are right to the bit."""
    n_inner = 512
    rows, x = weights(type, 40, n_inner), activations(19, n_inner)
    expected, sizes = exact(rows, type, x)
    found = _native.testing.matmul(kernels, rows, type, x)
    assert np.all(np.abs(found - expected) <= 2.0**-20 * sizes + 1e-30)


@pytest.mark.parametrize("type", [*TYPES, "F32", "F16"])
def test_ggml_matmul_is_near_the_exact_one(type: str) -> None:
    """ggml rounds activations to 8-bit blocks, or to the type of the weights."""
    rows, x = weights(type, 40, 512), activations(19, 512)
    w = _native.dequantize_rows(rows, type, 512).astype(np.float64)
    expected = x.astype(np.float64) @ w.T
    error = np.abs(_native.testing.matmul("ggml", rows, type, x) - expected).mean()
    bound = {"F32": 1e-6, "F16": 1e-3, "BF16": 1e-2}.get(type, 1e-2)
    assert error <= bound * np.abs(expected).mean()


@pytest.mark.parametrize("kernels", OWN_KERNELS)
@pytest.mark.parametrize(
    ("n_rows", "n_tokens", "n_inner", "n_threads"),
    [
        (1, 1, 32, 1),
        (16, 16, 64, 1),
        (17, 33, 96, 2),
        (64, 15, 800, 3),
        (289, 257, 352, 2),
        (700, 5, 1056, 4),
    ],
)
def test_matmul_of_any_size(kernels: str, n_rows: int, n_tokens: int, n_inner: int, n_threads: int) -> None:
    rows, x = weights("Q8_0", n_rows, n_inner), activations(n_tokens, n_inner)
    expected, sizes = exact(rows, "Q8_0", x)
    found = _native.testing.matmul(kernels, rows, "Q8_0", x, n_threads=n_threads)
    assert found.shape == (n_tokens, n_rows)
    assert np.all(np.abs(found - expected) <= 2.0**-20 * sizes)


@pytest.mark.parametrize("kernels", OWN_KERNELS)
@pytest.mark.parametrize("n_inner", [1, 31, 33, 269, 4304])
def test_rows_of_bfloat16_of_any_length(kernels: str, n_inner: int) -> None:
    rows, x = weights("BF16", 40, n_inner), activations(19, n_inner)
    expected, sizes = exact(rows, "BF16", x)
    found = _native.testing.matmul(kernels, rows, "BF16", x, n_threads=2)
    assert np.all(np.abs(found - expected) <= 2.0**-20 * sizes)


@pytest.mark.parametrize("kernels", OWN_KERNELS)
def test_a_tokens_result_does_not_depend_on_other_tokens(kernels: str) -> None:
    """Nor on the number of threads: batching and chunked prompts rely on it."""
    rows, x = weights("Q4_K", 300, 768), activations(70, 768)
    together = _native.testing.matmul(kernels, rows, "Q4_K", x, n_threads=2)
    for first, n in ((0, 1), (3, 20), (17, 40), (69, 1)):
        some = _native.testing.matmul(kernels, rows, "Q4_K", x[first : first + n])
        assert np.array_equal(some, together[first : first + n])


@pytest.mark.parametrize("kernels", OWN_KERNELS)
@pytest.mark.parametrize(
    ("n_tokens", "n_experts", "n_used"), [(1, 4, 2), (40, 8, 3), (300, 3, 2), (7, 128, 8)]
)
def test_matmul_by_expert(kernels: str, n_tokens: int, n_experts: int, n_used: int) -> None:
    """Each token through its experts' matrices equals a plain matmul with one of them."""
    n_inner, n_rows = 256, 50
    rows, x = weights("Q4_K", n_experts * n_rows, n_inner), activations(n_tokens, n_inner)
    rng = np.random.default_rng(2)
    chosen = np.array([rng.permutation(n_experts)[:n_used] for _ in range(n_tokens)], np.int32)
    chosen[: n_tokens // 2] = chosen[0]  # one expert has many tokens, some have none
    found = _native.testing.matmul(kernels, rows, "Q4_K", x, chosen, n_experts, n_threads=2)
    found = found.reshape(n_tokens, n_used, n_rows)
    for expert in range(n_experts):
        token, used = np.nonzero(chosen == expert)
        if len(token):
            alone = _native.testing.matmul(
                kernels, rows[expert * n_rows : (expert + 1) * n_rows], "Q4_K", np.ascontiguousarray(x[token])
            )
            assert np.array_equal(found[token, used], alone)


@pytest.mark.parametrize("kernels", OWN_KERNELS)
@pytest.mark.parametrize("type", ["F32", "F16", "TQ1_0"])
def test_other_types_use_ggml(kernels: str, type: str) -> None:
    rows, x = weights(type, 20, 256), activations(9, 256)
    expected = _native.testing.matmul("ggml", rows, type, x)
    assert np.array_equal(_native.testing.matmul(kernels, rows, type, x), expected)


@pytest.mark.parametrize("kernels", OWN_KERNELS)
def test_nan_stays_in_its_token(kernels: str) -> None:
    rows, x = weights("Q8_0", 33, 64), activations(20, 64)
    clean = _native.testing.matmul(kernels, rows, "Q8_0", x)
    x[5, 3] = np.nan
    found = _native.testing.matmul(kernels, rows, "Q8_0", x)
    assert np.isnan(found[5]).all()
    assert np.array_equal(np.delete(found, 5, 0), np.delete(clean, 5, 0))


@needs("amx")
@pytest.mark.parametrize(
    ("type", "n_tokens", "n_rows", "n_inner"),
    [
        (type, *shape)
        for type in ("BF16", "Q8_0", "Q4_K", "Q6_K")
        for shape in ((1, 1, 256), (40, 300, 512), (256, 1100, 256))
    ]
    + [("BF16", 40, 300, n_inner) for n_inner in (48, 272)],  # rows that end within a tile
)
def test_soft_embedding_sums_keep_16_bits_of_a_probability(
    type: str, n_tokens: int, n_rows: int, n_inner: int
) -> None:
    """Against float64, with the embedding's rows rounded as the matmuls round them."""
    rng = np.random.default_rng(3)
    p = rng.exponential(size=(n_tokens, n_rows)).astype(np.float32) ** 4
    p /= p.sum(axis=1, keepdims=True)
    rows = weights(type, n_rows, n_inner)
    w = bfloat16(_native.dequantize_rows(rows, type, n_inner)).astype(np.float64)
    found = _native.testing.weighted_sums(p, rows, type, n_inner)
    bound = 2.0**-16 * (p.astype(np.float64) @ np.abs(w))
    assert np.all(np.abs(found - p.astype(np.float64) @ w) <= bound + 1e-30)


def test_invalid_arguments() -> None:
    rows, x = weights("Q8_0", 1, 32), activations(1, 32)
    with pytest.raises(ValueError, match="there are no kernels 'x'"):
        _native.testing.matmul("x", rows, "Q8_0", x)
    with pytest.raises(ValueError, match="different lengths"):
        _native.testing.matmul("ggml", rows, "Q8_0", activations(1, 64))
    with pytest.raises(ValueError, match="there is no expert"):
        _native.testing.matmul("ggml", rows, "Q8_0", x, np.array([[1]], np.int32))
