"""The sampler against arithmetic by hand, numpy in float64, and its generator's published vectors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pydiffusion import _native, sampling

QUARTERS = np.log([[0.5, 0.25, 0.125, 0.125]])


def reference_measure(logits: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Entropy and cumulative distribution in float64."""
    z = logits.astype(np.float64) / temperature
    z -= z.max(axis=-1, keepdims=True)
    weights = np.exp(z)
    p = weights / weights.sum(axis=-1, keepdims=True)
    entropy = -np.sum(np.where(p > 0, p * np.log(np.maximum(p, 1e-300)), 0), axis=-1)
    return entropy, np.cumsum(p, axis=-1)


def test_temperature_is_linear_in_the_step() -> None:
    assert sampling.temperature(48, 48, 0.4, 0.8) == pytest.approx(0.8)
    assert sampling.temperature(24, 48, 0.4, 0.8) == pytest.approx(0.6)
    assert sampling.temperature(1, 4, 0.4, 0.8) == pytest.approx(0.5)


@pytest.mark.parametrize("step", [0, 5, -1])
def test_temperature_refuses_steps_outside_the_schedule(step: int) -> None:
    with pytest.raises(ValueError, match="steps count down from 4 to 1"):
        sampling.temperature(step, 4, 0.4, 0.8)


def test_measure_by_hand() -> None:
    argmax, entropy, _ = sampling.measure(QUARTERS, 1.0, [0.0])
    assert argmax.tolist() == [0]
    assert entropy[0] == pytest.approx(1.75 * math.log(2), abs=1e-6)  # 1/2*1 + 1/4*2 + 2*1/8*3 bits


@pytest.mark.parametrize(
    ("u", "token"),
    [(0.0, 0), (0.49, 0), (0.51, 1), (0.74, 1), (0.76, 2), (0.87, 2), (0.88, 3), (0.9999999, 3)],
)
def test_draw_is_the_inverse_cdf_in_vocabulary_order(u: float, token: int) -> None:
    assert sampling.measure(QUARTERS, 1.0, [u])[2].tolist() == [token]


def test_temperature_divides_the_logits() -> None:
    # At temperature 1/2 the probabilities square: 16 : 4 : 1 : 1.
    _, entropy, sampled = sampling.measure(np.tile(QUARTERS, (2, 1)), 0.5, [16 / 22 - 1e-4, 16 / 22 + 1e-4])
    p = np.array([16, 4, 1, 1]) / 22
    assert entropy == pytest.approx(-(p * np.log(p)).sum(), abs=1e-6)
    assert sampled.tolist() == [0, 1]


def test_a_flat_row_has_the_entropy_of_its_size_and_the_first_argmax() -> None:
    argmax, entropy, sampled = sampling.measure(np.zeros((1, 4096)), 0.7, [0.5])
    assert (argmax[0], sampled[0]) == (0, 2048)
    assert entropy[0] == pytest.approx(math.log(4096), rel=1e-6)


def test_a_certain_row_has_no_entropy() -> None:
    row = np.full((1, 70_000), -30.0)
    row[0, 65_432] = 30.0
    argmax, entropy, sampled = sampling.measure(row, 0.4, [0.999])
    assert (argmax[0], sampled[0]) == (65_432, 65_432)
    assert 0.0 <= entropy[0] < 1e-6


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n_vocab=st.sampled_from([1, 2, 3, 15, 16, 17, 100, 2048, 2049, 5000]),
    spread=st.floats(0.0, 12.0),
    temperature=st.floats(0.05, 3.0),
)
def test_measure_agrees_with_float64(seed: int, n_vocab: int, spread: float, temperature: float) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(4, n_vocab)) * spread).astype(np.float32)
    u = rng.random(4, dtype=np.float32)
    argmax, entropy, sampled = sampling.measure(logits, temperature, u)
    expected_entropy, cdf = reference_measure(logits, np.float32(temperature))
    assert argmax.tolist() == logits.argmax(axis=-1).tolist()
    np.testing.assert_allclose(entropy, expected_entropy, atol=2e-5, rtol=2e-5)
    for row in range(4):  # the draw's own interval contains u, up to float32's rounding
        token = sampled[row]
        below = cdf[row, token - 1] if token else 0.0
        assert below - 1e-5 <= u[row] <= cdf[row, token] + 1e-5


@pytest.mark.parametrize("spread", [1.0, 12.0, 60.0])
@pytest.mark.parametrize("n_vocab", [7, 300, 5000])
def test_capping_agrees_with_float64(n_vocab: int, spread: float) -> None:
    """Logits all within the cap, and some beyond it: two formulas compute them."""
    rng = np.random.default_rng(n_vocab)
    logits = (rng.normal(size=(4, n_vocab)) * spread).astype(np.float32)
    logits[2, 3] = -np.inf
    u = rng.random(4, dtype=np.float32)
    capped, argmax, entropy, sampled = _native.testing.measure_on("cpu", logits, 30.0, 0.7, u)
    exact = 30.0 * np.tanh(logits.astype(np.float64) / 30.0)
    np.testing.assert_allclose(capped, exact, atol=1e-5)
    expected_entropy, cdf = reference_measure(capped, np.float32(0.7))
    assert argmax.tolist() == capped.argmax(axis=-1).tolist()
    np.testing.assert_allclose(entropy, expected_entropy, atol=2e-5, rtol=2e-5)
    for row, token in enumerate(sampled):
        assert (cdf[row, token - 1] if token else 0.0) - 1e-5 <= u[row] <= cdf[row, token] + 1e-5


def test_equal_logits_are_capped_equally() -> None:
    row = np.zeros((1, 4096), dtype=np.float32)
    row[0, [5, 3000]] = 20.0
    row[0, 6] = -90.0  # beyond the cap, beside the first of the two
    capped, argmax, _, _ = _native.testing.measure_on("cpu", row, 30.0, 1.0, np.zeros(1, dtype=np.float32))
    assert capped[0, 5] == capped[0, 3000] and argmax[0] == 5


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("at", [0, 299, 2500])
def test_capping_does_not_hide_nonfinite_logits(at: int, bad: float) -> None:
    row = np.zeros((1, 2501), dtype=np.float32)
    row[0, at] = bad
    assert np.isnan(_native.testing.measure_on("cpu", row, 30.0, 1.0, np.zeros(1, dtype=np.float32))[2][0])


def test_draws_have_the_distribution() -> None:
    u, _ = sampling.draws(seed=1, canvas_index=0, step=1, n=100_000, n_vocab=4)
    sampled = sampling.measure(np.repeat(QUARTERS, 100_000, axis=0), 1.0, u)[2]
    share = np.bincount(sampled, minlength=4) / 100_000
    np.testing.assert_allclose(
        share, [0.5, 0.25, 0.125, 0.125], atol=0.006
    )  # nearly four standard deviations


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_show_as_nan_entropy(bad: float) -> None:
    row = np.zeros((1, 40))
    row[0, 17] = bad
    assert np.isnan(sampling.measure(row, 1.0, [0.5])[1][0])


def test_measure_refuses_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="temperature must be positive"):
        sampling.measure(QUARTERS, 0.0, [0.5])
    with pytest.raises(ValueError, match=r"u must be in \[0, 1\)"):
        sampling.measure(QUARTERS, 1.0, [1.0])
    with pytest.raises(ValueError, match="u has 2 entries for 1 rows"):
        sampling.measure(QUARTERS, 1.0, [0.5, 0.5])
    with pytest.raises(ValueError, match="dimensions"):
        sampling.measure(QUARTERS[0], 1.0, [0.5])


def test_accept_leaves_the_candidate_itself_out_of_the_sum() -> None:
    # ascending: 0.01 (sum before: 0), 0.05 (0.01), 0.06 (0.06), 0.5 (0.12 > 0.1)
    assert sampling.accept([0.5, 0.05, 0.01, 0.06], 0.1).tolist() == [False, True, True, True]


def test_accept_always_takes_the_most_certain_position() -> None:
    assert sampling.accept([3.0, 2.0, 5.0], 0.1).tolist() == [False, True, False]
    assert sampling.accept([3.0, 2.0, 5.0], 0.0).tolist() == [False, True, False]


def test_accept_takes_all_under_a_huge_bound_and_equal_entropies_in_order() -> None:
    assert sampling.accept([1.0, 2.0, 3.0], 1e9).all()
    assert sampling.accept([1.0, 1.0, 1.0], 1.0).tolist() == [True, True, False]
    assert sampling.accept([], 0.1).tolist() == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 5, width=32), min_size=1, max_size=40), st.floats(0, 5))
def test_accept_agrees_with_the_rule_written_out(entropy: list[float], bound: float) -> None:
    order = np.argsort(entropy, kind="stable")
    before = np.concatenate([[0.0], np.cumsum(np.array(entropy, np.float64)[order])[:-1]])
    expected = np.zeros(len(entropy), bool)
    expected[order[before <= np.float32(bound)]] = True
    assert sampling.accept(entropy, bound).tolist() == expected.tolist()


def philox_words(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 written from the paper, on Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_the_python_generator_gives_the_published_vectors() -> None:
    ones = 0xFFFFFFFF
    assert philox_words([0] * 4, [0, 0]) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox_words([ones] * 4, [ones, ones]) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 7, 2**64 - 1])
def test_draws_are_philox(seed: int) -> None:
    u, tokens = sampling.draws(seed, canvas_index=3, step=9, n=5, n_vocab=262_144)
    for position in range(5):
        words = philox_words([position, 9, 3, 0], [seed & 0xFFFFFFFF, seed >> 32])
        assert u[position] == (words[0] >> 8) * 2.0**-24
        assert tokens[position] == words[1] * 262_144 >> 32
