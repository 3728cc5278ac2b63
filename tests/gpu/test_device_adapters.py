"""Adapters on device graphs: on the CPU in place of a GPU ("host"), and on every GPU present."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from reference.random_checkpoint import SHAPES, random_ids
from support.adapters_by_hand import (
    ATTENTION,
    DENSE,
    EVERYTHING,
    EXPERTS,
    ROUTER,
    SELF_CONDITIONING,
    merge,
    random_targets,
)
from support.parity import MEAN_BOUND

from pydiffusion import _native, devices
from pydiffusion._util.sampler_options import ENTROPY_BOUND_DEFAULTS

GPUS = [device.name for device in devices()]
DEVICES = [
    "host", "host,host", "host with fused rows", *GPUS, *([",".join(GPUS)] if len(GPUS) > 1 else []),
]  # fmt: skip
pytestmark = pytest.mark.parametrize("device", DEVICES)

SHAPE = SHAPES["small"]
PROMPT = random_ids(0, "adapted", 40, SHAPE.vocab)  # longer than the window
CANVAS = random_ids(0, "adaptedc", SHAPE.canvas, SHAPE.vocab)

Adapters = Sequence[tuple[_native.Adapter, float]]


def open_on(path: Path, device: str) -> _native.Model:
    name, _, how = device.partition(" ")
    return _native.Model(str(path), 2, device=name, kernels="cuda" if how else "auto", kv_type="f32")


def load(model: _native.Model, seed: int, kinds: Sequence[str] = EVERYTHING) -> _native.Adapter:
    return _native.Adapter(model, f"{seed}", random_targets(Path(str(model.file.path)), seed, kinds=kinds))


def read(model: _native.Model, adapters: Adapters) -> _native.Session:
    session = _native.Session(model, 128)
    session.set_adapters(list(adapters))
    session.encode(PROMPT)
    return session


def run(model: _native.Model, adapters: Adapters = ()) -> list[np.ndarray]:
    """Logits of a canvas without and with self-conditioning."""
    session = read(model, adapters)
    first = session.denoise(CANVAS, None)
    return [first, session.denoise(CANVAS, first)]


def mean_gap(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    return max(float(np.abs(a - b).mean()) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def file(gguf_file: Callable[..., Path]) -> Path:
    return gguf_file("small", "f32", seed=0, dtype="f32")


@pytest.mark.parametrize(
    "kinds", [ATTENTION, DENSE, EXPERTS, ROUTER, SELF_CONDITIONING], ids=lambda kinds: kinds[0]
)
def test_applied_is_merged(
    device: str, kinds: Sequence[str], file: Path, tmp_path: Path, report: Callable[[str], None]
) -> None:
    """Two adapters at once, against a file whose float32 weights have them."""
    scales = {1: 0.7, 2: 1.5}
    model = open_on(file, device)
    changes = [(list(random_targets(file, seed, kinds=kinds)), scale) for seed, scale in scales.items()]
    merged = open_on(merge(file, changes, tmp_path / "merged.gguf"), device)
    ours = run(model, [(load(model, seed, kinds), scale) for seed, scale in scales.items()])
    gap = mean_gap(ours, run(merged))
    report(f"device {device}, adapters of {kinds[0]} etc., applied against merged: mean {gap:.1e}")
    bound = (10 if "host" in device else 1) * MEAN_BOUND  # the host's GELU is a table of float16
    assert gap < bound < 0.03 < mean_gap(ours, run(model))


def test_on_quantized_weights(device: str, gguf_file: Callable[..., Path]) -> None:
    """As the CPU computes it, within what rounding activations in other blocks does without adapters."""
    path = gguf_file("small", "q8_0", seed=0, dtype="f32")
    models = [_native.Model(str(path), 2, kv_type="f32"), open_on(path, device)]
    plain, ours = ([run(m, a) for m, a in zip(models, each, strict=True)]
                   for each in (((), ()), [[(load(m, 1), 0.5)] for m in models]))  # fmt: skip
    assert mean_gap(*ours) < 3 * mean_gap(*plain) < mean_gap(ours[1], plain[1])


def test_off_is_never_loaded(device: str, file: Path) -> None:
    model = open_on(file, device)
    expected, adapter = run(model), load(model, 1)
    session = read(model, [(adapter, 1.0)])
    assert not np.array_equal(session.denoise(CANVAS, None), expected[0])
    session.set_adapters([])
    first = session.denoise(CANVAS, None)
    assert np.array_equal(first, expected[0])
    assert np.array_equal(session.denoise(CANVAS, first), expected[1])
    assert all(map(np.array_equal, run(model, [(adapter, 0.0)]), expected))


def test_different_ones_in_one_batch(device: str, file: Path) -> None:
    """In one graph; a batch need not have each one's bits: the entropies of two steps are close."""
    model = open_on(file, device)
    one, two = load(model, 1), load(model, 2)
    lists: list[Adapters] = [[], [(one, 1.0)], [(one, 0.5), (two, 0.5)], []]
    alone, together = ([read(model, adapters) for adapters in lists] for _ in range(2))
    options = {**ENTROPY_BOUND_DEFAULTS, "steps": 3, "confidence_threshold": 0.0}
    for session in (*alone, *together):
        session.begin(max_tokens=2 * SHAPE.canvas, seed=1, eos=[], **options)
    batch = _native.Batch(model)
    for _ in range(2):
        expected = [session.next_step() for session in alone]
        steps = batch.next_steps(together)
        assert batch.n_graphs == 1
        for ours, theirs in zip(steps, expected, strict=True):
            assert isinstance(ours, _native.Step) and theirs is not None, ours
            assert float(np.abs(ours.entropy - theirs.entropy).mean()) < 0.02
        assert float(np.abs(steps[1].entropy - steps[2].entropy).mean()) > 0.1  # type: ignore[union-attr]
