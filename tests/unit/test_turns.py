"""Measurements in turns: their order, and how sure a ratio is."""

from __future__ import annotations

import pytest

from pydiffusion.testing.turns import alternate, ratio


def test_the_order_is_turned_around_in_every_other_round() -> None:
    order = []

    def work(name: str) -> float:
        order.append(name)
        return float(len(order))

    results = alternate([lambda: work("a"), lambda: work("b")], 3, lambda: order.append("."))
    assert "".join(order) == "a.b.b.a.a.b."
    assert results == [[1, 7, 9], [3, 5, 11]]


def test_ratios_are_of_pairs() -> None:
    """A machine that slows down threefold leaves the ratio of neighbors alone."""
    slow_and_slower = [1.0, 2.0, 3.0, 1.5, 2.5, 1.0]
    found = ratio([2 * value for value in slow_and_slower], slow_and_slower)
    assert (found.median, found.interval, found.beyond_noise) == (2.0, (2.0, 2.0), True)
    assert "beyond the noise" in str(found)


@pytest.mark.parametrize("n", range(6, 13))
def test_the_interval_has_its_probability(n: int) -> None:
    """Of all 2^n ways in which n values can be above or below the true median, at least 95% have it inside,
    and an interval with one value less on both sides would not be enough.
    """
    found = ratio([float(i) for i in range(1, n + 1)], [1.0] * n)
    assert found.interval is not None
    low, high = (int(value) for value in found.interval)
    assert low + high == n + 1

    def covered(left_out: int) -> float:
        below = [bin(signs).count("1") for signs in range(2**n)]
        return sum(left_out < count < n - left_out for count in below) / 2**n

    assert covered(low - 1) >= 0.95 > covered(low)


def test_too_few_to_say() -> None:
    found = ratio([1.0] * 5, [2.0] * 5)
    assert found.interval is None and found.beyond_noise is None and found.median == 0.5
    assert "too few to tell from noise" in str(found)


def test_what_is_within_the_noise() -> None:
    found = ratio([1.0, 1.1, 0.9, 1.2, 0.8, 1.05], [1.0] * 6)
    assert found.beyond_noise is False and "within the noise" in str(found)
