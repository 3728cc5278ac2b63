"""Logits against transformers, run live: more seeds, and the other file types."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference.random_checkpoint import SHAPES, random_ids
from support.models import WEIGHT_TYPES, assert_own_attention, compare, open_model
from support.parity import ROUNDING_FACTOR

from pydiffusion import _native

pytestmark = pytest.mark.reference

#: Mean absolute difference of logits of range 25, against a reference that holds the dequantized weights.
MEAN_BOUND = {"f16": 0.06, "bf16": 0.06, "q8_0": 0.25, "q4_k_m": 0.25}

_FALLBACKS = {"F32", "Q4_K", "Q6_K", "Q5_0", "Q8_0"}
Q4_K_M_TYPES = {"mild": _FALLBACKS, "small": _FALLBACKS, "wide": {"F32", "Q4_K", "Q6_K"}}

Logits = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def reference(checkpoint_folder: Callable[..., Path]) -> Callable[..., Any]:
    """``reference("small", seed=0, gguf=path)``: transformers' model, with that GGUF's weights if given."""
    from reference.dequantized import read_dequantized
    from reference.hf_model import load_reference, set_weights

    def get(shape: str, gguf: Path | None = None, **options: object) -> Any:
        model = load_reference(checkpoint_folder(shape, **options))
        if gguf is not None:
            set_weights(model, read_dequantized(gguf))
        return model

    return get


def weight_types(shape: str, type: str) -> set[str]:
    return Q4_K_M_TYPES[shape] if type == "q4_k_m" else WEIGHT_TYPES[type]


def inputs(shape: str, seed: int) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """A prompt (7 tokens for even seeds, more than two windows for odd ones) and a commit, with canvases."""
    s = SHAPES[shape]
    return [
        (
            part,
            random_ids(seed, "live" + part, n, s.vocab),
            random_ids(seed, "livec" + part, s.canvas, s.vocab),
        )
        for part, n in (("first", 38 if seed % 2 else 7), ("second", s.canvas))
    ]


def theirs(model: Any, shape: str, seed: int, conditioning: Logits | None = None) -> tuple[Logits, Logits]:
    """The reference's logits of every pass, and what it was conditioned on (its own logits unless given)."""
    from reference.hf_model import Context

    context, logits, used = Context.new(model), {}, {}
    for part, ids, canvas in inputs(shape, seed):
        context.encode(ids)
        logits[part] = context.denoise(canvas)
        own = (logits[part] / np.float32(0.5)).astype(np.float32)
        used[part] = own if conditioning is None else conditioning[part]
        logits[part + ", conditioned"] = context.denoise(canvas, used[part])
    return logits, used


def ours(model: _native.Model, shape: str, seed: int, conditioning: Logits) -> Logits:
    session, logits = _native.Session(model, 160), {}
    for part, ids, canvas in inputs(shape, seed):
        session.encode(ids)
        logits[part] = session.denoise(canvas, None)
        logits[part + ", conditioned"] = session.denoise(canvas, conditioning[part])
        assert_own_attention(model, session, len(SHAPES[shape].layers))
    return logits


def middle(a: np.ndarray, b: np.ndarray) -> float:
    """Median over canvas positions of the mean difference: blind to the few where an expert turned."""
    return float(np.median(np.abs(a - b).mean(axis=1)))


@pytest.mark.parametrize("style", ["saved", "google"])
@pytest.mark.parametrize("shape", ["small", "wide"])
@pytest.mark.parametrize("seed", [10, 11, 12, 13])
def test_f32(
    shape: str, seed: int, style: str, gguf_file: Callable, reference: Callable, report: Callable
) -> None:
    model = open_model(gguf_file(shape, "f32", seed=seed, style=style), "f32", WEIGHT_TYPES["f32"])
    wanted, conditioning = theirs(reference(shape, seed=seed, style=style), shape, seed)
    for name, logits in ours(model, shape, seed, conditioning).items():
        difference = compare(logits, wanted[name])
        report(f"live: F32, {shape}, seed {seed}, {style} config, {name}: {difference}")
        assert difference.mean <= 1e-3 and difference.max <= 1e-2, (name, difference)
        assert difference.agreement == 1.0, (name, difference)


@pytest.mark.parametrize("type", MEAN_BOUND)
@pytest.mark.parametrize("shape", ["mild", "small", "wide"])
def test_other_types(
    shape: str, type: str, gguf_file: Callable, reference: Callable, report: Callable
) -> None:
    """Against the dequantized weights.

    An expert that turns moves one position's logits by whole units, in transformers with rounded activations
    just as in ours. So the mean is held over three checkpoints of the calm kind that the bounds are for, and
    everywhere the position of the middle is held to what rounding alone does.
    """
    from reference.hf_model import rounded_activations

    means = []
    for seed in (20, 21, 22):
        path = gguf_file(shape, type, seed=seed)
        model = open_model(path, "f32", weight_types(shape, type))
        dequantized = reference(shape, gguf=path, seed=seed)
        wanted, conditioning = theirs(dequantized, shape, seed)
        with rounded_activations(dequantized, type):
            rounded, _ = theirs(dequantized, shape, seed, conditioning)
        for name, logits in ours(model, shape, seed, conditioning).items():
            difference = compare(logits, wanted[name])
            typical, allowed = middle(logits, wanted[name]), middle(rounded[name], wanted[name])
            means.append(difference.mean)
            report(
                f"live: {type}, {shape}, seed {seed}, {name}: {difference}; middle position {typical:.1e}, "
                f"transformers with rounded activations {allowed:.1e} (mean "
                f"{np.abs(rounded[name] - wanted[name]).mean():.1e})"
            )
            assert typical <= ROUNDING_FACTOR * allowed, (seed, name, typical, allowed)
    report(f"live: {type}, {shape}, all passes: mean {np.mean(means):.1e}")
    if shape == "mild":
        assert np.mean(means) <= MEAN_BOUND[type]


def test_circulating_q4_k_m(circulating: Path, reference: Callable, report: Callable) -> None:
    """The quantized file in circulation against transformers holding its dequantized weights."""
    from reference.hf_model import Context

    path = circulating / "small-q4_k_m.gguf"
    model, dequantized = open_model(path, "f32", _FALLBACKS), reference("mild", gguf=path)
    means = []
    for name in ("short", "long", "two-block"):
        with np.load(circulating / f"{name}.npz") as file:
            sample = dict(file)
        session, context = _native.Session(model, 128), Context.new(dequantized)
        for key in ("prompt_ids", "canvas0_ids"):
            if key in sample:
                session.encode(sample[key])
                context.encode(sample[key])
        canvas = sample["canvas_ids"] if "canvas_ids" in sample else sample["canvas1_ids"]
        for conditioning in (None, sample["self_conditioning_logits"]):
            difference = compare(session.denoise(canvas, conditioning), context.denoise(canvas, conditioning))
            with_it = "" if conditioning is None else ", conditioned"
            report(f"live: circulating Q4_K_M against its dequantized weights, {name}{with_it}: {difference}")
            means.append(difference.mean)
    assert np.mean(means) <= MEAN_BOUND["q4_k_m"]
