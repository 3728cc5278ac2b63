"""Repetition check: finds a text that has started to loop."""

from __future__ import annotations

import numpy as np

# A text loops if at least its last _LOOP_TOKENS tokens are a block repeated at least _LOOP_PASSES times.
# Ordinary lists and tables don't, since their lines differ; a matrix of zeros of this size would.
_LOOP_TOKENS = 128
_LOOP_PASSES = 4


def loop_start(tokens: np.ndarray) -> int | None:
    """Index of the second repetition of the block that these tokens end with; None if they don't loop."""
    n = len(tokens)
    for period in range(1, n // _LOOP_PASSES + 1):
        n_equal = max(_LOOP_TOKENS, _LOOP_PASSES * period) - period
        if n < n_equal + period:
            break
        if np.array_equal(tokens[n - n_equal :], tokens[n - n_equal - period : n - period]):
            differing = np.flatnonzero(tokens[period:] != tokens[:-period])
            return period + (int(differing[-1]) + 1 if len(differing) else 0)
    return None
