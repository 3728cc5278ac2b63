"""`trim_after_eos`: positions after a settled eos are no longer denoised."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest

from pydiffusion import DiffusionModel, DraftEvent, GenerationOptions
from pydiffusion.convert import convert
from pydiffusion.demo import checkpoint_path, tasks

ROOM = 8  # positions kept after the eos


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    path = tmp_path_factory.mktemp("demo") / "demo-q8_0.gguf"
    convert(checkpoint_path(), path, type="q8_0")
    return DiffusionModel(path, n_ctx=512)


def prompts(model: DiffusionModel, task: str, n: int) -> list[tuple[str, list[int]]]:
    rng = random.Random(7)
    messages = [tasks.generate(task, rng, held_out=True).prompt for _ in range(n)]
    return [(message, model.chat_prompt([{"role": "user", "content": message}])) for message in messages]


def test_drafts_shrink_to_the_eos_and_answers_stay_right(model: DiffusionModel) -> None:
    eos = set(GenerationOptions().resolve(model.metadata, model.n_vocab).eos)
    n_right, n_trimmed = 0, 0
    for seed, (message, prompt) in enumerate(prompts(model, "sort", 12)):
        drafts: list[DraftEvent] = []
        done = model.generate(
            prompt,
            GenerationOptions(max_tokens=48, seed=seed, trim_after_eos=True),
            on_event=lambda event, drafts=drafts: (
                drafts.append(event) if isinstance(event, DraftEvent) else None
            ),
        )
        lengths = [len(draft.tokens) for draft in drafts]
        assert lengths == sorted(lengths, reverse=True) and lengths[0] == model.canvas_length
        assert all(len(d.tokens) == len(d.entropy) == len(d.accepted) for d in drafts)
        for before, after in pairwise(drafts):
            if len(after.tokens) < len(before.tokens):  # where the step before had its first eos, accepted
                end = len(after.tokens) - ROOM - 1
                assert int(before.tokens[end]) in eos and before.accepted[end]
                assert not eos & set(np.asarray(before.tokens[:end]).tolist())
                n_trimmed += 1
        n_right += tasks.check("sort", message, done.text)
    assert n_trimmed >= 3 and n_right >= 10


def test_trimming_is_off_by_default(model: DiffusionModel) -> None:
    for seed, (_, prompt) in enumerate(prompts(model, "sort", 3)):
        lengths = set()
        model.generate(
            prompt,
            GenerationOptions(max_tokens=48, seed=seed),
            on_event=lambda event, lengths=lengths: (
                lengths.add(len(event.tokens)) if isinstance(event, DraftEvent) else None
            ),
        )
        assert lengths == {model.canvas_length}


def test_held_positions_after_the_eos_prevent_trimming(model: DiffusionModel) -> None:
    _, prompt = prompts(model, "sort", 1)[0]
    n = model.canvas_length
    options = GenerationOptions(
        max_tokens=n,
        seed=1,
        trim_after_eos=True,
        canvas=[-1] * (n - 1) + [9],
        hold=[False] * (n - 1) + [True],
    )
    session = model.new_session()
    session.encode(prompt)
    lengths = {len(event.tokens) for event in session.generate(options) if isinstance(event, DraftEvent)}
    assert lengths == {n}


def test_a_batch_trims_each_as_alone(model: DiffusionModel) -> None:
    options = GenerationOptions(max_tokens=48, seed=3, trim_after_eos=True)
    chosen = [prompt for _, prompt in prompts(model, "sort", 4)]
    alone = [model.generate(prompt, options).tokens.tolist() for prompt in chosen]
    done = dict(model.generate_batch(chosen, options, n_parallel=3))
    assert [done[i].tokens.tolist() for i in range(4)] == alone
