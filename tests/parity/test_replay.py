"""Recorded runs of transformers' `generate`, replayed by the native loop with the same random draws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from reference.philox import draws, inverse_cdf, philox4x32
from reference.random_checkpoint import digest
from support.models import WEIGHT_TYPES, case, generation_steps, load_golden, open_model, replay

from pydiffusion import _native

#: The published test vectors of Philox4x32-10 (Random123's kat_vectors): counter, key, result.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
]


@pytest.mark.parametrize(("counter", "key", "wanted"), VECTORS)
def test_philox_vectors(counter: tuple, key: tuple, wanted: tuple) -> None:
    """Guards the recorder's generator; the next test holds the native one against it."""
    assert tuple(philox4x32(np.array([counter], dtype=np.uint32), key)[0]) == wanted


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**63 + 12345, 2**64 - 1])
def test_native_draws(seed: int) -> None:
    for canvas_index, step, n, n_vocab in ((0, 0, 8, 512), (3, 48, 256, 262144), (2**20, 7, 1, 2)):
        u, tokens = _native.random_draws(seed, canvas_index, step, n, n_vocab)
        wanted_u, wanted_tokens = draws(seed, canvas_index, step, n, n_vocab)
        assert u.dtype == np.float32 and tokens.dtype == np.int32
        assert np.array_equal(u, wanted_u)
        assert np.array_equal(tokens, wanted_tokens)


def test_inverse_cdf_by_hand() -> None:
    probabilities = np.array([[0.25, 0.0, 0.5, 0.25]] * 5)
    u = np.array([0.0, 0.2, 0.25, 0.7, 0.8], dtype=np.float32)
    assert inverse_cdf(probabilities, u)[0].tolist() == [0, 0, 2, 2, 3]


SOURCES = {"small-f32": ("small", 0), "wide-f32": ("wide", 2)}


@pytest.mark.parametrize("run", ["length", "eos"])
@pytest.mark.parametrize("source", SOURCES)
def test_recorded_run(source: str, run: str, gguf_file: Callable[..., Path], report: Callable) -> None:
    golden = load_golden(f"replay-{source}")
    shape, seed = SOURCES[source]
    assert digest(shape, seed) == str(golden["digest"])
    record = case(golden, run)
    # The run is worth replaying: several canvases, partial acceptance, an early stop.
    n_accepted = record["accepted"].sum(axis=1)
    assert record["canvas_index"].max() >= 1 and record["stopped"].any()
    assert ((n_accepted > 0) & (n_accepted < record["accepted"].shape[1])).any()
    model = open_model(gguf_file(shape, "f32", seed=seed, dtype="f32"), "f32", WEIGHT_TYPES["f32"])
    gap = replay(model, record)
    report(
        f"replay: {source}, ended by {run}: {len(record['step'])} steps alike; entropy differs by "
        f"{gap['mean']:.1e} on average, {gap['max']:.1e} at most; nearest draw to a boundary of the CDF "
        f"{record['cdf_margin'].min():.1e}, nearest acceptance {record['accept_margin'].min():.1e}"
    )


@pytest.mark.parametrize("run", ["length", "eos"])
def test_same_seed_same_run(run: str, gguf_file: Callable[..., Path]) -> None:
    """Twice on one machine is the same to the bit; another seed is another run."""
    record = case(load_golden("replay-small-f32"), run)
    options = {k: v.tolist() for k, v in case(record, "options").items()}
    model = open_model(gguf_file("small", "f32", seed=0, dtype="f32"), "f32", WEIGHT_TYPES["f32"])
    runs = []
    for seed in (options["seed"], options["seed"], options["seed"] + 1, options["seed"] ^ 2**40):
        session = _native.Session(model, 512)
        session.encode(record["prompt_ids"])
        session.begin(**options | {"seed": seed})
        runs.append([(step.canvas.tolist(), step.entropy.tolist()) for step in generation_steps(session)])
    assert runs[0] == runs[1]
    assert runs[0] != runs[2] and runs[0] != runs[3]
