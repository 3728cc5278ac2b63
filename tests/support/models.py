"""Open models and check that nothing falls back; compare logits; run the goldens' cases."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pydiffusion import _native
from support.paths import GOLDENS


@dataclass(frozen=True)
class Difference:
    """The difference between two sets of logits; ``agreement`` is the share of equal argmaxes."""

    mean: float
    max: float
    agreement: float

    def __str__(self) -> str:
        return f"mean {self.mean:.1e}, max {self.max:.1e}, argmax equal {self.agreement:.2%}"


def compare(ours: np.ndarray, theirs: np.ndarray) -> Difference:
    """Compare two (n, n_vocab) float32 arrays. NaN anywhere makes the figures NaN, which no bound passes."""
    assert ours.shape == theirs.shape, f"{ours.shape} against {theirs.shape}"
    assert ours.dtype == theirs.dtype == np.float32
    gap = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
    agreement = float((ours.argmax(axis=-1) == theirs.argmax(axis=-1)).mean())
    return Difference(float(gap.mean()), float(gap.max()), agreement)


def mean_kl(reference: np.ndarray, ours: np.ndarray) -> float:
    """Mean over rows of KL(softmax(reference) || softmax(ours)), in nats."""

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64) - x.max(axis=-1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))

    p, q = log_softmax(reference), log_softmax(ours)
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


def open_model(path: Path, kv_type: str, weight_types: set[str], n_threads: int = 1) -> _native.Model:
    """Load a model and check its backend, cache and weight types: no test passes by falling back."""
    model = _native.Model(str(path), n_threads=n_threads, kv_type=kv_type)
    description = model.description
    assert description["backend"] == "CPU", description
    assert description["kv_type"] == kv_type, description
    assert set(description["weight_types"]) == weight_types, description
    return model


def assert_own_attention(model: _native.Model, session: _native.Session, n_layer: int) -> None:
    """Check that the last step's graph used our own attention node in every layer, and no other."""
    ops = session.step_ops
    by_tiles = model.description["kernels"] == "amx" and model.description["kv_type"] != "f32"
    assert ops["attend_tiles" if by_tiles else "attend"] == n_layer, ops
    assert ("attend" in ops) != by_tiles, ops
    assert "FLASH_ATTN_EXT" not in ops, ops
    assert "SOFT_MAX" not in ops, ops  # ours is within attention, and the routers' within join_branches


#: Tensor types that a file of each type has exactly, for the shapes "small" and "wide".
WEIGHT_TYPES: dict[str, set[str]] = {
    "f32": {"F32"},
    "f16": {"F32", "F16"},
    "bf16": {"F32", "BF16"},
    "q8_0": {"F32", "Q8_0"},
}


def load_golden(name: str) -> dict[str, np.ndarray]:
    """One file of tests/reference/goldens."""
    with np.load(GOLDENS / f"{name}.npz") as file:
        return dict(file)


def case(golden: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays of one case, without its name in front."""
    return {k.removeprefix(prefix + "/"): v for k, v in golden.items() if k.startswith(prefix + "/")}


def encode_case(
    session: _native.Session, case: dict[str, np.ndarray], chunk: int | None = None
) -> np.ndarray:
    """Encode a case's prompt, then its committed canvas; returns the hidden states (n, d) of both.

    ``chunk`` encodes the prompt in chunks of that many tokens instead of at once.
    """
    prompt = case["prompt_ids"]
    step = chunk or len(prompt)
    pieces = [prompt[i : i + step] for i in range(0, len(prompt), step)]
    if "committed_ids" in case:
        pieces.append(case["committed_ids"])
    return np.concatenate([session.encode(piece, return_hidden=True) for piece in pieces])


def denoise_case(session: _native.Session, case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The case's two denoiser passes, under the names that its golden has for them."""
    return {
        "logits": session.denoise(case["canvas_ids"], None),
        "logits_sc": session.denoise(case["canvas_ids"], case["self_conditioning_logits"]),
    }


def generation_steps(session: _native.Session) -> Iterator[_native.Step]:
    """Iterate over the steps of the current generation."""
    while (step := session.next_step()) is not None:
        yield step


def replay(model: _native.Model, record: dict[str, np.ndarray]) -> dict[str, float]:
    """Run the record's options natively, compare every decision; returns the difference of the entropies."""
    options = {k: v.tolist() for k, v in case(record, "options").items()}
    session = _native.Session(model, 512)
    session.encode(record["prompt_ids"])
    session.begin(**options)
    ours = list(generation_steps(session))
    for i, step in enumerate(ours[: len(record["step"])]):
        where = f"canvas {step.canvas_index}, step {step.step} (row {i})"
        assert (step.canvas_index, step.step) == (record["canvas_index"][i], record["step"][i]), where
        assert np.array_equal(step.draft, record["draft"][i]), where
        assert np.array_equal(step.accepted, record["accepted"][i]), where
        assert np.array_equal(step.canvas, record["canvas"][i]), where
        # A canvas ends where the reference stopped, or with its last step.
        assert step.canvas_done == (bool(record["stopped"][i]) or step.step == 1), where
    assert len(ours) == len(record["step"])
    tokens = np.concatenate([step.tokens for step in ours])
    assert np.array_equal(tokens, record["tokens"])
    assert ours[-1].finish == ("eos" if len(tokens) < options["max_tokens"] else "length")
    assert [step.finish for step in ours[:-1]] == [""] * (len(ours) - 1)
    gap = np.abs(np.array([step.entropy for step in ours]) - record["entropy"])
    assert (gap.max(axis=1) < record["accept_margin"]).all(), "rounding could have changed what is accepted"
    return {"mean": float(gap.mean()), "max": float(gap.max())}
