"""A second architecture, natively, against its page of numpy (tests/support/toy/reference.py).

Its native side is compiled only with CMake's PYDIFFUSION_TESTING. PYDIFFUSION_REQUIRE_TOY=1 fails without it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from support.models import compare
from support.parity import MAX_BOUND, MEAN_BOUND, assert_within
from support.toy.checkpoint import MASK, SHAPES, registered, write_checkpoint
from support.toy.reference import Cache, Generation, Toy

from pydiffusion import DiffusionModel, _native
from pydiffusion.convert import convert, fit
from pydiffusion.errors import ConversionError, ModelFormatError
from pydiffusion.events import CanvasEvent, DraftEvent, EndEvent

N_CANVAS, N_VOCAB = 16, 384
#: Prompts shorter than a canvas, and longer than the chunk of 512 tokens that the runtime encodes at once.
PROMPTS = {"short": 9, "long": 700}
#: Of each shape, a checkpoint whose generations don't hang on rounding.
SEEDS = {"equal heads": 3, "grouped heads": 26, "one KV head": 21}
#: Steps per canvas: several positions a step, and more steps than there are positions.
STEPS = (5, 24)


@dataclass(frozen=True)
class Pair:
    """A checkpoint in numpy, and its F32 file."""

    shape: str
    folder: Path
    path: Path
    toy: Toy


@pytest.fixture(scope="module", params=SHAPES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("toy")
    write_checkpoint(folder / "toy", seed=SEEDS[request.param], **SHAPES[request.param])
    with registered():
        convert(folder / "toy", folder / "toy.gguf", "f32")
    return Pair(request.param, folder / "toy", folder / "toy.gguf", Toy(folder / "toy"))


@pytest.fixture(scope="module")
def model(pair: Pair) -> DiffusionModel:
    if not getattr(_native.testing, "toy_architecture", False):
        reason = "this extension was built without PYDIFFUSION_TESTING"
        if os.environ.get("PYDIFFUSION_REQUIRE_TOY") == "1":
            pytest.fail(f"PYDIFFUSION_REQUIRE_TOY is set, but {reason}")
        pytest.skip(f"NOT CHECKED: a second architecture in the runtime; {reason}")
    opened = DiffusionModel(pair.path, n_ctx=1024, n_threads=2, device="cpu")
    assert opened.metadata["general.architecture"] == "masked-toy"
    assert (opened.canvas_length, opened.n_vocab) == (N_CANVAS, N_VOCAB)
    description = opened.description
    assert (description["backend"], description["kv_type"]) == ("CPU", "f32"), description
    assert set(description["weight_types"]) == {"F32"}, description
    return opened


def random_ids(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, N_VOCAB, n).astype(np.int32)


def passes(
    encode: Callable[[np.ndarray], np.ndarray],
    denoise: Callable[[np.ndarray, np.ndarray | None], np.ndarray],
    n_prompt: int,
) -> dict[str, np.ndarray]:
    """Hidden states and logits after a prompt, and after a canvas that is committed to it."""
    masked = np.full(N_CANVAS, MASK, np.int32)
    half = np.where(np.arange(N_CANVAS) % 2, random_ids(7, N_CANVAS), MASK).astype(np.int32)
    conditioning = np.random.default_rng(8).normal(0, 4, (N_CANVAS, N_VOCAB)).astype(np.float32)
    found = {"hidden": encode(random_ids(6, n_prompt))}
    found["logits"] = denoise(masked, None)
    found["logits, conditioned"] = denoise(half, conditioning)
    found["hidden, committed"] = encode(random_ids(9, N_CANVAS))
    found["logits, committed"] = denoise(masked, None)
    found["logits, committed, conditioned"] = denoise(half, conditioning)
    return found


def numpy_passes(toy: Toy, n_prompt: int) -> dict[str, np.ndarray]:
    cache: list[Cache] = [toy.empty_cache()]

    def encode(ids: np.ndarray) -> np.ndarray:
        cache[0], hidden = toy.encode(ids, cache[0])
        return hidden

    return passes(encode, lambda canvas, before: toy.denoise(cache[0], canvas, before), n_prompt)


def assert_equals_numpy(model: DiffusionModel, pair: Pair, prompt: str, report: Callable, how: str) -> None:
    session = model.new_session()

    def encode(ids: np.ndarray) -> np.ndarray:
        hidden = session.encode(ids, return_hidden=True)
        assert hidden is not None
        return hidden

    ours = passes(encode, session.denoise, PROMPTS[prompt])
    wanted = numpy_passes(pair.toy, PROMPTS[prompt])
    assert list(ours) == list(wanted)
    for name, values in ours.items():
        difference = compare(values, wanted[name])
        report(f"toy: {pair.shape}, {how}, {prompt} prompt, {name}: {difference}")
        assert_within(difference, MEAN_BOUND, MAX_BOUND)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_hidden_states_and_logits(model: DiffusionModel, pair: Pair, prompt: str, report: Callable) -> None:
    assert_equals_numpy(model, pair, prompt, report, "CPU")


def test_next_token_logits(model: DiffusionModel, pair: Pair) -> None:
    """The head is not the embedding here. Of a prompt in two chunks, the last token of the second counts."""
    ids = random_ids(6, PROMPTS["long"])
    toy, cap = pair.toy, pair.toy.config["final_logit_softcapping"]
    _, hidden = toy.encode(ids)
    wanted = cap * np.tanh(toy.linear(hidden[-1:], "lm_head") / cap)
    logits = model.new_session().native.next_logits(ids)
    assert_within(compare(logits[None], wanted.astype(np.float32)), MEAN_BOUND, MAX_BOUND)


@pytest.mark.parametrize("kernels", ["ggml", "cuda"])
def test_on_a_device(model: DiffusionModel, pair: Pair, kernels: str, report: Callable) -> None:
    """The graphs of devices, from ggml's operations and with the nodes of our own kernels."""
    on_host = DiffusionModel(pair.path, n_ctx=1024, n_threads=2, device="host", kernels=kernels)
    assert on_host.description["backend"] == "host"
    assert on_host.description["kernels"] == kernels
    assert_equals_numpy(on_host, pair, "long", report, f"host, {kernels}")


def test_a_mask_token_outside_the_vocabulary_is_refused(
    model: DiffusionModel, pair: Pair, tmp_path: Path
) -> None:
    data = pair.path.read_bytes()
    key = b"diffusion.mask_token_id" + (4).to_bytes(4, "little")  # and the type, uint32
    at = data.index(key) + len(key)
    assert data[at : at + 4] == MASK.to_bytes(4, "little")
    (tmp_path / "toy.gguf").write_bytes(data[:at] + N_VOCAB.to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(ModelFormatError, match=r"mask_token_id.*384"):
        DiffusionModel(tmp_path / "toy.gguf", n_ctx=64, device="cpu")


def test_the_best_type_that_fits(model: DiffusionModel, pair: Pair) -> None:
    """The planner of memory knows the architecture from a header."""
    with registered():
        plan, memory = fit(pair.folder, 1 << 40, n_ctx=512)
        assert plan.type == "bf16" and memory.cache > 0
        with pytest.raises(ConversionError, match="nothing fits"):
            fit(pair.folder, 1 << 20, n_ctx=512)


def numpy_run(toy: Toy, steps: int) -> Generation:
    return toy.generate(random_ids(10, PROMPTS["short"]), steps=steps, n_canvases=3)


@pytest.mark.parametrize("steps", STEPS)
def test_a_generation_step_by_step(model: DiffusionModel, pair: Pair, steps: int) -> None:
    wanted = numpy_run(pair.toy, steps)
    session = model.new_session()
    session.encode(random_ids(10, PROMPTS["short"]))
    # No mass is dropped: self-conditioning as in the reference.
    events = list(session.generate(max_tokens=3 * N_CANVAS, steps=steps, eos=(), seed=0, dropped_mass=0))
    drafts = [event for event in events if isinstance(event, DraftEvent)]
    assert [(event.canvas_index, event.step) for event in drafts] == [
        (step.i_canvas, step.steps_left) for step in wanted.steps
    ]
    settled, canvas = np.zeros(N_CANVAS, bool), np.full(N_CANVAS, MASK)
    for event, step in zip(drafts, wanted.steps, strict=True):
        where = f"canvas {step.i_canvas}, {step.steps_left} steps left"
        if event.step == steps:  # a new canvas
            settled, canvas = np.zeros(N_CANVAS, bool), np.full(N_CANVAS, MASK)
        assert np.array_equal(event.tokens, np.where(settled, canvas, step.logits.argmax(axis=-1))), where
        np.testing.assert_allclose(event.entropy[~settled], step.entropy[~settled], atol=1e-3, err_msg=where)
        settled = settled | event.accepted
        canvas = np.where(settled, event.tokens, MASK)
        assert np.array_equal(settled, step.settled), where
        assert np.array_equal(canvas, step.canvas), where
    tokens = np.concatenate([event.tokens for event in events if isinstance(event, CanvasEvent)])
    assert tokens.tolist() == wanted.tokens
    assert isinstance(events[-1], EndEvent) and events[-1].reason == "length"


@pytest.mark.parametrize("steps", STEPS)
def test_what_is_compared_does_not_hang_on_rounding(pair: Pair, steps: int) -> None:
    """Of the reference alone: in float64 it decides everything alike, and nothing by a hair's breadth."""
    run, exact = numpy_run(pair.toy, steps), numpy_run(Toy(pair.folder, np.float64), steps)
    assert [step.canvas.tolist() for step in run.steps] == [step.canvas.tolist() for step in exact.steps]
    assert len(run.tokens) == 3 * N_CANVAS and len(set(run.tokens)) > 5
    settled = np.zeros(N_CANVAS, bool)
    for step, other in zip(run.steps, exact.steps, strict=True):
        if step.steps_left == steps:  # a new canvas
            settled = np.zeros(N_CANVAS, bool)
        assert np.abs(step.logits - other.logits).max() < 3e-4
        best = np.sort(step.logits[~settled], axis=-1)
        assert (best[:, -1] - best[:, -2]).min() > 1e-3
        taken, left = step.entropy[~settled & step.settled], step.entropy[~step.settled]
        assert len(taken) and min([*left, np.inf]) - taken.max() > 1e-3
        settled = step.settled


@pytest.mark.parametrize("prompt", PROMPTS)
def test_no_argmax_hangs_on_rounding(pair: Pair, prompt: str) -> None:
    """Of the reference alone, for the passes that are compared."""
    for name, values in numpy_passes(pair.toy, PROMPTS[prompt]).items():
        best = np.sort(values, axis=-1)
        assert (best[:, -1] - best[:, -2]).min() > (5e-5 if "hidden" in name else 1e-3), name
