"""Adapters in the native runtime: memory, devices, interruptions, traces, imatrices."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from reference.random_checkpoint import SHAPES, random_ids
from support.adapters_by_hand import EVERYTHING, NativeTarget, merge, random_targets
from support.kernels import OWN_KERNELS

from pydiffusion import _native
from pydiffusion._util.sampler_options import ENTROPY_BOUND_DEFAULTS

SHAPE = SHAPES["small"]
PROMPT = random_ids(0, "faults", 40, SHAPE.vocab)  # longer than the window
CANVAS = random_ids(0, "faultsc", SHAPE.canvas, SHAPE.vocab)
#: Of a file whose experts' gate and up are one matrix.
KINDS = [kind for kind in EVERYTHING if kind not in ("ffn_gate_exps", "ffn_up_exps")]

Adapters = list[tuple[_native.Adapter, float]]


@pytest.fixture(scope="module")
def opened(gguf_file: Callable[..., Path]) -> Callable[..., _native.Model]:
    """(type, options) -> model, on two threads."""

    @functools.cache
    def get(type: str, **options: object) -> _native.Model:
        return _native.Model(str(gguf_file("small", type)), n_threads=2, **options)  # type: ignore[arg-type]

    return get


@pytest.fixture
def model(opened: Callable[..., _native.Model]) -> _native.Model:
    return opened("f32")


def load(model: _native.Model, seed: int, **options: object) -> _native.Adapter:
    path = Path(str(model.file.path))
    return _native.Adapter(model, f"adapter {seed}", random_targets(path, seed, **options))  # type: ignore[arg-type]


def new_session(model: _native.Model, adapters: Adapters, n_ctx: int = 200) -> _native.Session:
    session = _native.Session(model, n_ctx)
    session.set_adapters(adapters)
    return session


def logits(session: _native.Session) -> np.ndarray:
    session.encode(PROMPT)
    return session.denoise(CANVAS, None)


def entropy(session: _native.Session) -> np.ndarray:
    step = begin(session).next_step()
    assert step is not None
    return step.entropy


def begin(session: _native.Session) -> _native.Session:
    session.encode(PROMPT)
    options = {**ENTROPY_BOUND_DEFAULTS, "steps": 3, "confidence_threshold": 0.0}
    session.begin(max_tokens=SHAPE.canvas, seed=1, eos=[], **options)
    return session


def gap(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).mean())


# --- memory ---


def test_adapters_that_are_off_are_not_kept(model: _native.Model) -> None:
    adapter = load(model, 1)
    assert adapter.n_owners == 1
    session = new_session(model, [(adapter, 1.0)])
    logits(session)
    assert adapter.n_owners == 2
    session.set_adapters([])
    assert adapter.n_owners == 1, "neither by the graph nor by the cache"
    batch, sessions = _native.Batch(model), [new_session(model, [(adapter, s)]) for s in (1.0, 2.0)]
    for session in sessions:
        begin(session)
    assert all(isinstance(step, _native.Step) for step in batch.next_steps(sessions))
    for session in sessions:
        session.set_adapters([])
    assert adapter.n_owners == 1


def test_a_new_adapter_in_the_place_of_one_that_is_gone(model: _native.Model) -> None:
    """Its factors may be where the other's were: neither graph nor cache is the other's."""
    session = new_session(model, [])
    session.encode(PROMPT)
    for seed in range(4):
        session.set_adapters([(load(model, seed), 1.0)])
        expected = logits(new_session(model, [(load(model, seed), 1.0)]))
        assert np.array_equal(session.denoise(CANVAS, None), expected)
        session.set_adapters([])


def test_what_makes_adapters_equal(model: _native.Model) -> None:
    one, two = load(model, 1, kinds=["attn_q"]), load(model, 1, kinds=["attn_q"])
    session = new_session(model, [(one, 1.0)])
    assert session.adapters == [(one, 1.0)] != [(two, 1.0)]
    assert {session.adapters[0][0], one, two} == {one, two}
    assert one != "adapter 1"


# --- values ---


@pytest.mark.parametrize("factor", ["a", "b"])
def test_values_that_bfloat16_would_make_infinite(factor: str, opened: Callable[..., _native.Model]) -> None:
    shapes = {"a": (2, SHAPE.d), "b": (SHAPE.n_head * SHAPE.head_dim, 2)}
    arrays = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    arrays[factor][1, 1] = -3.4e38
    target = ("blk.0.attn_q", "both", arrays["a"], arrays["b"])
    with pytest.raises(ValueError, match=rf"blk\.0\.attn_q.*its {factor} that are too large for BF16"):
        _native.Adapter(opened("q8_0"), "large", [target])
    _native.Adapter(opened("f32"), "large", [target])
    arrays[factor][1, 1] = 3.38e38
    _native.Adapter(opened("q8_0"), "large", [target])


def test_scales_of_zero_are_not_blamed(opened: Callable[..., _native.Model]) -> None:
    model = opened("f32")
    adapter, conditioning = load(model, 1), np.full((SHAPE.canvas, SHAPE.vocab), np.nan, np.float32)
    for scale, blamed in ((0.0, False), (1.0, True)):
        session = new_session(model, [(adapter, scale)])
        session.encode(PROMPT)
        with pytest.raises(Exception, match="NaN or infinite") as error:
            session.denoise(CANVAS, conditioning)
        assert ("adapters" in str(error.value)) == blamed


# --- devices ---


@pytest.mark.parametrize("kernels", ["ggml", "cuda"])
def test_a_device_without_bfloat16(kernels: str, opened: Callable[..., _native.Model]) -> None:
    """It gets float32 factors: its matmuls could not read others."""
    with_bf16 = opened("q8_0", device="host", kernels=kernels)
    without = opened("q8_0", device="host-without-bf16", kernels=kernels)
    ours, theirs = load(without, 1, kinds=KINDS), load(with_bf16, 1, kinds=KINDS)
    assert theirs.n_bytes < ours.n_bytes
    plain = logits(new_session(without, []))
    adapted = [logits(new_session(m, [(a, 1.0)])) for m, a in ((with_bf16, theirs), (without, ours))]
    assert 4 * gap(*adapted) < gap(plain, adapted[1])


@pytest.mark.parametrize("kinds", [["attn_q"], ["attn_k", "attn_v"], ["ffn_gate"], ["ffn_up"], KINDS])
def test_parts_of_concatenated_matrices(kinds: list[str], opened: Callable[..., _native.Model]) -> None:
    """On a device, q, k and v of a BF16 file are one matrix, gate and up another: adapters change their rows
    of the result, about as exactly as without.
    """
    models = opened("bf16", kernels="ggml"), opened("bf16", device="host", kernels="cuda")
    plain = [logits(new_session(model, [])) for model in models]
    # Small changes: of larger ones, rounding changes which experts are chosen.
    adapted = [
        logits(new_session(model, [(load(model, 1, kinds=kinds, share=0.05), 1.0)])) for model in models
    ]
    assert gap(*adapted) < 2 * gap(*plain) < gap(plain[0], adapted[0])


def test_a_batch_with_experts_on_the_cpu(opened: Callable[..., _native.Model]) -> None:
    """Layers on a device, experts in main memory: the ranges of tokens change in both."""
    model = opened("f32", device="host", n_cpu_moe=2)
    one, two = load(model, 1, rank=3), load(model, 2)
    lists: list[Adapters] = [[], [(one, 1.0)], [(one, 0.5), (two, 0.5)], []]
    alone = [entropy(new_session(model, adapters)) for adapters in lists]
    sessions = [begin(new_session(model, adapters)) for adapters in lists]
    for ours, theirs in zip(_native.Batch(model).next_steps(sessions), alone, strict=True):
        assert isinstance(ours, _native.Step), ours
        assert gap(ours.entropy, theirs) < 0.02
    assert gap(alone[0], alone[1]) > 0.1 < gap(alone[1], alone[2])


# --- interruptions ---


class Stop(Exception):
    """Raised by a progress function."""


def test_an_interrupted_encoding_anew_loses_nothing(model: _native.Model) -> None:
    ids, more = random_ids(0, "long", 900, SHAPE.vocab), random_ids(0, "more", 5, SHAPE.vocab)
    adapters = [(load(model, 1), 1.0)]

    def session_of(adapters: Adapters) -> _native.Session:
        session = new_session(model, adapters, 1000)
        session.encode(ids)
        return session

    expected = session_of(adapters).denoise(CANVAS, None)
    session = session_of([])
    session.set_adapters(adapters)

    def stop(done: int, total: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        session.encode(more, progress=stop)
    assert 900 < session.n_encoded < 1800, "interrupted after a chunk"
    assert np.array_equal(session.tokens, ids) and session.n_past == 900
    copy = new_session(model, [], 1000)
    copy.copy_from(session)  # has no adapters of its own
    assert np.array_equal(copy.denoise(CANVAS, None), session_of([]).denoise(CANVAS, None))
    session.truncate(800)
    assert session.n_past == 800
    session.encode(ids[800:])
    assert np.array_equal(session.denoise(CANVAS, None), expected)


def test_progress_sees_the_tokens_so_far(model: _native.Model) -> None:
    session = new_session(model, [], 1000)
    seen: list[tuple[int, int]] = []
    session.encode(
        random_ids(0, "long", 900, SHAPE.vocab), progress=lambda done, _: seen.append((done, session.n_past))
    )
    assert len(seen) > 1 and all(done == n_past for done, n_past in seen)


def test_a_refused_canvas_leaves_the_content_as_it_is(model: _native.Model) -> None:
    session = new_session(model, [])
    session.encode(PROMPT)
    session.set_adapters([(load(model, 1), 1.0)])
    with pytest.raises(ValueError, match="canvas"):
        session.denoise(CANVAS[:-1], None)
    assert session.n_encoded == len(PROMPT), "not encoded anew for nothing"


# --- observers ---


def traces(model: _native.Model, adapters: Adapters) -> Iterator[dict]:
    session = new_session(model, adapters)
    session.trace_layers(True)
    session.encode(PROMPT)
    yield session.layer_trace()
    session.trace_layers(True)
    session.denoise(CANVAS, None)
    yield session.layer_trace()


@pytest.mark.parametrize(("device", "kernels"), [("cpu", "auto"), ("host", "ggml"), ("host", "cuda")])
def test_traces_are_those_of_the_merged_file(
    device: str, kernels: str, opened: Callable[..., _native.Model], tmp_path: Path
) -> None:
    model = opened("f32", device=device, kernels=kernels)
    path = Path(str(model.file.path))
    targets: list[NativeTarget] = list(random_targets(path, 1, kinds=KINDS))
    file = merge(path, [(targets, 1.0)], tmp_path / "merged.gguf")
    merged = _native.Model(str(file), n_threads=2, device=device, kernels=kernels)
    adapter = _native.Adapter(model, "a", targets)
    for ours, theirs, plain in zip(
        traces(model, [(adapter, 1.0)]), traces(merged, []), traces(model, []), strict=True
    ):
        assert ours.keys() == theirs.keys() and len(ours) > 5
        assert max(gap(ours[place], theirs[place]) for place in ours) < 5e-3
        assert max(gap(ours[place], plain[place]) for place in ours) > 0.05


@pytest.mark.parametrize("kernels", [pytest.param("ggml"), *OWN_KERNELS])
def test_an_imatrix_of_adapters_of_different_ranks(
    kernels: str, opened: Callable[..., _native.Model]
) -> None:
    """Factors of two adapters have the same names and other shapes: none is read as another, or collected."""
    model = opened("q8_0", kernels=kernels)
    kinds = ["ffn_down_exps", "ffn_gate_up_exps", "attn_q"]
    adapters = [(load(model, seed, rank=rank, kinds=kinds), 1e-6) for seed, rank in ((1, 1500), (2, 1))]
    found = []
    for active in ([], adapters):
        session = new_session(model, active)
        session.collect_imatrix(True)
        logits(session)
        found.append(session.imatrix())
    assert found[0].keys() == found[1].keys() > {"blk.0.attn_q.weight", "blk.0.ffn_down_exps.weight"}
    for name, (sums, counts) in found[0].items():
        assert counts.sum() == found[1][name][1].sum()
        assert np.allclose(sums.sum(), found[1][name][0].sum(), rtol=0.05)


def test_profiles_count_the_work_of_adapters(opened: Callable[..., _native.Model]) -> None:
    """On the CPU by nodes of ours, on a device by ggml's: as many operations."""
    rank, added = 5, []
    for options in ({}, {"device": "host", "kernels": "ggml"}):
        model = opened("f32", **options)
        totals = []
        for adapters in ([], [(load(model, 1, rank=rank), 0.5)]):
            session = new_session(model, adapters)
            logits(session)
            totals.append(sum(operations for _, operations, _ in session.profile_step().values()))
        added.append(totals[1] - totals[0])
    assert added[0] == added[1] > 0
