"""Measurements in turns, and how sure a ratio of two of them is."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydiffusion import _native
from pydiffusion._util.sampler_options import ENTROPY_BOUND_DEFAULTS


@dataclass(frozen=True)
class Ratio:
    """Median of the ratios of paired measurements, and the interval that contains the true one with at least
    95% probability, whatever their distribution; None for fewer than 6 pairs, too few to say.
    """

    median: float
    interval: tuple[float, float] | None
    n_pairs: int

    @property
    def beyond_noise(self) -> bool | None:
        """Whether the interval leaves out 1."""
        return None if self.interval is None else not self.interval[0] <= 1 <= self.interval[1]

    def __str__(self) -> str:
        if self.interval is None:
            return f"{self.median:.2f} ({self.n_pairs} pairs: too few to tell from noise)"
        noise = "beyond the noise" if self.beyond_noise else "within the noise"
        low, high = self.interval
        return f"{self.median:.2f} (95% interval {low:.2f} to {high:.2f} of {self.n_pairs} pairs: {noise})"


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """Ratio of measurements, the i-th of both taken one right after the other."""
    ratios = sorted(a / b for a, b in zip(numerators, denominators, strict=True))
    n = len(ratios)
    # The true median is outside of the i-th smallest to the i-th largest if fewer than i are below, or above.
    outside, i = 2 * 0.5**n, 0
    while outside <= 0.05:
        i += 1
        outside += 2 * math.comb(n, i) * 0.5**n
    return Ratio(statistics.median(ratios), (ratios[i - 1], ratios[-i]) if i else None, n)


def alternate(
    works: Sequence[Callable[[], float]], n_rounds: int, after_each: Callable[[], object] = lambda: None
) -> list[list[float]]:
    """Run all works in each round, in the opposite order in every other one (A B B A); results by work."""
    results: list[list[float]] = [[] for _ in works]
    for i_round in range(n_rounds):
        order = range(len(works))
        for i in order if i_round % 2 == 0 else reversed(order):
            results[i].append(works[i]())
            after_each()
    return results


def seconds_of(work: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def begin_steps(session: _native.Session, n_steps: int, seed: int) -> Callable[[], float]:
    """Begin a generation whose first canvas takes all of ``n_steps``; returns a function that runs one and
    returns its seconds. The first has no self-conditioning.
    """
    endless = {"steps": n_steps, "stability_threshold": n_steps, "confidence_threshold": 0.0}
    session.begin(max_tokens=1, seed=seed, eos=[], **{**ENTROPY_BOUND_DEFAULTS, **endless})
    return lambda: seconds_of(session.next_step)
