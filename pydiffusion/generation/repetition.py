"""Where a text that only repeats itself begins to."""

from __future__ import annotations

import numpy as np

# A text ends in a loop when its last tokens, so many at least, are one block so many times over. No ordinary
# list or table does: their lines differ. A matrix of zeros of this size would.
_LOOP_TOKENS = 128
_LOOP_PASSES = 4


def loop_start(tokens: np.ndarray) -> int | None:
    """Where the second pass of the loop begins that these tokens end in; None where they don't."""
    n = len(tokens)
    for period in range(1, n // _LOOP_PASSES + 1):
        n_equal = max(_LOOP_TOKENS, _LOOP_PASSES * period) - period
        if n < n_equal + period:
            break
        if np.array_equal(tokens[n - n_equal :], tokens[n - n_equal - period : n - period]):
            differing = np.flatnonzero(tokens[period:] != tokens[:-period])
            return period + (int(differing[-1]) + 1 if len(differing) else 0)
    return None
