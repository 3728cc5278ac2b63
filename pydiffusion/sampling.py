"""The entropy-bound sampler as pure functions, for scripts and tests.

The same native code runs inside :meth:`pydiffusion.Session.generate`. The acceptance rule is that of
arXiv 2505.24857, the temperature schedule and stopping rule those of DiffusionGemma's reference.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _native

__all__ = ["accept", "draws", "measure", "temperature"]


def temperature(step: int, steps: int, t_min: float, t_max: float) -> float:
    """Temperature of a denoising step: ``t_min + (t_max - t_min) * step / steps``.

    ``step`` counts down from ``steps`` (the first, at ``t_max``) to 1 (the last). Raises ``ValueError`` for a
    step outside that range.
    """
    if not 1 <= step <= steps:
        raise ValueError(f"step is {step}; steps count down from {steps} to 1")
    return _native.step_temperature(step, steps, t_min, t_max)


def measure(
    logits: ArrayLike, temperature: float, u: ArrayLike
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.int32]]:
    """Argmax, entropy and one draw of ``softmax(logits / temperature)`` per position.

    ``logits`` has shape ``(n, n_vocab)`` and is taken as float32; ``u`` has shape ``(n,)`` with values in
    [0, 1). Returns ``(argmax, entropy, sampled)``, each of shape ``(n,)``: int32, float32 in nats, int32. A
    draw is the first token, in vocabulary order, whose cumulative probability exceeds ``u``. Rows that are
    not finite have entropy NaN. Raises ``ValueError`` for shapes that don't fit, a temperature that is not
    positive, or u out of range.
    """
    logits = np.ascontiguousarray(logits, dtype=np.float32)
    u = np.ascontiguousarray(u, dtype=np.float32)
    if logits.ndim != 2 or u.ndim != 1:
        raise ValueError(f"logits and u must have 2 and 1 dimensions, not {logits.ndim} and {u.ndim}")
    return _native.measure(logits, temperature, u)


def accept(entropy: ArrayLike, bound: float) -> NDArray[np.bool_]:
    """Positions that a step accepts: in ascending entropy, while the sum of the preceding ones is <= bound.

    ``entropy`` has shape ``(n,)``, in nats. Returns bool ``(n,)``. The position of lowest entropy is always
    accepted; equal entropies are taken in order of position.
    Raises ``ValueError`` for a bound below 0 or NaN.
    """
    entropy = np.ascontiguousarray(entropy, dtype=np.float32)
    if entropy.ndim != 1:
        raise ValueError(f"entropy must have 1 dimension, not {entropy.ndim}")
    return _native.accept(entropy, bound)


def draws(
    seed: int, canvas_index: int, step: int, n: int, n_vocab: int
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """The random numbers of one step: ``u`` in [0, 1) for :func:`measure`, and tokens for renoising.

    From the counter-based generator Philox4x32-10 (Salmon et al., 2011) with key = ``seed`` (64 bit) and
    counter = (position, step, canvas_index, 0): u is the upper 24 bits of the first word, the token
    ``word * n_vocab >> 32`` of the second. Step 0 gives the canvas that a denoising begins with. Shapes
    ``(n,)``, float32 and int32.
    """
    return _native.random_draws(seed, canvas_index, step, n, n_vocab)
