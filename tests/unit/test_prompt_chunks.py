"""The same bits however a prompt came into the cache: at once, in chunks, after other tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from support.kernels import ALL_KERNELS

from pydiffusion import DiffusionModel, Session, _native, demo
from pydiffusion.convert import convert

N_PROMPT = 700  # more than a chunk (512), and than the sliding layers' rows hold
CUTS = {
    "one token at the end": [699],
    "one token first": [1],
    "at a tile of attention": [64],
    "within a tile": [100, 333],
    "at a chunk": [512],
    "a few tokens at a time": [*range(3, 60, 7), 61, 62, 63, 650, 652, 655],
}
# Weights and cache: all the ways to multiply and to attend.
FILES = [
    ("f32", "f32"),
    ("f32", "f16"),
    ("bf16", "f16"),
    ("q8_0", "q8_0"),
    ("q4_0", "f16"),
    ("q4_k_m", "f16"),
]


def cache_and_logits(session: Session) -> tuple[list[bytes], bytes]:
    rows = [array.tobytes() for layer in session.native.cache_rows() for array in layer]
    canvas = np.arange(session.model.canvas_length, dtype=np.int32)
    return rows, session.denoise(canvas).tobytes()


def ids_for(model: DiffusionModel, n: int = N_PROMPT, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, model.n_vocab, n).astype(np.int32)


def encoded(model: DiffusionModel, ids: np.ndarray, cuts: list[int]) -> Session:
    session = model.new_session()
    for piece in np.split(ids, cuts):
        session.encode(piece)
    return session


@pytest.mark.parametrize("kernels", ALL_KERNELS)
@pytest.mark.parametrize(("type", "kv_type"), FILES)
def test_chunked_prompts_give_the_same_bits(
    type: str, kv_type: str, kernels: str, gguf_file: Callable[..., Path]
) -> None:
    path = gguf_file("small", type, seed=0, dtype="f32")
    with DiffusionModel(path, n_ctx=1024, n_threads=2, kv_type=kv_type, kernels=kernels) as model:
        ids = ids_for(model)
        whole = cache_and_logits(encoded(model, ids, []))
        for name, cuts in CUTS.items():
            assert cache_and_logits(encoded(model, ids, cuts)) == whole, name


@pytest.fixture(scope="module")
def demo_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("demo") / "demo-q4_k_m.gguf"
    convert(demo.checkpoint_path(), target, "q4_k_m")
    return target


@pytest.fixture(scope="module", params=ALL_KERNELS)
def model(request: pytest.FixtureRequest, demo_file: Path) -> Iterator[DiffusionModel]:
    with DiffusionModel(demo_file, n_threads=2, kernels=request.param) as model:
        yield model


@pytest.mark.parametrize("seed", range(12))
def test_text_after_a_partly_cached_prompt(model: DiffusionModel, seed: int) -> None:
    """As in conversations, whose prompts share their beginnings."""
    ids = ids_for(model, 200 + seed, seed)
    fresh = model.new_session()
    fresh.encode(ids)
    expected = fresh.complete(seed=seed, max_tokens=48, eos=[])
    session = model.new_session()
    session.encode(ids[: 90 + 5 * seed])
    session.complete(seed=1, max_tokens=96, eos=[])  # a canvas is committed, and rolled back
    assert session.prefill(ids) >= 90
    found = session.complete(seed=seed, max_tokens=48, eos=[])
    assert found.text == expected.text and found.tokens.tolist() == expected.tokens.tolist()


def test_a_committed_canvas_equals_an_encoded_one(model: DiffusionModel) -> None:
    session = model.new_session()
    session.encode(ids_for(model, 70))
    answer = session.complete(seed=3, max_tokens=96, eos=[])
    assert len(answer.tokens) == 96 and session.n_past < 166  # the last canvas is not committed yet
    read = model.new_session()
    read.encode(session.tokens)
    assert cache_and_logits(read) == cache_and_logits(session)


def test_forked_loaded_and_truncated_sessions_continue_alike(model: DiffusionModel, tmp_path: Path) -> None:
    ids = ids_for(model, 300)
    whole = cache_and_logits(encoded(model, ids, []))
    session = encoded(model, ids[:201], [])
    session.save(tmp_path / "session")
    for other in (session.fork(), model.load_session(tmp_path / "session")):
        n_encoded = other.n_encoded
        other.truncate(198)
        assert other.n_encoded == n_encoded  # the copied cache covers a few tokens before its end
        other.encode(ids[198:])
        assert cache_and_logits(other) == whole


@pytest.mark.parametrize("kernels", ALL_KERNELS)
@pytest.mark.parametrize("type", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_0", "IQ4_NL", "Q4_K", "Q6_K"])
def test_a_tokens_result_does_not_depend_on_the_number_of_tokens(type: str, kernels: str) -> None:
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((48, 512)).astype(np.float32)
    rows = _native.quantize_rows(weights, type, 1, np.ones(512, np.float32))
    x = rng.standard_normal((40, 512)).astype(np.float32)
    whole = _native.testing.matmul(kernels, rows, type, x, n_threads=2)
    for n in (1, 2, 3, 4, 5, 7, 8, 9, 17, 33):
        alone = _native.testing.matmul(kernels, rows, type, x[:n], n_threads=2)
        assert alone.tobytes() == whole[:n].tobytes(), n
