"""Philox4x32-10 in numpy: the random draws that the native sampler makes, for replaying reference runs.

The generator is the one of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011). How the
sampler uses it: key = the seed's low and high 32 bits, counter = (position, step, canvas index, 0).
"""

from __future__ import annotations

import numpy as np

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox4x32(counter: np.ndarray, key: tuple[int, int], rounds: int = 10) -> np.ndarray:
    """Four uint32 words per counter: ``counter`` is (n, 4), so is the result."""
    c0, c1, c2, c3 = (np.asarray(counter)[:, i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (p1 >> _HALF) ^ c1 ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> _HALF) ^ c3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def draws(seed: int, canvas_index: int, step: int, n: int, n_vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """``u`` (n,) float32 in [0, 1) and ``tokens`` (n,) int32; step 0 belongs to the initial canvas."""
    counter = np.zeros((n, 4), dtype=np.uint32)
    counter[:, 0] = np.arange(n)
    counter[:, 1] = step
    counter[:, 2] = canvas_index
    out = philox4x32(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    u = (out[:, 0] >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)
    tokens = (out[:, 1].astype(np.uint64) * np.uint64(n_vocab)) >> _HALF
    return u, tokens.astype(np.int32)


def inverse_cdf(probabilities: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, float]:
    """First token whose running probability exceeds ``u``, per row; and how near a draw came to a boundary.

    ``probabilities`` is (n, n_vocab). The margin says whether rounding could have changed a token.
    """
    cdf = np.cumsum(probabilities.astype(np.float64), axis=1)
    cdf /= cdf[:, -1:]
    sampled = np.array([np.searchsorted(row, x, side="right") for row, x in zip(cdf, u, strict=True)])
    margin = float(np.abs(cdf - u[:, None].astype(np.float64)).min())
    return np.minimum(sampled, probabilities.shape[1] - 1).astype(np.int32), margin
