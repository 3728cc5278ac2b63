"""Device kernels one by one, on the CPU (device "host") and on every GPU."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from pydiffusion import _native, devices, sampling

pytestmark = pytest.mark.parametrize("device", ["host", *(device.name for device in devices())])


@pytest.mark.parametrize("n_vocab", [1, 31, 1024, 1025, 5000, 40_000])
@pytest.mark.parametrize("spread", [0.0, 1.0, 12.0])
def test_measure_equals_the_samplers(device: str, n_vocab: int, spread: float) -> None:
    """The GPU kernel's reduction over threads and warps, against the CPU's sampler."""
    rng = np.random.default_rng(n_vocab)
    logits = (rng.normal(size=(3, n_vocab)) * spread).astype(np.float32)
    u = rng.random(3, dtype=np.float32)
    capped, argmax, entropy, sampled = _native.testing.measure_on(device, logits, 30.0, 0.6, u)
    # tanhf is accurate to 2 units in the last place, on a GPU as here: 4e-7 with the roundings around it.
    np.testing.assert_allclose(capped, 30 * np.tanh(logits.astype(np.float64) / 30), rtol=1e-6, atol=1e-6)
    expected = sampling.measure(capped, 0.6, u)
    assert argmax.tolist() == expected[0].tolist()
    np.testing.assert_allclose(entropy, expected[1], rtol=2e-5, atol=2e-5)
    p = np.exp((capped - capped.max(-1, keepdims=True)).astype(np.float64) / 0.6)
    cdf = np.cumsum(p / p.sum(-1, keepdims=True), axis=-1)
    for row in range(3):
        token = sampled[row]
        below = cdf[row, token - 1] if token else 0.0
        assert below - 1e-5 <= u[row] <= cdf[row, token] + 1e-5


def test_measure_detects_nonfinite_logits(device: str) -> None:
    rows = np.zeros((4, 3000), dtype=np.float32)
    rows[0, 2999], rows[1, 5], rows[2] = np.nan, np.inf, -np.inf
    rows[3, :] = -np.inf
    rows[3, 17] = 1.0
    u = np.full(4, 0.5, np.float32)
    _, argmax, entropy, sampled = _native.testing.measure_on(device, rows, 30.0, 1.0, u)
    assert np.isnan(entropy[:2]).all()
    # Capping makes -infinity finite: equal logits are equally likely, and one larger by 31 is certain.
    assert entropy[2] == pytest.approx(np.log(3000), rel=1e-4)
    assert (argmax[3], sampled[3]) == (17, 17) and 0 <= entropy[3] < 1e-6


@pytest.mark.parametrize("dropped_mass", [0.0, 1e-4, 1e-2])
def test_condition_drops_at_most_the_dropped_mass(device: str, dropped_mass: float) -> None:
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(5, 4000)) * np.array([[0.1], [1], [4], [9], [30]])).astype(np.float32)
    embedding = rng.normal(size=(4000, 48)).astype(np.float32)
    soft = _native.testing.condition_on(device, logits, embedding, 0.7, dropped_mass)
    z = logits.astype(np.float64) / np.float32(0.7)
    p = np.exp(z - z.max(-1, keepdims=True))
    exact = (p / p.sum(-1, keepdims=True)) @ embedding
    half = 0.0 if device == "host" else 1e-3  # flat rows go through float16
    slack = dropped_mass * np.abs(embedding).max() + 2e-5 + half * np.abs(exact).max()
    assert np.abs(soft - exact).max() <= slack


def exact_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, head_dim: int, visible: np.ndarray | None = None
) -> np.ndarray:
    """In float64; q (n_tokens, width), k and v (n_rows, less of it), each key head for a group of queries;
    which rows each token sees (n_tokens, n_rows), if not all.
    """
    n_head, n_head_kv = q.shape[1] // head_dim, k.shape[1] // head_dim
    out = np.empty(q.shape)
    for head in range(n_head):
        of_q = slice(head * head_dim, (head + 1) * head_dim)
        at = head * n_head_kv // n_head
        of_k = slice(at * head_dim, (at + 1) * head_dim)
        scores = q[:, of_q].astype(np.float64) @ k[:, of_k].T
        if visible is not None:
            scores[~visible] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, of_q] = weights / weights.sum(-1, keepdims=True) @ v[:, of_k]
    return out


@pytest.mark.parametrize(("head_dim", "n_head_kv"), [(64, 1), (128, 2), (256, 8), (512, 2)])
@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0"])
def test_attention_kernel(
    device: str, kv_type: str, head_dim: int, n_head_kv: int, report: Callable[[str], None]
) -> None:
    """The head sizes of released models, over each cache type: by flash attention, and by the matmuls used
    where a device has none. The reference rounds keys and values as the cache does.
    """
    rng = np.random.default_rng(head_dim)
    n_head, n_tokens, n_rows, n_visible = 2 * n_head_kv, 20, 512, 300
    q, k, v = (
        rng.normal(size=(n, heads * head_dim)).astype(np.float32)
        for n, heads in ((n_tokens, n_head), (n_rows, n_head_kv), (n_rows, n_head_kv))
    )
    q *= 2 * head_dim**-0.5  # as steep a softmax for every size
    rounded = [
        _native.dequantize_rows(_native.quantize_rows(x, kv_type), kv_type, x.shape[1]) for x in (k, v)
    ]
    exact = exact_attention(q, rounded[0][:n_visible], rounded[1][:n_visible], head_dim)
    for kernel in ("flash", "matmul"):
        result = _native.testing.attend_on(device, q, k, v, head_dim, kv_type, n_visible, kernel)
        worst = np.abs(result - exact).max()
        report(f"device {device}, attention over {kv_type}, heads of {head_dim}, {kernel}: {worst:.1e}")
        exact_sums = kv_type == "f32" or (kernel == "matmul" and kv_type == "q8_0")
        assert worst <= (SUMS_BOUND if exact_sums else ATTENTION_BOUND[kv_type])


@pytest.mark.parametrize(("head_dim", "n_head_kv"), [(256, 8), (256, 1), (512, 2)])
@pytest.mark.parametrize(("n_tokens", "n_visible"), [(3, 5), (70, 300), (256, 1279)])
@pytest.mark.parametrize("window", [0, 100])
def test_own_attention_kernel(
    device: str, head_dim: int, n_head_kv: int, n_tokens: int, n_visible: int, window: int
) -> None:
    """Rows that fill no tile, keys split among blocks, windows; rows that nobody sees are NaN. A device that
    can't run it says so.
    """
    rng = np.random.default_rng(head_dim)
    n_rows, n_head = 1536, 2 * n_head_kv
    q, k, v = (
        rng.normal(size=(n, heads * head_dim)).astype(np.float32)
        for n, heads in ((n_tokens, n_head), (n_rows, n_head_kv), (n_rows, n_head_kv))
    )
    q *= 2 * head_dim**-0.5
    k[n_visible:] = v[n_visible:] = np.nan
    position = n_visible - n_tokens
    try:
        result = _native.testing.attend_on(
            device, q, k, v, head_dim, "f16", n_visible, "own", position, window
        )
    except ValueError as error:
        assert "no attention kernel of ours" in str(error)
        if "host" not in device:
            pytest.skip(f"NOT CHECKED: our attention on {device}, which has no kernel of ours for it")
        return
    visible = np.ones((n_tokens, n_visible), bool)
    if window:
        age = np.arange(position, n_visible)[:, None] - np.arange(n_visible)
        visible = (age >= 0) & (age < window)
    seen_k, seen_v = (x[:n_visible].astype(np.float16).astype(np.float64) for x in (k, v))
    exact = exact_attention(q, seen_k, seen_v, head_dim, visible)
    assert np.abs(result - exact).max() <= ATTENTION_BOUND["f16"]
    again = _native.testing.attend_on(device, q, k, v, head_dim, "f16", n_visible, "own", position, window)
    assert np.array_equal(again, result)


#: Types with expert matmuls of our own.
OWN_TYPES = ("Q4_K", "Q6_K", "Q8_0")


@pytest.mark.parametrize("n_rows", [200, 320])  # 320 can be repacked
@pytest.mark.parametrize("kernels", ["cuda", "ggml"])
@pytest.mark.parametrize("type", [*OWN_TYPES, "Q5_K", "F32"])
def test_expert_matmul(
    device: str, type: str, kernels: str, n_rows: int, report: Callable[[str], None]
) -> None:
    """Experts with no, few and many of the tokens, rows that fill no tile, against dequantized weights in
    float64: ours rounds activations to 11 bits, ggml's to 8 in blocks. A device that can't run ours says so.
    """
    rng = np.random.default_rng(4)
    n_experts, n_inner, n_tokens, n_used = 16, 768, 70, 4
    w = rng.normal(size=(n_experts * n_rows, n_inner)).astype(np.float32)
    rows = _native.quantize_rows(w, type)
    w = _native.dequantize_rows(rows, type, n_inner).astype(np.float64).reshape(n_experts, n_rows, n_inner)
    x = rng.normal(size=(n_tokens, n_inner)).astype(np.float32)
    chosen = np.array([rng.permutation(n_experts - 1)[:n_used] for _ in range(n_tokens)], np.int32)
    chosen[:40] = chosen[0]
    try:
        found = _native.testing.matmul(kernels, rows, type, x, chosen, n_experts, device=device)
    except ValueError as error:
        refused = f'{device} can\'t run the kernels "cuda": choose auto or ggml'
        assert kernels == "cuda" and str(error) == refused
        return
    found = found.reshape(n_tokens, n_used, n_rows)
    expected = np.einsum("turi,ti->tur", w[chosen], x.astype(np.float64))
    error = np.abs(found - expected).mean() / np.abs(expected).mean()
    report(
        f"device {device}, expert matmul of {type}, {n_rows} rows, kernels {kernels}: {error:.1e} of the mean"
    )
    if kernels == "cuda" and type in OWN_TYPES and device != "host":  # which computes expert matmuls by ggml
        assert error <= 4e-4
    else:
        assert error <= 1e-5 if type == "F32" else 1e-3 <= error <= 2e-2


#: Twice what was measured on the CPU, on results of up to 4. There ggml accumulates float16 in float16, and
#: rounds queries where keys have 8 bits; its kernel breaks ties of 8 bits otherwise than its quantizer.
ATTENTION_BOUND = {"f16": 2e-2, "q8_0": 6e-2}
SUMS_BOUND = 2e-3
