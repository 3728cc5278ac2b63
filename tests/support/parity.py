"""The goldens' cases, and the bounds that logits must keep."""

from __future__ import annotations

from support.models import Difference

#: Golden file -> the checkpoint it belongs to.
SOURCES = {
    "small-f32": ("small", {"seed": 0, "dtype": "f32"}),
    "small-bf16": ("small", {"seed": 1, "dtype": "bf16"}),
    "wide-f32": ("wide", {"seed": 2, "dtype": "f32"}),
}
CASES = ("short", "long", "commit")

#: With float32 file and cache, logits of range 25; two correct float32 evaluations differ by 2e-5 on average.
MEAN_BOUND, MAX_BOUND = 1e-3, 1e-2
#: With other weights, what is left against their dequantized values is the rounding of activations, to 16
#: bits or to blocks of 8 bits. Ours may be no more than this times what the same rounding does to
#: transformers, in a canvas position of the middle.
ROUNDING_FACTOR = 1.5
#: Between two experts whose scores differ by less (in log), rounding alone decides in any float32 evaluation:
#: a few of some hundred thousand choices.
ROUTER_TIE = 1e-5
#: Twice what was measured, 0.05 to 0.21 (where another expert is chosen).
Q8_0_CACHE_MEAN = 0.5


def assert_within(difference: Difference, mean: float, worst: float, agreement: float = 1.0) -> None:
    assert difference.mean <= mean, difference
    assert difference.max <= worst, difference
    assert difference.agreement >= agreement, difference
