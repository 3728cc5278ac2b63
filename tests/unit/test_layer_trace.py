"""Values within the layers, as a session traces them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from reference.random_checkpoint import SHAPES, random_ids

from pydiffusion import _native

SHAPE, NAMES = SHAPES["small"], ("attention", "dense", "output", "router")
PROMPT = random_ids(0, "trace", 600, SHAPE.vocab)  # more than a chunk of the encoder
CANVAS = random_ids(0, "tracec", SHAPE.canvas, SHAPE.vocab)


def read_tensor(file: _native.GgufFile, name: str) -> np.ndarray:
    return file.tensor_bytes(name).view(np.float32)


@pytest.fixture(scope="module", params=[("cpu", "auto"), ("host", "ggml"), ("host", "cuda")])
def model(request: pytest.FixtureRequest, gguf_file: Callable[..., Path]) -> _native.Model:
    device, kernels = request.param
    return _native.Model(str(gguf_file("small", "f32")), 2, device=device, kernels=kernels)


def test_what_is_traced(model: _native.Model) -> None:
    session = _native.Session(model, 700)
    assert session.layer_trace() == {}
    session.trace_layers(True)
    session.encode(PROMPT, return_hidden=True)
    traced = session.layer_trace()
    layers = range(len(SHAPE.layers))
    assert set(traced) == {(0, "input"), *((i, name) for i in layers for name in NAMES)}
    for (_, name), values in traced.items():
        width = SHAPE.n_expert if name == "router" else SHAPE.d
        assert values.shape == (len(PROMPT), width) and values.dtype == np.float32
        assert np.isfinite(values).all()
    session.trace_layers(True)
    session.denoise(CANVAS, None)
    assert session.layer_trace()[0, "input"].shape == (SHAPE.canvas, SHAPE.d)
    session.denoise(CANVAS, None)
    twice = session.layer_trace()[1, "output"]
    assert np.array_equal(twice[: SHAPE.canvas], twice[SHAPE.canvas :]), "the graph is reused"
    session.trace_layers(False)
    session.denoise(CANVAS, None)
    assert session.layer_trace() == {}


def test_tracing_changes_nothing(model: _native.Model) -> None:
    results = []
    for on in (False, True):
        session = _native.Session(model, 700)
        session.trace_layers(on)
        results.append((session.encode(PROMPT, return_hidden=True), session.denoise(CANVAS, None)))
    assert np.array_equal(results[0][0], results[1][0])
    assert np.array_equal(results[0][1], results[1][1])


def test_the_ends_are_the_embedding_and_the_hidden_states(model: _native.Model) -> None:
    """Input: rows of the embedding times sqrt(d). Output, after the final norm: what encode returns."""
    session = _native.Session(model, 700)
    session.trace_layers(True)
    hidden = session.encode(PROMPT, return_hidden=True)
    traced = session.layer_trace()
    embedding = read_tensor(model.file, "token_embd.weight").reshape(SHAPE.vocab, SHAPE.d)
    np.testing.assert_allclose(traced[0, "input"], embedding[PROMPT] * np.sqrt(SHAPE.d), rtol=1e-6)
    last = traced[len(SHAPE.layers) - 1, "output"].astype(np.float64)
    normed = last / np.sqrt((last**2).mean(axis=1, keepdims=True) + 1e-6)
    weight = read_tensor(model.file, "output_norm.weight")
    np.testing.assert_allclose(normed * weight, hidden, rtol=1e-4, atol=1e-5)
