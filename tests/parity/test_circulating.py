"""Circulating files (llama.cpp's pull request 24423) give the reference's logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.models import assert_own_attention, compare, mean_kl, open_model

from pydiffusion import _native
from pydiffusion._util.sampler_options import ENTROPY_BOUND_DEFAULTS

F32_TYPES = {"F32"}
Q4_K_M_TYPES = {"F32", "Q4_K", "Q5_0", "Q6_K", "Q8_0"}


def load(folder: Path, name: str) -> dict[str, np.ndarray]:
    """A sample's arrays under the names that the other parity tests use."""
    with np.load(folder / f"{name}.npz") as file:
        arrays = dict(file)
    if name == "two-block":
        arrays["committed_ids"], arrays["canvas_ids"] = arrays["canvas0_ids"], arrays["canvas1_ids"]
    return arrays


def run(model: _native.Model, sample: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    session = _native.Session(model, 128)
    hidden = [session.encode(sample["prompt_ids"], return_hidden=True)]
    if "committed_ids" in sample:
        hidden.append(session.encode(sample["committed_ids"], return_hidden=True))
    logits = {
        "logits": session.denoise(sample["canvas_ids"], None),
        "logits_sc": session.denoise(sample["canvas_ids"], sample["self_conditioning_logits"]),
    }
    assert_own_attention(model, session, 4)
    return np.concatenate(hidden), logits


@pytest.mark.parametrize("name", ["short", "long", "two-block"])
def test_f32_logits(name: str, circulating: Path, report: Callable[[str], None]) -> None:
    sample = load(circulating, name)
    hidden, logits = run(open_model(circulating / "small-f32.gguf", "f32", F32_TYPES), sample)
    for key, ours in logits.items():
        difference = compare(ours, sample[key])
        report(f"circulating F32, {name}, {key}: {difference}")
        assert difference.mean <= 1e-3 and difference.max <= 1e-2 and difference.agreement == 1.0, difference
    gap = np.abs(hidden - sample["encoder_last_hidden_state"])
    report(f"circulating F32, {name}, encoder hidden: mean {gap.mean():.1e}, max {gap.max():.1e}")
    assert gap.mean() <= 1e-4 and gap.max() <= 1e-3


@pytest.mark.parametrize("name", ["short", "long", "two-block"])
def test_q4_k_m_is_near_f32(name: str, circulating: Path, report: Callable[[str], None]) -> None:
    """Four bits on random weights: far from F32, but clearly the same model."""
    sample = load(circulating, name)
    _, quantized = run(open_model(circulating / "small-q4_k_m.gguf", "f32", Q4_K_M_TYPES), sample)
    for key, ours in quantized.items():
        difference = compare(ours, sample[key])
        correlation = float(np.corrcoef(ours.ravel(), sample[key].ravel())[0, 1])
        report(
            f"circulating Q4_K_M against F32, {name}, {key}: {difference}, correlation {correlation:.4f}, "
            f"KL {mean_kl(sample[key], ours):.2e}"
        )
        assert correlation > 0.9


@pytest.mark.parametrize("file", ["small-f32.gguf", "small-q4_k_m.gguf"])
def test_generates(file: str, circulating: Path) -> None:
    model = _native.Model(str(circulating / file), n_threads=1)
    session = _native.Session(model, 128)
    session.encode(load(circulating, "short")["prompt_ids"])
    session.begin(
        **{**ENTROPY_BOUND_DEFAULTS, "steps": 8},
        max_tokens=20,
        seed=1,
        eos=[],
    )
    steps = []
    while (step := session.next_step()) is not None:
        steps.append(step)
    assert [step.canvas_index for step in steps if step.canvas_done] == [0, 1, 2]
    assert sum(len(step.tokens) for step in steps) == 20
    assert steps[-1].finish == "length"
