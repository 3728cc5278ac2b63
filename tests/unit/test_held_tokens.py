"""Held tokens and given canvases: held tokens stay, and the sampler's loop step by step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pydiffusion import DiffusionModel, DraftEvent, EndEvent, GenerationOptions, sampling


@pytest.fixture(scope="module")
def model(gguf_file: Callable[..., Path]) -> DiffusionModel:
    return DiffusionModel(gguf_file("small"), n_threads=1, n_ctx=256)


def drafts(model: DiffusionModel, **options: object) -> list[DraftEvent]:
    session = model.new_session()
    session.encode([2, 7, 8, 9])
    events = session.generate(GenerationOptions(eos=(), seed=3, **options))
    return [event for event in events if isinstance(event, DraftEvent)]


def test_held_positions_keep_their_tokens_at_every_step_and_canvas(model: DiffusionModel) -> None:
    n = model.canvas_length
    canvas, hold = [-1] * (2 * n), [False] * (2 * n)
    for position, token in ((0, 11), (3, 5), (n - 1, 40), (n, 13), (n + 2, 14)):
        canvas[position], hold[position] = token, True
    seen = drafts(model, canvas=canvas, hold=hold, max_tokens=2 * n, steps=4, confidence_threshold=0)
    assert [event.canvas_index for event in seen] == [0] * 4 + [1] * 4
    for event in seen:
        first = event.canvas_index * n
        for position in range(n):
            if hold[first + position]:
                assert event.tokens[position] == canvas[first + position]
                assert event.entropy[position] == 0 and event.accepted[position]
    changed = {tuple(event.tokens) for event in seen}
    assert len(changed) > 1, "free positions change"


def test_the_denoising_loop_with_held_tokens_step_by_step(model: DiffusionModel) -> None:
    """By single calls of `denoise`: held positions are fed again, with certain logits and no entropy."""
    n, steps, bound, seed = model.canvas_length, 6, 0.5, 3
    given = np.full(n, -1, np.int32)
    given[[1, 2, 6]] = (9, 17, 33)
    held = given >= 0
    options = {"steps": steps, "entropy_bound": bound, "confidence_threshold": 0.0, "max_tokens": n}
    seen = drafts(model, canvas=given.tolist(), hold=held.tolist(), **options)
    assert len(seen) == steps

    session = model.new_session()
    session.encode([2, 7, 8, 9])
    canvas = np.where(held, given, sampling.draws(seed, 0, 0, n, model.n_vocab)[1]).astype(np.int32)
    conditioning = None
    for event in seen:
        temperature = sampling.temperature(event.step, steps, 0.4, 0.8)
        u, noise = sampling.draws(seed, 0, event.step, n, model.n_vocab)
        logits = session.denoise(canvas, conditioning)
        argmax, entropy, sampled = sampling.measure(logits, temperature, u)
        accepted = held.copy()
        accepted[~held] = sampling.accept(entropy[~held], bound)
        assert np.array_equal(event.tokens, np.where(held, given, argmax))
        np.testing.assert_allclose(event.entropy, np.where(held, 0, entropy), atol=1e-4)
        assert np.array_equal(event.accepted, accepted)
        canvas = np.where(held, given, np.where(accepted, sampled, noise)).astype(np.int32)
        logits[held] = -np.inf
        logits[held, given[held]] = 30.0
        conditioning = logits / temperature


def test_a_given_canvas_is_where_denoising_begins(model: DiffusionModel) -> None:
    given = np.arange(model.canvas_length) % model.n_vocab
    session = model.new_session()
    session.encode([2, 7, 8, 9])
    logits = session.denoise(given)
    (draft,) = drafts(model, canvas=given.tolist(), steps=1, t_min=0.8, t_max=0.8, max_tokens=1)
    assert np.array_equal(draft.tokens, logits.argmax(axis=1))


def test_nothing_held_changes_nothing(model: DiffusionModel) -> None:
    plain = drafts(model, steps=6)
    held_nowhere = drafts(model, steps=6, canvas=[-1, -1], hold=[False, False])
    assert len(plain) == len(held_nowhere)
    for a, b in zip(plain, held_nowhere, strict=True):
        assert np.array_equal(a.tokens, b.tokens) and np.array_equal(a.entropy, b.entropy)


def test_a_canvas_held_whole_is_done_after_two_equal_drafts(model: DiffusionModel) -> None:
    whole = [5] * model.canvas_length
    session = model.new_session()
    session.encode([2])
    events = list(session.generate(canvas=whole, hold=[True] * len(whole), steps=9, eos=(), max_tokens=4))
    assert len([event for event in events if isinstance(event, DraftEvent)]) == 2
    assert isinstance(events[-1], EndEvent) and events[-2].tokens.tolist() == [5] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hold": [True]}, "hold has 1 position"),
        ({"canvas": [1], "hold": [True, False]}, "hold has 2 position"),
        ({"canvas": [-1], "hold": [True]}, "position 0"),
        ({"canvas": [10**6]}, "canvas holds 1000000"),
        ({"canvas": [-2]}, "canvas is -2"),
        ({"canvas": "text"}, "canvas"),
    ],
)
def test_invalid_canvases_are_refused(
    model: DiffusionModel, options: dict[str, object], message: str
) -> None:
    session = model.new_session()
    session.encode([2])
    with pytest.raises(ValueError, match=message):
        list(session.generate(**options))
