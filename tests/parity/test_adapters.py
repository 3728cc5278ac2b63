"""Logits with adapters against transformers with the same adapters applied by PEFT, float32."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference.random_checkpoint import SHAPES, random_ids
from support.gguf_mutator import read_gguf
from support.kernels import OWN_KERNELS
from support.models import compare
from support.parity import MAX_BOUND, MEAN_BOUND, ROUNDING_FACTOR, ROUTER_TIE
from support.scaled_weights import split_experts

from pydiffusion import _native
from pydiffusion.adapters.gguf_file import write_adapter_gguf
from pydiffusion.adapters.loading import load_adapter, matrices_of

pytestmark = pytest.mark.reference

#: What adapters change: options of ``make_adapter``.
ADAPTERS: dict[str, dict[str, Any]] = {
    "every target": {"seed": 1},
    "another": {"seed": 2, "r": 3, "use_rslora": True},
    "patterns": {
        "seed": 3,
        "rank_pattern": {
            r"layers\.1\.self_attn\.q_proj": 2, "experts.down_proj": 3, "self_conditioning.up_proj": 7,
        },
        "alpha_pattern": {"mlp.up_proj": 5, r"decoder\.layers\.0\.self_attn\.o_proj": 1},
    },
    "encoder alone": {"seed": 4, "sides": ("encoder",)},
    "decoder alone": {"seed": 5, "sides": ("decoder",)},
    "attention alone": {"seed": 6, "modules": ("q_proj", "v_proj"), "parameters": ()},
    "gate and up of experts alone": {"seed": 7, "modules": (), "parameters": ("experts.gate_up_proj",)},
    "down of experts alone": {"seed": 8, "modules": (), "parameters": ("experts.down_proj",)},
    "both alike": {
        "seed": 9, "alike": True, "parameters": (),
        "modules": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    },
}  # fmt: skip

Adapters = Sequence[tuple[Any, float]]
Logits = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def fresh(checkpoint_folder: Callable[..., Path]) -> Callable[..., Any]:
    """``fresh("small")``: transformers' model of that checkpoint, loaded anew."""
    from reference.hf_model import load_reference

    return lambda shape="small": load_reference(checkpoint_folder(shape))


@pytest.fixture(scope="module")
def saved(fresh: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``saved("every target", "small")``: a folder that PEFT saved, made once."""
    from support.peft_adapters import make_adapter

    made: dict[tuple[str, str], Path] = {}

    def get(name: str, shape: str = "small") -> Path:
        if (name, shape) not in made:
            folder = tmp_path_factory.mktemp("adapter") / name.replace(" ", "-")
            made[name, shape] = make_adapter(fresh(shape), folder, **ADAPTERS[name])
        return made[name, shape]

    return get


def passes(shape: str, n_prompt: int, seed: int = 1) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(name, tokens to encode, canvas to denoise): after a prompt, then after a canvas that is committed."""
    s = SHAPES[shape]
    for name, n in (("prompt", n_prompt), ("committed", s.canvas)):
        canvas = random_ids(seed, "adapted canvas" + name, s.canvas, s.vocab)
        yield name, random_ids(seed, "adapted" + name, n, s.vocab), canvas


def theirs(
    model: Any, shape: str, n_prompt: int, conditioning: Logits | None = None, seed: int = 1
) -> tuple[Logits, Logits, float]:
    """Logits of the reference, what it was conditioned on (its own logits unless given), and how far its
    routers' choices were from another one.
    """
    from reference.hf_model import Context, RouterGap

    context, logits, used, gap = Context.new(model), {}, {}, RouterGap(model)
    for name, ids, canvas in passes(shape, n_prompt, seed):
        context.encode(ids)
        logits[name] = context.denoise(canvas)
        used[name] = 2 * logits[name] if conditioning is None else conditioning[name]
        logits[name + ", conditioned"] = context.denoise(canvas, used[name])
    gap.close()
    return logits, used, gap.smallest


def ours(session: _native.Session, shape: str, n_prompt: int, conditioning: Logits, seed: int = 1) -> Logits:
    logits = {}
    for name, ids, canvas in passes(shape, n_prompt, seed):
        session.encode(ids)
        logits[name] = session.denoise(canvas, None)
        logits[name + ", conditioned"] = session.denoise(canvas, conditioning[name])
    return logits


def open_file(path: Path, kv_type: str = "f32", **options: Any) -> _native.Model:
    return _native.Model(str(path), n_threads=1, kv_type=kv_type, **options)


def native(model: _native.Model, folder: Path) -> _native.Adapter:
    """The folder as the package reads it."""
    adapter = load_adapter(folder, model.file.metadata)
    return _native.Adapter(model, adapter.name, adapter.scaled())


def session_with(model: _native.Model, adapters: Adapters, n_ctx: int = 160) -> _native.Session:
    session = _native.Session(model, n_ctx)
    session.set_adapters(list(adapters))
    return session


def assert_f32(found: Logits, wanted: Logits, slack: float = 1) -> None:
    for name, logits in found.items():
        difference = compare(logits, wanted[name])
        assert difference.mean <= slack * MEAN_BOUND, (name, difference)
        assert difference.max <= slack * MAX_BOUND, (name, difference)
        assert difference.agreement == 1.0, (name, difference)


def assert_same_bits(found: Logits, wanted: Logits) -> None:
    for name, logits in found.items():
        assert np.array_equal(logits, wanted[name]), (name, np.abs(logits - wanted[name]).max())


def check(
    model: _native.Model, reference: Any, adapters: Adapters, shape: str = "small", slack: float = 1
) -> None:
    """The adapted reference's logits, after prompts shorter and longer than the window."""
    for n_prompt in (7, 2 * SHAPES[shape].window + 6):
        wanted, conditioning, gap = theirs(reference, shape, n_prompt)
        assert gap > ROUTER_TIE, "rounding alone decides between experts here: take another seed"
        assert_f32(ours(session_with(model, adapters), shape, n_prompt, conditioning), wanted, slack)


@pytest.fixture(scope="module")
def every_target(fresh: Callable[..., Any], saved: Callable[..., Path]) -> Any:
    """The adapter of every target, applied by PEFT to "small"."""
    from support.peft_adapters import apply_adapters

    model = fresh()
    apply_adapters(model, [(saved("every target"), 1.0)])
    return model


@pytest.mark.parametrize("name", ["every target", pytest.param("patterns", marks=pytest.mark.slow)])
def test_the_map_of_names_is_right(name: str, fresh: Callable, saved: Callable) -> None:
    """What the other tests take PEFT's modules for, added to weights of their own, gives PEFT's logits."""
    from support.peft_adapters import apply_adapters, merged_apart, native_targets

    model = fresh()
    targets = list(native_targets(apply_adapters(model, [(saved(name), 1.0)])))
    wanted, conditioning, _ = theirs(model, "small", 38)
    merged, _, _ = theirs(merged_apart(fresh(), [(targets, 1.0)]), "small", 38, conditioning)
    assert_f32(merged, wanted)
    plain, _, _ = theirs(fresh(), "small", 38, conditioning)
    assert all(np.abs(plain[part] - wanted[part]).mean() > 1 for part in wanted)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name.startswith(("encoder", "decoder", "att")) else [])
        for name in ADAPTERS
        if name != "both alike"
    ],
)
def test_folders_are_read_as_peft_reads_them(
    name: str, fresh: Callable, saved: Callable, gguf_file: Callable
) -> None:
    from support.peft_adapters import apply_adapters, native_targets

    wanted = native_targets(apply_adapters(fresh(), [(saved(name), 1.0)]))
    adapter = load_adapter(saved(name), open_file(gguf_file("small", "f32")).file.metadata)
    found = {(tensor, side): (a, b) for tensor, side, a, b in adapter.scaled()}
    assert found
    for tensor, side, a, b in wanted:
        ours_a, ours_b = found.pop((tensor, side))
        assert np.array_equal(ours_a, a), tensor
        np.testing.assert_allclose(ours_b, b, rtol=1e-6, err_msg=tensor)
    assert not found


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("every target", "small"),
        ("another", "small"),
        pytest.param("every target", "wide", marks=pytest.mark.slow),
        pytest.param("another", "wide", marks=pytest.mark.slow),
    ],
)
def test_logits(name: str, shape: str, fresh: Callable, saved: Callable, gguf_file: Callable) -> None:
    from support.peft_adapters import apply_adapters

    reference, model = fresh(shape), open_file(gguf_file(shape, "f32"))
    apply_adapters(reference, [(saved(name, shape), 1.0)])
    check(model, reference, [(native(model, saved(name, shape)), 1.0)], shape)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["patterns", "encoder alone", "decoder alone", "attention alone"])
def test_other_adapters(name: str, fresh: Callable, saved: Callable, gguf_file: Callable) -> None:
    from support.peft_adapters import apply_adapters

    reference, model = fresh(), open_file(gguf_file("small", "f32"))
    apply_adapters(reference, [(saved(name), 1.0)])
    check(model, reference, [(native(model, saved(name)), 1.0)])


def test_one_set_for_both_modes(
    fresh: Callable, saved: Callable, gguf_file: Callable, tmp_path: Path
) -> None:
    from support.peft_adapters import apply_adapters, write_shared

    reference, model = fresh(), open_file(gguf_file("small", "f32"))
    apply_adapters(reference, [(saved("both alike"), 1.0)])
    folder = write_shared(saved("both alike"), tmp_path / "shared")
    sides = {target.side for target in load_adapter(folder, model.file.metadata).factors}
    assert "both" in sides and "encoder" not in sides
    check(model, reference, [(native(model, folder), 1.0)])


def test_gguf_files_give_the_same_bits(saved: Callable, gguf_file: Callable, tmp_path: Path) -> None:
    """Both modes and experts, written to a GGUF and read again."""
    model = open_file(gguf_file("small", "q8_0"), kv_type="auto")
    metadata, path = model.file.metadata, tmp_path / "adapter.gguf"
    write_adapter_gguf(load_adapter(saved("every target"), metadata), path, matrices_of(metadata))
    prompt, canvas = (random_ids(3, "gguf" + name, n, 512) for name, n in (("prompt", 20), ("canvas", 8)))
    logits = []
    for source in (saved("every target"), path):
        session = session_with(model, [(native(model, source), 1.0)])
        session.encode(prompt)
        logits.append(session.denoise(canvas, None))
    assert np.array_equal(*logits)


@pytest.mark.slow
def test_each_target_by_itself(every_target: Any, fresh: Callable, gguf_file: Callable) -> None:
    """Every kind of matrix in each mode: one that is left out, or applied in the other mode, shows."""
    from support.peft_adapters import merged_apart, native_targets

    model, by_kind = open_file(gguf_file("small", "f32")), {}
    for target in native_targets(every_target):
        by_kind.setdefault((target[0].rpartition(".")[2], target[1]), []).append(target)
    assert len(by_kind) == 23  # ten matrices of a layer in two modes, three of self-conditioning
    for kind, targets in by_kind.items():
        wanted, conditioning, gap = theirs(merged_apart(fresh(), [(targets, 1.0)]), "small", 38)
        assert gap > ROUTER_TIE
        session = session_with(model, [(_native.Adapter(model, "one", iter(targets)), 1.0)])
        found = ours(session, "small", 38, conditioning)
        for name, logits in found.items():
            difference = compare(logits, wanted[name])
            assert difference.mean <= MEAN_BOUND and difference.max <= MAX_BOUND, (kind, name, difference)


@pytest.mark.parametrize(
    "scales",
    [
        (0.5, -0.7),
        *(pytest.param(scales, marks=pytest.mark.slow) for scales in ((-1.5,), (1.0, 1.0), (0.0, 1.0))),
    ],
    ids=str,
)
def test_scales(scales: tuple[float, ...], fresh: Callable, saved: Callable, gguf_file: Callable) -> None:
    from support.peft_adapters import apply_adapters

    folders = [saved("every target"), saved("another")][: len(scales)]
    reference, model = fresh(), open_file(gguf_file("small", "f32"))
    apply_adapters(reference, list(zip(folders, scales, strict=True)))
    check(model, reference, [(native(model, f), scale) for f, scale in zip(folders, scales, strict=True)])


@pytest.mark.parametrize("type", ["f32", "q8_0", "q4_k_m"])
def test_off_is_never_loaded(type: str, every_target: Any, saved: Callable, gguf_file: Callable) -> None:
    model = open_file(gguf_file("small", type), kv_type="auto")
    _, conditioning, _ = theirs(every_target, "small", 38)
    plain = _native.Session(model, 160)
    wanted = ours(plain, "small", 38, conditioning)
    adapter = native(model, saved("every target"))
    session = session_with(model, [(adapter, 1.0)])
    adapted = ours(session, "small", 38, conditioning)
    assert all(np.abs(adapted[name] - wanted[name]).mean() > 1 for name in wanted)
    assert session.step_ops != plain.step_ops
    session.truncate(0)
    session.set_adapters([])
    assert_same_bits(ours(session, "small", 38, conditioning), wanted)
    assert session.step_ops == plain.step_ops
    assert_same_bits(ours(session_with(model, [(adapter, 0.0)]), "small", 38, conditioning), wanted)


@pytest.mark.parametrize("type", ["f32", "q8_0"])
def test_tokens_in_the_cache_are_encoded_anew(type: str, saved: Callable, gguf_file: Callable) -> None:
    """A session whose adapters change between two steps has the bits of one that had them from the start."""
    s = SHAPES["small"]
    model = open_file(gguf_file("small", type), kv_type="auto")
    first, second = ([(native(model, saved(name)), 1.0)] for name in ("every target", "another"))
    prompt, canvas = random_ids(2, "anew", 38, s.vocab), random_ids(2, "anewcanvas", s.canvas, s.vocab)
    session = _native.Session(model, 160)
    session.encode(prompt)
    for adapters in (first, second, [*first, *second], []):
        session.set_adapters(adapters)
        other = session_with(model, adapters)
        other.encode(prompt)
        assert np.array_equal(session.denoise(canvas, None), other.denoise(canvas, None))
    assert session.n_encoded == 5 * len(prompt)
    session.set_adapters([])
    session.denoise(canvas, None)
    assert session.n_encoded == 5 * len(prompt)


_TYPES = ("bf16", "q8_0", "q4_k_m")
#: Of prompts and canvases. Rounding turns an expert of some, in ours or in the reference, which then differ
#: ten times as much: of several, the median doesn't show it.
SEEDS = (1, 2, 3)
#: Type, device and kernels of a base.
BASES = [
    pytest.param("q4_k_m", "cpu", "ggml", id="q4_k_m"),
    *(pytest.param(t, "cpu", "ggml", id=t, marks=pytest.mark.slow) for t in ("bf16", "f16", "q8_0")),
    *(
        pytest.param(t, "cpu", *own.values, id=f"{t}-{own.values[0]}", marks=[*own.marks, pytest.mark.slow])
        for own in OWN_KERNELS
        for t in _TYPES
    ),
    *(pytest.param(t, "host", "cuda", id=f"{t}-device", marks=pytest.mark.slow) for t in _TYPES),
]


def test_images_in_the_cache_are_encoded_anew(saved: Callable, gguf_file: Callable) -> None:
    s = SHAPES["small"]
    model = open_file(gguf_file("small", "f32"))
    ids, canvas = random_ids(4, "image", 40, s.vocab), random_ids(4, "imagecanvas", s.canvas, s.vocab)
    ids[5:11] = model.image_tokens["image"]
    features = np.random.default_rng(0).standard_normal((6, s.d), np.float32)
    adapters = [(native(model, saved("every target")), 1.0)]
    logits = []
    for session in (_native.Session(model, 160, 6), session_with(model, adapters)):
        session.encode(ids, [(5, features, b"key")])
        session.set_adapters(adapters)
        logits.append(session.denoise(canvas, None))
        assert session.images == [(5, 6, b"key")]
    assert np.array_equal(*logits)


@pytest.mark.parametrize(("type", "device", "kernels"), BASES)
def test_other_types(
    type: str, device: str, kernels: str, fresh: Callable, saved: Callable, gguf_file: Callable,
    report: Callable,
) -> None:  # fmt: skip
    """Quantized bases: nothing is quantized again. What is left is the rounding of activations, and of A and
    B to BF16.

    Feed-forward rows of "small" are no multiple of 256, so Q4_K_M pads them.
    """
    from reference.dequantized import read_dequantized
    from reference.hf_model import rounded_activations, set_weights
    from support.peft_adapters import apply_adapters, rounded_factors

    path = gguf_file("small", type)
    reference, model = fresh(), open_file(path, device=device, kernels=kernels)
    set_weights(reference, read_dequantized(path))
    apply_adapters(reference, [(saved("every target"), 1.0)])
    adapter = native(model, saved("every target"))
    # Beside F16 weights, those of adapters are BF16, and so is what they multiply. Kernels of our own round
    # to BF16 too, the weights as well, which together costs no more than blocks of 8 bits.
    rounding = "bf16" if type == "f16" else type
    differences: dict[str, list[tuple[float, float]]] = {}
    for n_prompt, seed in itertools.product((7, 38), SEEDS):
        wanted, conditioning, _ = theirs(reference, "small", n_prompt, None, seed)
        with rounded_factors(reference), rounded_activations(reference, rounding):
            rounded, _, _ = theirs(reference, "small", n_prompt, conditioning, seed)
        found = ours(session_with(model, [(adapter, 1.0)]), "small", n_prompt, conditioning, seed)
        for name, logits in found.items():
            pair = middle(logits, wanted[name]), middle(rounded[name], wanted[name])
            differences.setdefault(name, []).append(pair)
    ratios = {}
    for name, pairs in differences.items():
        typical, allowed = np.median(pairs, axis=0)
        ratios[name] = typical / allowed
        assert typical <= ROUNDING_FACTOR * allowed, (name, pairs)
    middle_ratio = np.median([*ratios.values()])
    report(
        f"adapters: {type}, {device}, {kernels}: middle position {middle_ratio:.2f} (at most "
        f"{max(ratios.values()):.2f}) times what rounding alone does to transformers with PEFT"
    )


def middle(a: np.ndarray, b: np.ndarray) -> float:
    """Median over canvas positions of the mean difference: blind to the few where an expert turned."""
    return float(np.median(np.abs(a - b).mean(axis=1)))


def test_separate_experts(every_target: Any, saved: Callable, gguf_file: Callable, tmp_path: Path) -> None:
    """A file with gate and up of the experts apart; PEFT's adapters have them together."""
    file = read_gguf(gguf_file("small", "f32"))
    split_experts(file)
    model = open_file(file.write(tmp_path / "separate.gguf"))
    check(model, every_target, [(native(model, saved("every target")), 1.0)])


#: Device, kernels and other arguments of a model.
PLACES = [
    *(pytest.param("cpu", *own.values, {}, marks=own.marks, id=own.values[0]) for own in OWN_KERNELS),
    pytest.param("host", "ggml", {}, id="host-ggml"),
    pytest.param("host", "cuda", {}, id="host-own-kernels"),
    pytest.param("host", "ggml", {"n_gpu_layers": 2, "n_cpu_moe": 1}, id="experts-on-the-cpu"),
]


@pytest.mark.parametrize(("device", "kernels", "options"), PLACES)
def test_devices(
    device: str, kernels: str, options: dict, every_target: Any, saved: Callable, gguf_file: Callable
) -> None:
    """With ten times the bounds: the host's GELU is a table of float16."""
    model = open_file(gguf_file("small", "f32"), device=device, kernels=kernels, **options)
    check(model, every_target, [(native(model, saved("every target")), 1.0)], slack=10)


@pytest.mark.parametrize("type", ["f32", "q8_0"])
def test_a_batch_equals_each_alone(type: str, saved: Callable, gguf_file: Callable) -> None:
    """Four sessions with four lists of adapters in one graph, to the bit."""
    from pydiffusion._util.sampler_options import ENTROPY_BOUND_DEFAULTS

    s = SHAPES["small"]
    model = open_file(gguf_file("small", type), kv_type="auto")
    one, two = (native(model, saved(name)) for name in ("every target", "another"))
    lists: list[Adapters] = [[], [(one, 1.0)], [(two, 0.5)], [(one, -0.5), (two, 1.0)]]

    def sessions() -> list[_native.Session]:
        made = []
        for i, adapters in enumerate(lists):
            session = session_with(model, adapters)
            session.encode(random_ids(i, "batch", 9 + 7 * i, s.vocab))
            session.begin(max_tokens=3 * s.canvas, seed=i, eos=[], **{**ENTROPY_BOUND_DEFAULTS, "steps": 6})
            made.append(session)
        return made

    alone = []
    for session in sessions():
        steps = []
        while (step := session.next_step()) is not None:
            steps.append(step)
        alone.append(steps)
    assert len({tuple(steps[-1].tokens.tolist()) for steps in alone}) == len(lists)
    batch, together, together_steps = _native.Batch(model), sessions(), [[] for _ in lists]
    for _ in range(max(len(steps) for steps in alone)):
        for found, step in zip(together_steps, batch.next_steps(together), strict=True):
            if step is not None:
                assert isinstance(step, _native.Step), step
                found.append(step)
        assert batch.n_graphs == 1
    for found, wanted in zip(together_steps, alone, strict=True):
        assert len(found) == len(wanted)
        for ours_, theirs_ in zip(found, wanted, strict=True):
            assert np.array_equal(ours_.draft, theirs_.draft)
            assert np.array_equal(ours_.entropy, theirs_.entropy)
            assert np.array_equal(ours_.tokens, theirs_.tokens)
