"""Batched prompts in one graph give the same answers as one after the other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pydiffusion import (
    Completion,
    ContextOverflowError,
    DiffusionModel,
    EndEvent,
    GenerationOptions,
)
from pydiffusion._util.sampler_options import ENTROPY_BOUND_DEFAULTS

PROMPTS = ["one", "two and three", "four " * 20, "five", "six, seven, eight"]


@pytest.fixture(scope="module", params=["f32", "q4_k_m"])
def model(request: pytest.FixtureRequest, gguf_file) -> DiffusionModel:
    return DiffusionModel(gguf_file("small", request.param), n_ctx=1024, n_threads=1)


def options(index: int) -> GenerationOptions:
    return GenerationOptions(max_tokens=12 + 8 * index, steps=3 + index % 3, seed=index, eos=())


@pytest.fixture(scope="module")
def alone(model: DiffusionModel) -> list[Completion]:
    return [model.generate(prompt, options(index)) for index, prompt in enumerate(PROMPTS)]


def same(first: Completion, second: Completion) -> bool:
    return (
        first.text == second.text
        and first.tokens.tolist() == second.tokens.tolist()
        and first.canvas_steps == second.canvas_steps
        and first.finish_reason == second.finish_reason
        and first.n_prompt == second.n_prompt
    )


@pytest.mark.parametrize("n_parallel", [1, 2, 3, 8])
def test_batched_answers_equal_single_ones(
    model: DiffusionModel, alone: list[Completion], n_parallel: int
) -> None:
    each = (options(index) for index in range(len(PROMPTS)))
    done = dict(model.generate_batch(PROMPTS, each, n_parallel=n_parallel))
    assert sorted(done) == list(range(len(PROMPTS)))
    for index, expected in enumerate(alone):
        assert same(done[index], expected), index


def test_more_prompts_in_one_graph_than_a_node_has_sources(model: DiffusionModel) -> None:
    prompts = [f"{n} apples" for n in range(11)]
    each = GenerationOptions(max_tokens=8, steps=2, seed=5, eos=())
    done = dict(model.generate_batch(prompts, (each for _ in prompts), n_parallel=len(prompts)))
    for index, prompt in enumerate(prompts):
        assert same(done[index], model.generate(prompt, each)), index


def test_a_finished_prompt_leaves_and_the_next_enters(model: DiffusionModel) -> None:
    taken: list[int] = []

    def prompts() -> Iterator[str]:
        for index, prompt in enumerate(PROMPTS):
            taken.append(index)
            yield prompt

    steps = [8, 2, 2, 2, 2]
    each = [GenerationOptions(max_tokens=1, steps=n, stability_threshold=9, seed=1, eos=()) for n in steps]
    order = []
    for index, _ in model.generate_batch(prompts(), each, n_parallel=2):
        order.append(index)
        if index == 1:
            assert taken == [0, 1]  # no prompt is taken before there is room for it
    assert order == [1, 2, 3, 0, 4] or order == [1, 2, 3, 4, 0]  # the long one doesn't hold the others up


def test_a_prompt_that_fails_leaves_the_others_alone(model: DiffusionModel, alone: list[Completion]) -> None:
    prompts: list = ["one", "x" * 3000, [], "five", [model.n_vocab]]
    each = [options(0), options(1), options(2), options(3), options(4)]
    done = dict(model.generate_batch(prompts, each, n_parallel=2))
    assert same(done[0], alone[0]) and same(done[3], alone[3])
    assert isinstance(done[1], ContextOverflowError)
    assert isinstance(done[2], ValueError) and "no tokens" in str(done[2])
    assert isinstance(done[4], ValueError)


def test_a_session_cancelled_in_a_batch_ends_alone(model: DiffusionModel) -> None:
    sessions = [model.native.new_session(512) for _ in range(3)]
    for session in sessions:
        session.begin(
            **{**ENTROPY_BOUND_DEFAULTS, "steps": 4, "confidence_threshold": 0.0},
            max_tokens=1,
            seed=0,
            eos=[],
        )
    batch = model.native.new_batch()
    batch.next_steps(sessions)
    sessions[1].cancel()
    outcomes = batch.next_steps(sessions)
    assert [type(outcome).__name__ for outcome in outcomes] == ["Step", "GenerationCancelled", "Step"]
    outcomes = batch.next_steps(sessions)
    assert [type(outcome).__name__ for outcome in outcomes] == ["Step", "NoneType", "Step"]


def test_invalid_batches_are_refused(model: DiffusionModel, gguf_file) -> None:
    session = model.native.new_session(512)
    batch = model.native.new_batch()
    with pytest.raises(ValueError, match="session 1 of the batch is a duplicate"):
        batch.next_steps([session, session])
    other = DiffusionModel(gguf_file("wide", "f32"), n_threads=1)
    with pytest.raises(ValueError, match="another model"):
        batch.next_steps([other.native.new_session(512)])
    assert batch.next_steps([]) == []
    for n_parallel in (0, True, 1.5):
        with pytest.raises(ValueError, match="n_parallel"):
            model.generate_batch(PROMPTS, n_parallel=n_parallel)
    with pytest.raises(TypeError, match="max_token"):
        model.generate_batch(PROMPTS, max_token=3)


def test_events_carry_the_prompt_s_index(model: DiffusionModel, alone: list[Completion]) -> None:
    ends: dict[int, EndEvent] = {}

    def note(index: int, event: object) -> None:
        if isinstance(event, EndEvent):
            ends[index] = event

    each = [options(index) for index in range(len(PROMPTS))]
    for index, completion in model.generate_batch(PROMPTS, each, on_event=note):
        assert isinstance(completion, Completion)
        assert ends[index].reason == completion.finish_reason
    assert len(ends) == len(PROMPTS)
