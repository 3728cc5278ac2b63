"""Canvases shorter than the model's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from reference.random_checkpoint import SHAPES, random_ids

from pydiffusion import DiffusionModel, DraftEvent, GenerationOptions, sampling

SHORT = 3


@pytest.fixture(scope="module")
def model(gguf_file: Callable[..., Path]) -> DiffusionModel:
    return DiffusionModel(gguf_file("small"), n_threads=1, n_ctx=256)


def test_a_short_canvas_is_what_is_generated_and_committed(model: DiffusionModel) -> None:
    session = model.new_session()
    session.encode([2, 7, 8, 9])
    options = GenerationOptions(canvas_length=SHORT, max_tokens=2 * SHORT + 1, steps=2, seed=1, eos=())
    drafts = [event for event in session.generate(options) if isinstance(event, DraftEvent)]
    assert {len(event.tokens) for event in drafts} == {len(event.entropy) for event in drafts} == {SHORT}
    assert {event.canvas_index for event in drafts} == {0, 1, 2}
    assert session.n_past == 4 + 2 * SHORT


def test_the_model_s_own_length_changes_nothing(model: DiffusionModel) -> None:
    options = {"max_tokens": 20, "steps": 4, "seed": 1, "eos": ()}
    one = model.generate("a prompt", **options)
    assert one.tokens.tolist() == model.generate(
        "a prompt", canvas_length=model.canvas_length, **options
    ).tokens.tolist()  # fmt: skip


def test_lengths_may_differ_within_a_batch(model: DiffusionModel) -> None:
    lengths = [SHORT, model.canvas_length, 1]
    each = [GenerationOptions(canvas_length=n, max_tokens=9, steps=3, seed=n, eos=()) for n in lengths]
    prompts = [[2, 5, 6], [2, 9], [2, 7, 7, 7, 7]]
    done = dict(model.generate_batch(prompts, each, n_parallel=3))
    for index, (prompt, options) in enumerate(zip(prompts, each, strict=True)):
        assert done[index].tokens.tolist() == model.generate(prompt, options).tokens.tolist()


def test_a_canvas_longer_than_the_model_s_is_refused(model: DiffusionModel) -> None:
    with pytest.raises(ValueError, match=f"this model allows 1 to {model.canvas_length}"):
        model.generate("a", canvas_length=model.canvas_length + 1)
    with pytest.raises(ValueError, match="canvas_length"):
        GenerationOptions(canvas_length=0)


@pytest.mark.reference
def test_the_first_step_is_transformers(
    model: DiffusionModel, checkpoint_folder: Callable[..., Path]
) -> None:
    from reference.hf_model import Context, load_reference

    shape = SHAPES["small"]
    prompt = random_ids(1, "short canvas", 40, shape.vocab)
    context = Context.new(load_reference(checkpoint_folder("small")))
    context.encode(prompt)
    canvas = sampling.draws(5, 0, 0, SHORT, shape.vocab)[1]
    expected = context.denoise(canvas.astype(np.int32))
    assert expected.shape == (SHORT, shape.vocab)
    session = model.new_session()
    session.encode(prompt)
    draft = next(session.generate(canvas_length=SHORT, steps=2, seed=5, eos=()))
    assert draft.tokens.tolist() == expected.argmax(-1).tolist()
    scaled = expected.astype(np.float64) / 0.8
    log_p = scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))
    assert np.allclose(draft.entropy, -(np.exp(log_p) * log_p).sum(-1), atol=1e-3)
