"""A sampler that keeps its tokens (the toy architecture's) with held tokens, guided steps and trimming.

Compiled only with CMake's PYDIFFUSION_TESTING. PYDIFFUSION_REQUIRE_TOY=1 fails without it.
"""

from __future__ import annotations

import os
from itertools import pairwise

import numpy as np
import pytest
from support.toy.checkpoint import MASK, registered, write_checkpoint

from pydiffusion import DiffusionModel, DraftEvent, EndEvent, Event, _native
from pydiffusion.convert import convert

N_CANVAS = 16
TRIM_SLACK = 8  # positions that stay after the eos


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    if not getattr(_native.testing, "toy_architecture", False):
        reason = "this extension was built without PYDIFFUSION_TESTING"
        if os.environ.get("PYDIFFUSION_REQUIRE_TOY") == "1":
            pytest.fail(f"PYDIFFUSION_REQUIRE_TOY is set, but {reason}")
        pytest.skip(f"NOT CHECKED: a sampler that keeps its tokens; {reason}")
    folder = tmp_path_factory.mktemp("toy")
    write_checkpoint(folder / "toy", seed=3)
    with registered():
        convert(folder / "toy", folder / "toy.gguf", "f32")
    return DiffusionModel(folder / "toy.gguf", n_ctx=512, n_threads=1)


def native_session(model: DiffusionModel, **options: object) -> _native.Session:
    session = model.new_session().native
    session.encode(np.arange(1, 10, dtype=np.int32))
    options = {"max_tokens": N_CANVAS, "seed": 0, "eos": [], "steps": 8, **options}
    session.begin(**options)
    return session


def events(model: DiffusionModel, **options: object) -> list[Event]:
    session = model.new_session()
    session.encode(np.arange(1, 10))
    return list(session.generate(**{"max_tokens": N_CANVAS, "eos": (), "seed": 0, **options}))


@pytest.mark.parametrize("held", [True, False])
def test_given_tokens_stay_and_are_not_counted(model: DiffusionModel, held: bool) -> None:
    given = {0: 11, 3: 0, 15: 40}
    canvas = np.full(N_CANVAS, -1, np.int32)
    canvas[list(given)] = list(given.values())
    session = native_session(model, canvas=canvas, hold=(canvas >= 0).astype(np.uint8) * held, steps=5)
    known = dict(given)
    n_masked = N_CANVAS - len(given)
    for steps_left in range(5, 0, -1):
        step = session.next_step()
        assert step is not None and step.step == steps_left
        for position, token in known.items():
            assert step.accepted[position] and step.entropy[position] == 0
            assert step.draft[position] == step.canvas[position] == token
        n_new = -(-n_masked // steps_left)
        n_masked -= n_new
        assert step.accepted.sum() == len(known) + n_new
        assert (step.canvas[~step.accepted] == MASK).all()
        known |= {int(i): int(step.draft[i]) for i in np.flatnonzero(step.accepted)}
    assert step.canvas_done and step.tokens.tolist() == [known[i] for i in range(N_CANVAS)]


def test_guided_steps_keep_what_the_guide_chose(model: DiffusionModel) -> None:
    """The guide chooses the second likeliest token; a settled position leaves it no choice."""
    session = native_session(model, guided=True)
    settled: dict[int, int] = {}
    while (half := session.next_step()) is not None:
        tokens, logits, _ = session.candidates(2, np.zeros(0, np.int32))
        chosen = tokens[:, 1].copy()
        for position, token in settled.items():
            assert tokens[position, 0] == token and logits[position, 1] == -np.inf
            assert half.entropy[position] == 0 and half.accepted[position]
            chosen[position] = tokens[position, 0]
        step = session.impose(chosen)
        assert np.array_equal(step.draft, chosen)
        assert np.array_equal(step.canvas, np.where(step.accepted, chosen, MASK))
        assert set(settled) < set(np.flatnonzero(step.accepted).tolist())
        settled |= {int(i): int(chosen[i]) for i in np.flatnonzero(step.accepted)}
    assert len(settled) == N_CANVAS and step.canvas_done


def test_an_imposed_token_can_not_replace_a_settled_one(model: DiffusionModel) -> None:
    session = native_session(model, guided=True)
    assert session.next_step() is not None
    first = session.impose(np.full(N_CANVAS, 7, np.int32))
    assert session.next_step() is not None
    second = session.impose(np.full(N_CANVAS, 8, np.int32))
    assert (second.draft[first.accepted] == 7).all() and (second.canvas[first.accepted] == 7).all()
    assert (second.draft[~first.accepted] == 8).all()


def test_positions_after_a_settled_eos_are_trimmed(model: DiffusionModel) -> None:
    plain = [event for event in events(model, steps=N_CANVAS) if isinstance(event, DraftEvent)]
    final = plain[-1].tokens.tolist()
    settled_at = [int(np.argmax([draft.accepted[i] for draft in plain])) for i in range(N_CANVAS)]
    # The first to settle of those that leave something to trim, with a token that no position before has.
    firsts = [i for i in range(N_CANVAS - TRIM_SLACK - 1) if final.index(final[i]) == i]
    eos = final[min(firsts, key=lambda i: settled_at[i])]
    seen = events(model, steps=N_CANVAS, eos=(eos,), trim_after_eos=True)
    drafts = [event for event in seen if isinstance(event, DraftEvent)]
    lengths = [len(draft.tokens) for draft in drafts]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] == N_CANVAS > lengths[-1]
    for before, after in pairwise(drafts):
        n = len(after.tokens)
        kept = before.accepted[:n]
        assert after.accepted[:n][kept].all()
        assert np.array_equal(after.tokens[kept], before.tokens[:n][kept])
        if n < len(before.tokens):
            assert before.tokens[n - TRIM_SLACK - 1] == eos and before.accepted[n - TRIM_SLACK - 1]
    assert drafts[-1].accepted.all()
    assert isinstance(seen[-1], EndEvent) and seen[-1].reason == "eos"
