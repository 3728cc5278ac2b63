"""Adapters in the native runtime: what sessions compute with them, what is refused."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from reference.random_checkpoint import SHAPES, random_ids
from support.adapters_by_hand import EVERYTHING, NativeTarget, merge, random_targets, shapes_of
from support.gguf_mutator import read_gguf
from support.kernels import OWN_KERNELS, needs
from support.scaled_weights import split_experts

from pydiffusion import _native
from pydiffusion._util.sampler_options import ENTROPY_BOUND_DEFAULTS
from pydiffusion.convert import convert

SHAPE = SHAPES["small"]
PROMPT = random_ids(0, "adapted", 40, SHAPE.vocab)  # longer than the window
CANVAS = random_ids(0, "adaptedc", SHAPE.canvas, SHAPE.vocab)
#: Types of files, and kernels of the CPU's matmuls.
KINDS = [
    pytest.param("f32", "ggml", id="f32"),
    pytest.param("q8_0", "ggml", id="q8_0"),
    *(pytest.param("q8_0", name, id=name, marks=needs(name)) for name in ("avx512-bf16", "amx")),
]

Adapters = list[tuple[_native.Adapter, float]]
Results = tuple[np.ndarray, np.ndarray, np.ndarray]


def run(session: _native.Session) -> Results:
    """Hidden states of a prompt, and logits of a canvas without and with self-conditioning."""
    hidden = session.encode(PROMPT, return_hidden=True)
    assert hidden is not None
    first = session.denoise(CANVAS, None)
    return hidden, first, session.denoise(CANVAS, first)


def new_session(model: _native.Model, adapters: Adapters = []) -> _native.Session:  # noqa: B006
    session = _native.Session(model, 200)
    session.set_adapters(adapters)
    return session


def same(ours: Iterable[np.ndarray], theirs: Iterable[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


def gap(ours: Results, theirs: Results) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def files(gguf_file: Callable[..., Path]) -> dict[str, Path]:
    return {type: gguf_file("small", type) for type in ("f32", "q8_0")}


@pytest.fixture(scope="module")
def opened(files: dict[str, Path]) -> Callable[..., _native.Model]:
    """(type, kernels) -> model, on two threads."""

    @functools.cache
    def get(type: str, kernels: str = "ggml") -> _native.Model:
        return _native.Model(str(files[type]), n_threads=2, kernels=kernels)

    return get


@pytest.fixture
def model(opened: Callable[..., _native.Model]) -> _native.Model:
    return opened("f32")


def load(model: _native.Model, seed: int, **options: object) -> _native.Adapter:
    path = Path(str(model.file.path))
    return _native.Adapter(model, f"adapter {seed}", random_targets(path, seed, **options))  # type: ignore[arg-type]


# --- what is computed ---


@pytest.mark.parametrize(
    "kind", [kind for kind in EVERYTHING if kind not in ("ffn_gate_exps", "ffn_up_exps")]
)
def test_each_matrix_changes_as_if_merged(
    kind: str, files: dict[str, Path], model: _native.Model, tmp_path: Path
) -> None:
    """On devices: tests/gpu/test_device_adapters.py."""
    path = files["f32"]
    changes = [
        (list(random_targets(path, seed, kinds=[kind])), scale) for seed, scale in ((1, 0.7), (2, 1.5))
    ]
    ours = run(new_session(model, [(_native.Adapter(model, "a", t), scale) for t, scale in changes]))
    merged = _native.Model(str(merge(path, changes, tmp_path / "m.gguf")), n_threads=2, kernels="ggml")
    theirs, without = run(new_session(merged)), run(new_session(model))
    assert gap(ours, theirs) < 2e-4 < 0.05 < gap(ours, without)


def test_each_mode_has_its_own_changes(model: _native.Model) -> None:
    reading, denoising = load(model, 1, side="encoder"), load(model, 1, side="decoder")
    both, plain = run(new_session(model, [(load(model, 1), 1.0)])), run(new_session(model))
    ours = run(new_session(model, [(reading, 1.0)]))
    assert np.array_equal(ours[0], both[0]) and not np.array_equal(ours[1], both[1])
    ours = run(new_session(model, [(denoising, 1.0)]))
    assert np.array_equal(ours[0], plain[0]) and not np.array_equal(ours[1], plain[1])
    assert same(run(new_session(model, [(reading, 1.0), (denoising, 1.0)])), both)


def test_feed_forward_lengths_before_padding(
    checkpoint_folder: Callable[..., Path], files: dict[str, Path], tmp_path: Path
) -> None:
    """A padded file has longer matrices; what was trained on the shorter ones fits it."""
    path, shorter = tmp_path / "padded.gguf", files["f32"]
    convert(checkpoint_folder("small"), path, "q8_0", pad=True)
    assert shapes_of(path)["blk.0.ffn_gate"] > shapes_of(shorter)["blk.0.ffn_gate"], "nothing is padded"
    model = _native.Model(str(path), n_threads=2)
    short = [(n, s, a, b) for n, s, a, b in random_targets(shorter, 3)]

    def padded(name: str, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        *experts, n_out, n_in = shapes_of(path)[name]
        halves = np.split(b, 2, axis=-2) if "gate_up" in name else [b]
        long_a = np.zeros((*a.shape[:-1], n_in), np.float32)
        long_a[..., : a.shape[-1]] = a
        long_b = np.zeros((*experts, n_out, b.shape[-1]), np.float32)
        for i, half in enumerate(halves):
            at = i * (n_out // len(halves))
            long_b[..., at : at + half.shape[-2], :] = half
        return long_a, long_b

    long = [(name, side, *padded(name, a, b)) for name, side, a, b in short]
    ours, theirs = (run(new_session(model, [(_native.Adapter(model, "a", t), 1.0)])) for t in (short, long))
    assert same(ours, theirs)
    assert gap(ours, run(new_session(model))) > 0.05


def test_split_experts(files: dict[str, Path], tmp_path: Path) -> None:
    """One change of gate and up together equals two of them apart, on files of both kinds."""
    together = list(random_targets(files["f32"], 5, kinds=["ffn_gate_up_exps", "ffn_down_exps"]))
    apart: list[NativeTarget] = []
    for name, side, a, b in together:
        if "gate_up" not in name:
            apart.append((name, side, a, b))
            continue
        for half, rows in zip(("ffn_gate_exps", "ffn_up_exps"), np.split(b, 2, axis=1), strict=True):
            apart.append((name.replace("ffn_gate_up_exps", half), side, a, rows.copy()))
    file = read_gguf(files["f32"])
    split_experts(file)
    results = []
    for path in (files["f32"], file.write(tmp_path / "split.gguf")):
        model = _native.Model(str(path), n_threads=2)
        results += [
            run(new_session(model, [(_native.Adapter(model, "a", t), 1.0)])) for t in (together, apart)
        ]
    assert all(gap(results[0], other) < 1e-4 for other in results[1:])
    assert gap(results[0], run(new_session(model))) > 0.05


@pytest.mark.parametrize("kernels", OWN_KERNELS)
@pytest.mark.parametrize("rank", [1, 16, 40])
def test_our_kernels(kernels: str, rank: int, opened: Callable[..., _native.Model]) -> None:
    """As far from ggml's as without adapters: activations are bfloat16."""
    results = []
    for name in ("ggml", kernels):
        model = opened("q8_0", name)
        session = new_session(model)
        plain = session.encode(PROMPT, return_hidden=True)
        adapted = new_session(model, [(load(model, 1, rank=rank), 0.5)])
        results.append((plain, adapted.encode(PROMPT, return_hidden=True)))
    assert "add_low_rank_tiles" in new_steps(opened("q8_0", kernels), rank)
    (plain, changed), (our_plain, our_changed) = results
    ours, usual, effect = (
        float(np.abs(a - b).mean()) for a, b in ((changed, our_changed), (plain, our_plain), (plain, changed))
    )
    assert 0 < ours < 3 * usual < effect


def new_steps(model: _native.Model, rank: int) -> dict[str, int]:
    session = new_session(model, [(load(model, 1, rank=rank), 0.5)])
    session.denoise(CANVAS, None)
    return session.step_ops


# --- bits ---


@pytest.mark.parametrize(("type", "kernels"), KINDS)
def test_off_equals_never_loaded(type: str, kernels: str, opened: Callable[..., _native.Model]) -> None:
    model = opened(type, kernels)
    plain = new_session(model)
    expected = run(plain)
    adapter = load(model, 1)
    session = new_session(model, [(adapter, 0.0)])
    assert same(run(session), expected)
    assert session.step_ops == plain.step_ops, "not one node more"
    session.set_adapters([(adapter, 1.0)])
    assert not same([session.denoise(CANVAS, None)], [expected[1]])
    session.set_adapters([])
    assert same([session.denoise(CANVAS, None)], [expected[1]])


@pytest.mark.parametrize(("type", "kernels"), KINDS)
def test_threads_and_chunks_change_no_bit(type: str, kernels: str, files: dict[str, Path]) -> None:
    results = []
    for n_threads in (1, 3):
        model = _native.Model(str(files[type]), n_threads=n_threads, kernels=kernels)
        session = new_session(model, [(load(model, 1, rank=5), 0.5), (load(model, 2), 2.0)])
        if n_threads == 3:
            for ids in np.split(PROMPT, [1, 18]):
                session.encode(ids)
            first = session.denoise(CANVAS, None)
            results.append((first, session.denoise(CANVAS, first)))
        else:
            results.append(run(session)[1:])
    assert same(*results)


def steps_of(session: _native.Session, step: Callable[[], _native.Step | None]) -> list[np.ndarray]:
    return [s.entropy for s in iter(step, None) if s is not None]


def begin(session: _native.Session, seed: int) -> None:
    session.encode(PROMPT[: 10 + seed])
    generate(session, seed)


def generate(session: _native.Session, seed: int) -> None:
    options = {**ENTROPY_BOUND_DEFAULTS, "steps": 3, "confidence_threshold": 0.0}
    session.begin(max_tokens=2 * SHAPE.canvas, seed=seed, eos=[], **options)


@pytest.mark.parametrize(("type", "kernels"), KINDS)
def test_different_adapters_in_one_batch(
    type: str, kernels: str, opened: Callable[..., _native.Model]
) -> None:
    model = opened(type, kernels)
    one, two = load(model, 1, rank=3), load(model, 2)
    lists: list[Adapters] = [[(one, 1.0)], [], [(two, 0.5)], [(two, 0.5)], [(one, 0.3), (two, 1.0)]]
    alone = []
    for seed, adapters in enumerate(lists):
        session = new_session(model, adapters)
        begin(session, seed)
        alone.append(steps_of(session, session.next_step))
    sessions = [new_session(model, adapters) for adapters in lists]
    for seed, session in enumerate(sessions):
        begin(session, seed)
    batch = _native.Batch(model)
    together: list[list[np.ndarray]] = [[] for _ in lists]
    while any(steps := batch.next_steps(sessions)):
        assert batch.n_graphs == 1
        for found, step in zip(together, steps, strict=True):
            if step is not None:
                assert isinstance(step, _native.Step), step
                found.append(step.entropy)
    for ours, theirs in zip(together, alone, strict=True):
        assert len(ours) == len(theirs) > 2
        assert same(ours, theirs)
    assert not same(together[0][:1], together[2][:1])


# --- sessions ---


def test_the_content_is_encoded_anew_when_it_is_read(model: _native.Model) -> None:
    adapter = load(model, 1)
    expected = run(new_session(model, [(adapter, 1.0)]))
    session = new_session(model)
    session.encode(PROMPT)
    session.set_adapters([(adapter, 1.0)])
    assert session.n_past == session.n_encoded == len(PROMPT), "not before it is read"
    assert np.array_equal(session.tokens, PROMPT)
    assert same([session.denoise(CANVAS, None)], [expected[1]])
    assert session.n_encoded == 2 * len(PROMPT)
    session.set_adapters([(adapter, 1.0)])
    session.denoise(CANVAS, None)
    assert session.n_encoded == 2 * len(PROMPT), "the same list: nothing happens"
    session.set_adapters([])
    session.set_adapters([(adapter, 1.0)])
    session.denoise(CANVAS, None)
    assert session.n_encoded == 2 * len(PROMPT), "there and back: the cache was right"
    assert session.adapters == [(adapter, 1.0)]


def test_what_reads_the_cache(model: _native.Model) -> None:
    """Encoding, generations, copies, truncation, saved rows: as if the adapters had always been there."""
    adapters = [(load(model, 1), 1.0)]

    def late(n: int = len(PROMPT)) -> _native.Session:
        session = new_session(model)
        session.encode(PROMPT[:n])
        session.set_adapters(adapters)
        return session

    early = new_session(model, adapters)
    expected = run(early)[1:]
    session = late(17)
    session.encode(PROMPT[17:])
    assert same(session_logits(session), expected)
    session = new_session(model, adapters)
    session.copy_from(late())
    assert same(session_logits(session), expected)
    session = new_session(model)
    session.copy_from(early)  # whose adapters it doesn't have
    assert same(session_logits(session), run(new_session(model))[1:])
    assert same(
        (x for pair in late().cache_rows() for x in pair), (x for pair in early.cache_rows() for x in pair)
    )
    session = late()
    session.truncate(9)
    assert session.n_past == 9
    session.encode(PROMPT[9:])
    assert same(session_logits(session), expected)
    results = []
    for session in (late(), early):
        generate(session, 1)
        results.append(steps_of(session, session.next_step))
    assert len(results[0]) > 4 and same(*results)


def session_logits(session: _native.Session) -> tuple[np.ndarray, np.ndarray]:
    first = session.denoise(CANVAS, None)
    return first, session.denoise(CANVAS, first)


def test_an_imatrix_has_the_models_matrices_only(model: _native.Model) -> None:
    names = []
    for adapters in ([], [(load(model, 1), 1.0)]):
        session = new_session(model, adapters)
        session.collect_imatrix(True)
        run(session)
        names.append(set(session.imatrix()))
    assert names[0] == names[1] > {"blk.0.attn_q.weight", "blk.0.ffn_down_exps.weight"}


def test_a_generation_ends_with_its_adapters(model: _native.Model) -> None:
    adapter = load(model, 1)
    session = new_session(model)
    begin(session, 1)
    assert session.next_step() is not None
    session.set_adapters([])
    assert session.next_step() is not None, "the same list"
    session.set_adapters([(adapter, 1.0)])
    assert session.next_step() is None


# --- refusals ---


def test_a_refused_list_leaves_the_earlier_one(opened: Callable[..., _native.Model]) -> None:
    model, other = opened("f32"), opened("q8_0")
    adapter = load(model, 1, kinds=["attn_q"])
    session = new_session(model, [(adapter, 0.5)])
    with pytest.raises(ValueError, match=r"adapter 2.*another model"):
        session.set_adapters([(adapter, 1.0), (load(other, 2, kinds=["attn_q"]), 1.0)])
    with pytest.raises(ValueError, match=r"scale of adapter.*NaN or infinite"):
        session.set_adapters([(adapter, float("nan"))])
    assert session.adapters == [(adapter, 0.5)]


D, Q = SHAPE.d, SHAPE.n_head * SHAPE.head_dim
REFUSED: dict[str, tuple[str, str, tuple[int, ...], tuple[int, ...], str]] = {
    "a norm": ("blk.0.attn_norm", "both", (2, D), (D, 2), "no matrix that can be adapted"),
    "the embedding": ("token_embd", "both", (2, D), (SHAPE.vocab, 2), "no matrix that can be adapted"),
    "no layer": ("attn_q", "both", (2, D), (Q, 2), "no matrix that can be adapted"),
    "a layer too many": ("blk.9.attn_q", "both", (2, D), (Q, 2), "is not in the model"),
    "no value matrix": ("blk.2.attn_v", "both", (2, D), (Q, 2), "is not in the model"),
    "another side": ("blk.0.attn_q", "left", (2, D), (Q, 2), "permitted are 'encoder', 'decoder' and 'both'"),
    "no self-conditioning": ("self_cond_up", "encoder", (2, D), (SHAPE.dense, 2), "for the decoder"),
    "inputs": ("blk.0.attn_q", "both", (2, D - 1), (Q, 2), "does not fit the model"),
    "outputs": ("blk.0.attn_q", "both", (2, D), (Q + 1, 2), "does not fit the model"),
    "two ranks": ("blk.0.attn_q", "both", (2, D), (Q, 3), "two ranks"),
    "dimensions": ("blk.0.attn_q", "both", (1, 2, D), (1, Q, 2), "needs (rank, n_in)"),
    "experts": ("blk.0.ffn_down_exps", "both", (2, 64), (D, 2), "needs (n_expert, rank, n_in)"),
    "too few experts": ("blk.0.ffn_down_exps", "both", (5, 2, 64), (5, D, 2), "does not fit the model"),
    "empty": ("blk.0.attn_q", "both", (0, D), (Q, 0), "is empty"),
    "half a row": ("blk.0.ffn_gate_up_exps", "both", (6, 2, D), (6, 127, 2), "127 rows"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_changes(case: str, model: _native.Model) -> None:
    tensor, side, shape_a, shape_b, message = REFUSED[case]
    target = (tensor, side, np.zeros(shape_a, np.float32), np.zeros(shape_b, np.float32))
    with pytest.raises(ValueError, match=f'"?the file"?.*{tensor}.*{re.escape(message)}'):
        _native.Adapter(model, "the file", [target])


def test_refused_values(model: _native.Model) -> None:
    a, b = np.ones((2, D), np.float32), np.ones((Q, 2), np.float32)
    for broken in (a, b):
        broken[1, 1] = np.nan
        with pytest.raises(ValueError, match=r"blk\.0\.attn_q.*NaN or infinite"):
            _native.Adapter(model, "x", [("blk.0.attn_q", "both", a, b)])
        broken[1, 1] = 1
    with pytest.raises(ValueError, match=r"blk\.0\.attn_q.*two changes for the encoder"):
        _native.Adapter(model, "x", [("blk.0.attn_q", side, a, b) for side in ("encoder", "both")])
    a, b = np.ones((6, 2, D), np.float32), np.ones((6, 2 * SHAPE.expert, 2), np.float32)
    both = ("blk.0.ffn_gate_up_exps", "both", a, b)
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_gate_exps.*two changes for the encoder"):
        _native.Adapter(
            model, "x", [both, ("blk.0.ffn_gate_exps", "encoder", a, b[:, SHAPE.expert :].copy())]
        )
    down = np.ones((2, SHAPE.dense + 1), np.float32)
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_down"):
        _native.Adapter(model, "x", [("blk.0.ffn_down", "both", down, np.ones((D, 2), np.float32))])
    with pytest.raises(TypeError, match="must be"):
        _native.Adapter(model, "x", [("blk.0.attn_q", "both", "a", b)])
    with pytest.raises(TypeError, match="None"):
        new_session(model, [(None, 1.0)])  # type: ignore[list-item]
    with pytest.raises(ZeroDivisionError):
        _native.Adapter(model, "x", (1 / 0 for _ in range(1)))  # type: ignore[misc]


def test_what_an_adapter_tells(model: _native.Model) -> None:
    a, b = np.ones((3, D), np.float32), np.ones((Q, 3), np.float32)
    adapter = _native.Adapter(
        model, "näme", [("blk.0.attn_q", "both", a, b), ("blk.1.attn_q", "encoder", a, b)]
    )
    assert (adapter.name, adapter.n_targets, adapter.rank) == ("näme", 2, 3)
    assert adapter.n_bytes == 2 * 4 * (a.size + b.size)
