"""Logits against goldens: those that transformers gave for the same weights (no torch needed).

docs/parity.md says what is compared and what was measured.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from reference.random_checkpoint import SHAPES, digest
from support.models import (
    WEIGHT_TYPES,
    assert_own_attention,
    case,
    compare,
    denoise_case,
    encode_case,
    load_golden,
    open_model,
)
from support.parity import CASES, MAX_BOUND, MEAN_BOUND, Q8_0_CACHE_MEAN, SOURCES, assert_within

from pydiffusion import _native

Golden = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def f32_model(gguf_file: Callable[..., Path]) -> Callable[[str, str], _native.Model]:
    """``f32_model("small-f32", "f32")``: the F32 file of a golden's checkpoint with that cache type."""
    made: dict[tuple[str, str], _native.Model] = {}

    def get(source: str, kv_type: str) -> _native.Model:
        if (source, kv_type) not in made:
            shape, options = SOURCES[source]
            made[source, kv_type] = open_model(
                gguf_file(shape, "f32", **options), kv_type, WEIGHT_TYPES["f32"]
            )
        return made[source, kv_type]

    return get


@pytest.mark.parametrize("source", SOURCES)
def test_weights_are_those_of_the_goldens(source: str) -> None:
    shape, options = SOURCES[source]
    made = digest(shape, options["seed"])
    assert made == str(load_golden(f"logits-{source}")["digest"]), (
        "random_checkpoint.py no longer makes the goldens' weights: run make_goldens.py again"
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("source", SOURCES)
def test_f32_logits(source: str, name: str, f32_model: Callable, report: Callable[[str], None]) -> None:
    golden = case(load_golden(f"logits-{source}"), name)
    model = f32_model(source, "f32")
    session = _native.Session(model, 128)
    hidden = encode_case(session, golden)
    ours = denoise_case(session, golden)
    assert_own_attention(model, session, len(SHAPES[SOURCES[source][0]].layers))
    for key, logits in ours.items():
        difference = compare(logits, golden[key])
        report(f"F32, cache f32, {source}, {name}, {key}: {difference}")
        assert_within(difference, MEAN_BOUND, MAX_BOUND)
    # Hidden states are of order one, logits of order ten: a tenth of the bounds.
    gap = np.abs(hidden - golden["encoder_last_hidden_state"])
    report(f"F32, cache f32, {source}, {name}, encoder hidden: mean {gap.mean():.1e}, max {gap.max():.1e}")
    assert gap.mean() <= MEAN_BOUND / 10 and gap.max() <= MAX_BOUND / 10


@pytest.mark.parametrize("name", ["short", "long"])
@pytest.mark.parametrize("source", SOURCES)
def test_next_token_logits(
    source: str, name: str, f32_model: Callable, report: Callable[[str], None]
) -> None:
    """The output head on transformers' hidden state of the last token, in one call and token by token."""
    golden = case(load_golden(f"logits-{source}"), name)
    model = f32_model(source, "f32")
    data = model.file.tensor_bytes("token_embd.weight")
    head = data.view(np.float32).reshape(model.n_vocab, -1)
    cap = np.float32(model.hparams["soft_cap"])
    wanted = cap * np.tanh(golden["encoder_last_hidden_state"][-1] @ head.T / cap)
    ids = golden["prompt_ids"]
    together, singly = _native.Session(model, 128), _native.Session(model, 128)
    for i in range(len(ids)):
        by_token = singly.next_logits(ids[i : i + 1])
    for how, logits in (("at once", together.next_logits(ids)), ("token by token", by_token)):
        difference = compare(logits[None], wanted[None])
        report(f"F32, cache f32, {source}, {name}, next token's logits {how}: {difference}")
        assert_within(difference, MEAN_BOUND, MAX_BOUND)
    assert together.n_past == singly.n_past == len(ids)
    # The cache is that of a prompt that was only read.
    logits = denoise_case(together, golden)["logits"]
    assert_within(compare(logits, golden["logits"]), MEAN_BOUND, MAX_BOUND)


@pytest.mark.parametrize("kernels", ["ggml", "cuda"])
def test_next_token_logits_of_a_device(kernels: str, gguf_file: Callable[..., Path]) -> None:
    shape, options = SOURCES["small-f32"]
    path, ids = gguf_file(shape, "f32", **options), load_golden("logits-small-f32")["long/prompt_ids"]
    device = {"device": "host", "n_gpu_layers": -1, "kernels": kernels}
    on_cpu, on_host = (_native.Model(str(path), n_threads=1, kv_type="f32", **more) for more in ({}, device))
    assert on_host.description["backend"] == "host"
    wanted, logits = (_native.Session(model, 128).next_logits(ids)[None] for model in (on_cpu, on_host))
    assert_within(compare(logits, wanted), MEAN_BOUND, MAX_BOUND)


@pytest.mark.parametrize("source", SOURCES)
def test_f16_cache(source: str, f32_model: Callable, report: Callable[[str], None]) -> None:
    """A float16 cache rounds keys and values to 11 bits; sums stay float32."""
    for name in CASES:
        golden = case(load_golden(f"logits-{source}"), name)
        model = f32_model(source, "f16")
        session = _native.Session(model, 128)
        encode_case(session, golden)
        tied = golden["router_gap"] < F16_ROUTER_GAP
        for key, logits in denoise_case(session, golden).items():
            assert_own_attention(model, session, len(SHAPES[SOURCES[source][0]].layers))
            difference = compare(logits, golden[key])
            remark = f" (an expert is chosen by {golden['router_gap']:.0e})" if tied else ""
            report(f"F32, cache f16, {source}, {name}, {key}: {difference}{remark}")
            if tied:
                assert difference.mean <= F16_CACHE_TIED_MEAN, difference
            else:
                assert_within(difference, F16_CACHE_MEAN, F16_CACHE_MAX)


#: Two to five times what was measured, 3.8e-3 and 2.2e-2. Rounding keys, queries, values and outputs to
#: float16 in transformers gives means of 2.7e-3 to 4.3e-3.
F16_CACHE_MEAN, F16_CACHE_MAX = 1e-2, 1e-1
#: Where two experts' scores differ by less than this (in log), float16 may choose the other one, and so does
#: transformers when its keys and values are rounded: then only a loose bound holds.
F16_ROUTER_GAP, F16_CACHE_TIED_MEAN = 1e-3, 0.5


@pytest.mark.parametrize("source", SOURCES)
def test_q8_0_cache(source: str, f32_model: Callable, report: Callable[[str], None]) -> None:
    """Eight bits for keys and values: about what Q8_0 weights cost, at half the memory of float16."""
    n_bytes = {}
    for kv_type in ("f16", "q8_0"):
        n_bytes[kv_type] = _native.Session(f32_model(source, kv_type), 128).cache_bytes
    assert n_bytes["q8_0"] == pytest.approx(n_bytes["f16"] * 34 / 64, rel=0.02)
    for name in CASES:
        golden = case(load_golden(f"logits-{source}"), name)
        session = _native.Session(f32_model(source, "q8_0"), 128)
        encode_case(session, golden)
        for key, logits in denoise_case(session, golden).items():
            difference = compare(logits, golden[key])
            report(f"F32, cache q8_0, {source}, {name}, {key}: {difference}")
            assert difference.mean <= Q8_0_CACHE_MEAN, difference


def test_a_q8_0_cache_needs_heads_that_fit(gguf_file: Callable) -> None:
    model = _native.Model(str(gguf_file("tiny", "f32", seed=0, dtype="f32")), 1, kv_type="q8_0")
    with pytest.raises(ValueError, match="a multiple of 32; this model has 16"):
        _native.Session(model, 64)


def test_self_conditioning_matters(f32_model: Callable) -> None:
    """The goldens detect a runtime that ignores self-conditioning: its effect is far beyond the bounds."""
    golden = load_golden("logits-small-f32")
    for name in CASES:
        assert compare(golden[f"{name}/logits"], golden[f"{name}/logits_sc"]).mean > 1000 * MEAN_BOUND


@pytest.mark.parametrize("chunk", [1, 5, 16, 37])
@pytest.mark.parametrize("source", ["small-f32", "wide-f32"])
def test_prompt_in_chunks(source: str, chunk: int, f32_model: Callable) -> None:
    golden = case(load_golden(f"logits-{source}"), "long")
    session = _native.Session(f32_model(source, "f32"), 128)
    hidden = encode_case(session, golden, chunk)
    assert session.n_past == len(golden["prompt_ids"])
    assert np.abs(hidden - golden["encoder_last_hidden_state"]).max() <= MAX_BOUND / 10
    for key, logits in denoise_case(session, golden).items():
        assert_within(compare(logits, golden[key]), MEAN_BOUND, MAX_BOUND)


@pytest.mark.parametrize("keep", [0, 1, 9, 30, 52])
def test_truncate_then_encode_again(keep: int, f32_model: Callable) -> None:
    """Truncating, within the window and beyond, gives the logits of a session that never went further."""
    golden = case(load_golden("logits-small-f32"), "long")
    prompt = golden["prompt_ids"]
    session = _native.Session(f32_model("small-f32", "f32"), 128)
    session.encode(prompt)
    session.encode(prompt[::-1].copy())
    session.denoise(golden["canvas_ids"], None)
    session.truncate(keep)
    assert session.n_past == keep
    assert np.array_equal(session.tokens, prompt[:keep])
    session.encode(prompt[keep:])
    assert np.array_equal(session.tokens, prompt)
    for key, logits in denoise_case(session, golden).items():
        assert_within(compare(logits, golden[key]), MEAN_BOUND, MAX_BOUND)


@pytest.mark.parametrize("source", ["small-f32", "wide-f32"])
def test_denoising_leaves_the_cache_alone(source: str, f32_model: Callable) -> None:
    """The same pass twice is the same to the bit, whatever came between; so is what is encoded after it."""
    golden = case(load_golden(f"logits-{source}"), "long")
    quiet, busy = (_native.Session(f32_model(source, "f32"), 128) for _ in range(2))
    for session in (quiet, busy):
        session.encode(golden["prompt_ids"])
    first = denoise_case(busy, golden)
    busy.denoise(golden["canvas_ids"][::-1].copy(), golden["self_conditioning_logits"][::-1].copy())
    again = denoise_case(busy, golden)
    for key, logits in first.items():
        assert np.array_equal(logits, again[key]), key
    assert busy.n_past == len(golden["prompt_ids"])
    after = [s.encode(golden["canvas_ids"], return_hidden=True) for s in (quiet, busy)]
    assert np.array_equal(*after)


def test_threads_agree(gguf_file: Callable[..., Path], f32_model: Callable) -> None:
    golden = case(load_golden("logits-wide-f32"), "long")
    shape, options = SOURCES["wide-f32"]
    more = open_model(gguf_file(shape, "f32", **options), "f32", WEIGHT_TYPES["f32"], n_threads=2)
    assert more.n_threads == 2
    session = _native.Session(more, 128)
    encode_case(session, golden)
    for key, logits in denoise_case(session, golden).items():
        assert_within(compare(logits, golden[key]), MEAN_BOUND, MAX_BOUND)


def test_sessions_do_not_disturb_each_other(f32_model: Callable) -> None:
    """Two sessions of one model, used in alternation, give what each gives alone."""
    golden = load_golden("logits-small-f32")
    cases = [case(golden, name) for name in ("short", "long")]
    sessions = [_native.Session(f32_model("small-f32", "f32"), 128) for _ in cases]
    for session, wanted in zip(sessions, cases, strict=True):
        encode_case(session, wanted)
    for session, wanted in zip(sessions, cases, strict=True):
        for key, logits in denoise_case(session, wanted).items():
            assert_within(compare(logits, wanted[key]), MEAN_BOUND, MAX_BOUND)
