"""Edge values: temperatures, bounds, steps, canvases, contexts, nonfinite weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gguf_mutator import ARRAY, STRING, U32, Array, RawGguf, String, read_gguf

from pydiffusion import DiffusionModel, _native
from pydiffusion._util.sampler_options import ENTROPY_BOUND_DEFAULTS
from pydiffusion.errors import ContextOverflowError, GenerationCancelled, ModelFormatError, PyDiffusionError

OPTIONS = {
    **ENTROPY_BOUND_DEFAULTS,
    "max_tokens": 8,
    "steps": 4,
    "seed": 0,
    "eos": [],
}
PROMPT = np.array([2, 7, 11, 5], dtype=np.int32)
CANVAS = 4  # of the shape "tiny", whose context is 64


@pytest.fixture(scope="module")
def path(gguf_file: Callable[..., Path]) -> Path:
    return gguf_file("tiny", "f32")


@pytest.fixture(scope="module")
def good(path: Path) -> RawGguf:
    return read_gguf(path)


@pytest.fixture(scope="module")
def model(path: Path) -> _native.Model:
    return _native.Model(str(path), n_threads=1)


def generate(model: _native.Model, prompt: np.ndarray = PROMPT, n_ctx: int = 64, **changed: object) -> list:
    session = _native.Session(model, n_ctx)
    session.encode(prompt)
    session.begin(**OPTIONS | changed)
    steps = []
    while (step := session.next_step()) is not None:
        steps.append(step)
        assert len(steps) < 10_000, "endless"
    assert steps
    return steps


# --- the sampler ---


@pytest.mark.parametrize("temperature", [1e-45, 1e-42, 1e-39, 1e-38, 1e-30, 1e-6])
def test_tiny_temperatures_choose_the_argmax(temperature: float) -> None:
    """Below 3e-39 the inverse of a float is infinite, and zero times infinity is NaN."""
    logits = np.random.default_rng(0).normal(size=(8, 5000)).astype(np.float32)
    u = np.linspace(0.0, 0.999, 8, dtype=np.float32)
    argmax, entropy, sampled = _native.measure(logits, temperature, u)
    assert np.array_equal(argmax, logits.argmax(axis=1))
    assert np.array_equal(sampled, argmax)
    assert (entropy >= 0).all()
    assert (entropy < 1e-6).all()


def test_a_huge_temperature_draws_uniformly() -> None:
    logits = np.random.default_rng(0).normal(size=(4, 1000)).astype(np.float32)
    u = np.array([0.0, 0.25, 0.5, 0.9995], dtype=np.float32)
    _, entropy, sampled = _native.measure(logits, 3e38, u)
    assert np.allclose(entropy, np.log(1000), atol=1e-3)
    assert np.abs(sampled - u * 1000).max() <= 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("at", [0, 15, 16, 2047, 2048, 4999])
def test_a_nonfinite_logit_is_detected_anywhere(bad: float, at: int) -> None:
    logits = np.zeros((1, 5000), dtype=np.float32)
    logits[0, at] = bad
    _, entropy, _ = _native.measure(logits, 1.0, np.array([0.5], np.float32))
    assert np.isnan(entropy[0])


def test_tokens_of_probability_zero_are_never_drawn() -> None:
    logits = np.full((64, 5000), -np.inf, dtype=np.float32)
    logits[:, [3, 4000]] = 0.0
    u = np.linspace(0.0, 0.9999, 64, dtype=np.float32)
    argmax, entropy, sampled = _native.measure(logits, 1.0, u)
    assert set(argmax) == {3}
    assert set(sampled) == {3, 4000}
    assert np.allclose(entropy, np.log(2), atol=1e-5)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=40),
    st.floats(0.0, 2.0**99, width=32, exclude_min=True),
    st.floats(0.0, 1.0, width=32, exclude_max=True),
)
def test_any_logits_give_tokens_of_the_vocabulary(row: list[float], temperature: float, u: float) -> None:
    """Never an index out of range, never an entropy that is negative or infinite."""
    logits = np.array([row], dtype=np.float32)
    argmax, entropy, sampled = _native.measure(logits, temperature, np.array([u], np.float32))
    assert 0 <= argmax[0] < len(row)
    assert 0 <= sampled[0] < len(row)
    finite = not np.isnan(logits).any() and logits.max() < np.inf and logits.max() > -np.inf
    assert np.isnan(entropy[0]) == (not finite)
    if finite:
        assert 0.0 <= entropy[0] <= np.log(len(row)) + 1e-3
        assert argmax[0] == logits[0].argmax()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1e6, width=32), max_size=40), st.floats(0, 1e6, width=32))
def test_acceptance_takes_the_lowest_entropies_and_at_least_one(entropies: list[float], bound: float) -> None:
    mask = _native.accept(np.array(entropies, dtype=np.float32), bound)
    assert mask.any() or not entropies
    taken = [e for e, m in zip(entropies, mask, strict=True) if m]
    left = [e for e, m in zip(entropies, mask, strict=True) if not m]
    assert not left or max(taken) <= min(left)


# --- generations ---


@pytest.mark.parametrize("t_max", [1e-45, 1e-39, 1e-6])
def test_generation_at_tiny_temperatures(model: _native.Model, t_max: float) -> None:
    """Every draw is the argmax, so accepted positions hold it."""
    for step in generate(model, t_min=0.0, t_max=t_max):
        assert np.array_equal(step.canvas[step.accepted], step.draft[step.accepted])
        assert (step.entropy >= 0).all()
        assert (step.entropy < 1e-6).all()


def test_an_entropy_bound_of_zero_accepts_one(model: _native.Model) -> None:
    for step in generate(model, entropy_bound=0.0):
        assert step.accepted.sum() == 1 + (step.entropy == 0).sum() - (step.entropy.min() == 0)


@pytest.mark.parametrize("bound", [1e9, 3e38, float("inf")])
def test_a_huge_entropy_bound_accepts_all(model: _native.Model, bound: float) -> None:
    assert all(step.accepted.all() for step in generate(model, entropy_bound=bound))


def test_one_step(model: _native.Model) -> None:
    steps = generate(model, steps=1, max_tokens=12)
    assert [(step.step, step.canvas_done) for step in steps] == [(1, True)] * 3
    assert steps[-1].finish == "length"


def test_one_token(model: _native.Model) -> None:
    steps = generate(model, max_tokens=1)
    assert len(steps[-1].tokens) == 1
    assert steps[-1].finish == "length"


def test_the_largest_number_of_steps(model: _native.Model) -> None:
    """Steps count down from 2^31 - 1, and a cancel ends the generation."""
    session = _native.Session(model, 64)
    session.encode(PROMPT)
    session.begin(**OPTIONS | {"steps": 2**31 - 1, "max_tokens": 2**31 - 1})
    assert [session.next_step().step for _ in range(5)] == [2**31 - i for i in range(1, 6)]
    session.cancel()
    with pytest.raises(GenerationCancelled):
        session.next_step()
    assert session.next_step() is None


def test_a_canvas_of_one(good: RawGguf, tmp_path: Path) -> None:
    one = good.copy()
    one.set("diffusion.canvas_length", U32, 1)
    model = _native.Model(str(one.write(tmp_path / "one.gguf")), n_threads=1)
    steps = generate(model, max_tokens=3)
    assert sum(len(step.tokens) for step in steps) == 3
    assert all(len(step.canvas) == 1 for step in steps)


def test_a_canvas_as_long_as_the_context(good: RawGguf, tmp_path: Path) -> None:
    """No prompt would fit before it, so a session refuses."""
    long = good.copy()
    long.set("diffusion.canvas_length", U32, 64)
    model = _native.Model(str(long.write(tmp_path / "long.gguf")), n_threads=1)
    with pytest.raises(ValueError, match="n_ctx is 64"):
        _native.Session(model, 64)


def test_a_context_that_is_exactly_full(model: _native.Model) -> None:
    """16 tokens and one canvas of 4 fill 20; one more token is refused, and leaves the session unchanged."""
    prompt = np.arange(16, dtype=np.int32)
    steps = generate(model, prompt, n_ctx=20, max_tokens=100)
    assert steps[-1].finish == "context"
    assert sum(len(step.tokens) for step in steps) == CANVAS
    session = _native.Session(model, 20)
    session.encode(np.arange(17, dtype=np.int32))
    with pytest.raises(ContextOverflowError):
        session.begin(**OPTIONS)
    with pytest.raises(ContextOverflowError):
        session.encode(np.zeros(4, dtype=np.int32))
    assert session.n_past == 17
    session.encode(np.zeros(3, dtype=np.int32))  # encoding may fill the last rows
    assert session.n_past == 20


def test_every_canvas_until_the_context_is_full(model: _native.Model) -> None:
    steps = generate(model, n_ctx=64, max_tokens=1000, steps=1)
    assert steps[-1].finish == "context"
    assert sum(len(step.tokens) for step in steps) == 64 - len(PROMPT)


def test_an_empty_prompt(model: _native.Model, path: Path) -> None:
    """The native session denoises without a prompt; the public call needs one."""
    steps = generate(model, np.empty(0, dtype=np.int32))
    assert sum(len(step.tokens) for step in steps) == 8
    with DiffusionModel(path, n_threads=1) as public:
        with pytest.raises(ValueError, match="no tokens"):
            public.generate([])
        # Text gets a bos token.
        done = public.generate("", max_tokens=4, steps=1, eos=())
        assert (done.n_prompt, len(done.tokens), done.finish_reason) == (1, 4, "length")


def test_the_same_seed_gives_the_same_text(model: _native.Model, path: Path) -> None:
    first, again = generate(model, seed=2**64 - 1), generate(_native.Model(str(path), 1), seed=2**64 - 1)
    other = generate(model, seed=2**64 - 2)
    assert [s.canvas.tolist() for s in first] == [s.canvas.tolist() for s in again]
    assert [s.canvas.tolist() for s in first] != [s.canvas.tolist() for s in other]


def test_fewer_tokens_than_embedding_rows_are_refused(good: RawGguf, tmp_path: Path) -> None:
    """Padded embeddings exist; a token list shorter than the embedding is refused."""
    short = good.copy()
    tokens = short.get("tokenizer.ggml.tokens").value
    short.set("tokenizer.ggml.tokens", ARRAY, Array(STRING, tokens.items[:-16]))
    with pytest.raises(PyDiffusionError, match=r"tokenizer\.ggml\.tokens.*368 entries.*384 rows"):
        _native.Model(str(short.write(tmp_path / "short.gguf")), n_threads=1)


def test_duplicate_tokens_are_refused(good: RawGguf, tmp_path: Path) -> None:
    alike = good.copy()
    alike.set("tokenizer.ggml.tokens", ARRAY, Array(STRING, [String(b"a")] * 384))
    path = alike.write(tmp_path / "alike.gguf")
    with pytest.raises(ModelFormatError, match=r"tokenizer\.ggml\.tokens has 'a' twice, at 0 and 1"):
        DiffusionModel(path, n_threads=1)


# --- nonfinite weights ---

NONFINITE = {"nan": b"\x00\x00\xc0\x7f", "inf": b"\x00\x00\x80\x7f", "huge": b"\xff\xff\x7f\x7f"}
#: Cases that leave the logits finite: an infinite RoPE divisor rotates nothing, and the norm after one huge
#: weight divides by its result.
HARMLESS = {
    *(("rope_freqs.weight", value, share) for value in ("inf", "huge") for share in ("all", "one")),
    ("self_cond_down.weight", "huge", "one"),
}


@pytest.mark.parametrize("value", NONFINITE)
@pytest.mark.parametrize(
    "tensor",
    [
        "token_embd.weight",
        "output_norm.weight",
        "blk.0.attn_k.weight",
        "blk.0.ffn_gate_inp.weight",
        "blk.1.ffn_gate_inp.scale",
        "blk.1.ffn_down_exps.scale",
        "blk.0.layer_output_scale.weight",
        "rope_freqs.weight",
        "self_cond_down.weight",
    ],
)
@pytest.mark.parametrize("share", ["all", "one"])
def test_nonfinite_weights(good: RawGguf, tmp_path: Path, tensor: str, value: str, share: str) -> None:
    """Generating fails every time; only the cases of HARMLESS leave the logits finite."""
    broken = good.copy()
    data = broken.tensor(tensor).data
    broken.tensor(tensor).data = (
        NONFINITE[value] * (len(data) // 4) if share == "all" else NONFINITE[value] + data[4:]
    )
    model = _native.Model(str(broken.write(tmp_path / "broken.gguf")), n_threads=1)
    if (tensor, value, share) in HARMLESS:
        assert all(np.isfinite(step.entropy).all() for step in generate(model))
        return
    for _ in range(2):
        with pytest.raises(PyDiffusionError, match="not finite"):
            generate(model)


def test_a_router_with_nan_for_some_experts(good: RawGguf, tmp_path: Path) -> None:
    """Sorting scores with NaN must not read past the row; the error is that of the logits."""
    broken = good.copy()
    data = np.frombuffer(broken.tensor("blk.0.ffn_gate_inp.weight").data, dtype=np.float32).copy()
    rows = data.reshape(4, -1)
    rows[0], rows[1] = 1e30, np.nan
    broken.tensor("blk.0.ffn_gate_inp.weight").data = data.tobytes()
    model = _native.Model(str(broken.write(tmp_path / "router.gguf")), n_threads=1)
    with pytest.raises(PyDiffusionError, match="not finite"):
        generate(model)


def test_an_error_in_one_session_leaves_the_model_usable(
    model: _native.Model, path: Path, tmp_path: Path
) -> None:
    expected = [step.canvas.tolist() for step in generate(model)]
    copy = shutil.copy(path, tmp_path / "copy.gguf")
    public = DiffusionModel(copy, n_threads=1)
    session = public.new_session(64)
    session.encode(PROMPT)
    conditioning = np.full((CANVAS, public.n_vocab), np.nan, dtype=np.float32)
    with pytest.raises(PyDiffusionError, match="not finite"):
        session.denoise([0] * CANVAS, conditioning)
    with pytest.raises(ContextOverflowError):
        session.encode([0] * 64)
    assert [step.canvas.tolist() for step in generate(model)] == expected
    session.native.begin(**OPTIONS)
    again = []
    while (step := session.native.next_step()) is not None:
        again.append(step.canvas.tolist())
    assert again == expected
