"""The runtime's side of the comparison: a prompt and two canvases, with the values within every layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pydiffusion import DiffusionModel

from .battery import TEXTS

#: Values within a layer, in the order in which they are computed, and what computes them.
POINTS = {
    "attention": "attention with its norms and RoPE",
    "dense": "dense MLP",
    "router": "router",
    "output": "experts, or the norms and the scale that join the branches",
}
#: Passes through the layers: the prompt, a canvas, the same canvas conditioned on its own logits.
ENCODER, CANVAS, CONDITIONED = "prompt", "canvas", "conditioned canvas"
_BEYOND_WINDOW = 64  # tokens
_SEED = 0
_TEMPERATURE = np.float32(0.8)  # of the logits that condition the second canvas


@dataclass(frozen=True)
class TracedPass:
    """One pass. ids: int32 (n,); inputs: of the first layer, float32 (n, d).

    points: per layer, the values of POINTS, float32 (n, width); of the router, its scores times sqrt(d).
    logits: of a canvas, float32 (n, n_vocab); of the prompt None. conditioning: logits that condition it.
    """

    ids: np.ndarray
    inputs: np.ndarray
    points: list[dict[str, np.ndarray]]
    logits: np.ndarray | None = None
    conditioning: np.ndarray | None = None

    def layer_input(self, i_layer: int) -> np.ndarray:
        """The hidden states that a layer got: float32 (n, d)."""
        return self.inputs if i_layer == 0 else self.points[i_layer - 1]["output"]


def trace(model: DiffusionModel) -> dict[str, TracedPass]:
    """Run a prompt that is longer than the sliding window, and two canvases. Raises as ``Session``."""
    prompt = _prompt(model)
    canvas = np.random.default_rng(_SEED).integers(0, model.n_vocab, model.canvas_length).astype(np.int32)
    session = model.native.new_session(len(prompt) + model.canvas_length + 1)
    passes = {}
    session.trace_layers(True)
    session.encode(prompt, return_hidden=True)
    passes[ENCODER] = _collect(session.layer_trace(), prompt)
    conditioning = None
    for name in (CANVAS, CONDITIONED):
        session.trace_layers(True)
        logits = session.denoise(canvas, conditioning)
        passes[name] = _collect(session.layer_trace(), canvas, logits, conditioning)
        conditioning = logits / _TEMPERATURE
    return passes


def _prompt(model: DiffusionModel) -> np.ndarray:
    n = min(model.hparams["window"] + _BEYOND_WINDOW, model.n_ctx_train - model.canvas_length - 1)
    ids = model.tokenize("\n".join(TEXTS.values()))
    return np.resize(np.asarray(ids, np.int32), n)


def _collect(
    traced: dict[tuple[int, str], np.ndarray],
    ids: np.ndarray,
    logits: np.ndarray | None = None,
    conditioning: np.ndarray | None = None,
) -> TracedPass:
    n_layer = 1 + max((i for i, _ in traced), default=-1)
    if any((i, name) not in traced for i in range(n_layer) for name in POINTS):
        raise ValueError("this architecture shows no values of its layers")
    points = [{name: traced[i, name] for name in POINTS} for i in range(n_layer)]
    return TracedPass(ids, traced[0, "input"], points, logits, conditioning)
