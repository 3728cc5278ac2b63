"""Continuous batching: texts equal those of each request alone, and no request holds up the others."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from support.server_fakes import ScriptedModel, ask, eventually, script, serving

from pydiffusion import DiffusionModel, InsufficientMemoryError, _native
from pydiffusion._util.sampler_options import ENTROPY_BOUND_DEFAULTS
from pydiffusion.openai.errors import ApiError
from pydiffusion.openai.prepared import PreparedRun
from pydiffusion.openai.reports import Failed, Finished, Prefilled
from pydiffusion.options import GenerationOptions
from pydiffusion.server.jobs import Job
from pydiffusion.server.scheduler import Scheduler
from pydiffusion.session import Session


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    from pydiffusion.convert import convert
    from pydiffusion.demo import checkpoint_path

    target = tmp_path_factory.mktemp("served") / "demo.gguf"
    convert(checkpoint_path(), target, "q8_0")
    return DiffusionModel(target, n_threads=1, n_ctx=1024)


class Client:
    """One request submitted to a scheduler, and the reports that it gets."""

    def __init__(self, scheduler: Scheduler, runs: list[PreparedRun], **job: Any) -> None:
        self.reports: list[tuple[int, Any]] = []
        self.over = threading.Event()
        self.job = Job(runs, self._take, **{"chat": False, **job})
        scheduler.submit(self.job)

    def _take(self, i_run: int, report: Any) -> None:
        self.reports.append((i_run, report))
        if isinstance(report, (Failed, Finished)):
            self.over.set()

    def order(self, kind: type) -> list[int]:
        return [i_run for i_run, report in self.reports if isinstance(report, kind)]


@pytest.fixture
def scripted() -> Iterator[tuple[ScriptedModel, Scheduler]]:
    model = ScriptedModel(script)
    scheduler = Scheduler(model, n_parallel=3)
    yield model, scheduler
    scheduler.close()


def run(model: DiffusionModel, text: str = "Hi", **options: Any) -> PreparedRun:
    chosen = GenerationOptions(**{"max_tokens": 64, **options}).resolve(model.metadata, model.n_vocab)
    return PreparedRun(model.tokenize(text), chosen)


# Request bodies

BODIES: list[tuple[str, dict[str, Any]]] = [
    ("chat/completions", {"messages": ask("reverse: a b c"), "max_tokens": 100}),
    ("chat/completions", {"messages": ask("sort: 3 1 2"), "n": 3, "max_tokens": 60}),
    ("chat/completions", {"messages": ask("json: bob 7"), "response_format": {"type": "json_object"},
                          "max_tokens": 60}),
    ("completions", {"prompt": "some words " * 60, "max_tokens": 60}),
    ("completions", {"prompt": "when: ", "regex": r"\d{4}-\d{2}", "max_tokens": 10, "n": 2}),
    ("completions", {"prompt": "one ", "suffix": " three", "max_tokens": 6}),
    ("infill", {"text": "def f(x):\n    <|hole:3|>\n    return <|hole:2|>"}),
]  # fmt: skip


def texts(answer: dict[str, Any]) -> list[str]:
    return [json.dumps(choice.get("message", choice.get("text"))) for choice in answer["choices"]]


def test_batched_answers_equal_sequential_ones(model: DiffusionModel) -> None:
    bodies = [(path, {**body, "seed": 7 * i, "steps": 3 + i}) for i, (path, body) in enumerate(BODIES)]

    def post(url: str, path: str, body: dict[str, Any]) -> list[str]:
        answer = httpx.post(f"{url}/v1/{path}", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        return texts(answer.json())

    with serving(model, n_parallel=1) as (url, _):
        alone = [post(url, path, body) for path, body in bodies]
    together: dict[int, list[str]] = {}
    with serving(model, n_parallel=5) as (url, server):
        threads = [
            threading.Thread(target=lambda i=i, job=job: together.update({i: post(url, *job)}))
            for i, job in enumerate(bodies)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        eventually(lambda: server.scheduler.n_in_flight == 0)
        assert server.scheduler.n_parallel == 5
    assert [together[i] for i in range(len(bodies))] == alone


def test_choices_run_in_parallel_over_one_prompt(model: DiffusionModel) -> None:
    scheduler = Scheduler(model, n_parallel=4)
    try:
        runs = [run(model, "x" * 100, seed=i, steps=4, eos=()) for i in range(4)]
        client = Client(scheduler, runs)
        assert client.over.wait(60)
        told = [report for _, report in client.reports if isinstance(report, Prefilled)]
        assert [report.n_cached for report in told] == [0, 100, 100, 100]
        assert scheduler.counters.cached_tokens == 300
    finally:
        scheduler.close()


def test_requests_do_not_wait_for_anothers_choices(scripted: tuple[ScriptedModel, Scheduler]) -> None:
    model, scheduler = scripted
    model.step_seconds = 0.02
    many = Client(scheduler, [run(model, "long", max_tokens=100)] * 6)
    eventually(lambda: scheduler.n_in_flight == 3)
    one = Client(scheduler, [run(model)])
    assert one.over.wait(60) and not many.over.is_set()
    assert many.over.wait(120)
    assert sorted(many.order(Prefilled)) == list(range(6))


def test_long_prompts_are_encoded_in_chunks_between_steps(
    scripted: tuple[ScriptedModel, Scheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pydiffusion.generation.batching._PROMPT_PART", 16)
    model, scheduler = scripted
    model.step_seconds = 0.05
    first = Client(scheduler, [run(model, "long", max_tokens=1000)])
    eventually(lambda: first.order(Prefilled) == [0])
    n_steps = model.n_steps
    second = Client(scheduler, [run(model, "x" * 400)])
    eventually(lambda: second.order(Prefilled) == [0])
    assert model.n_steps - n_steps >= 400 // 16 - 2  # one per chunk, except the first and the last
    scheduler.cancel(first.job, ApiError(499, "gone"))
    assert second.over.wait(60)


def test_a_failure_ends_all_choices_of_its_request_only(model: DiffusionModel) -> None:
    scheduler = Scheduler(model, n_parallel=4)
    try:
        other = Client(scheduler, [run(model, "fine", seed=1, steps=8)])
        wrong = PreparedRun([model.n_vocab], run(model).options)
        failing = Client(scheduler, [run(model, "a", steps=40, confidence_threshold=0.0), wrong])
        assert failing.over.wait(60) and other.over.wait(60)
        assert isinstance(failing.reports[-1][1], Failed) and failing.reports[-1][1].error.status == 400
        assert isinstance(other.reports[-1][1], Finished)
        eventually(lambda: scheduler.n_in_flight == 0 and scheduler.n_active == 0)
    finally:
        scheduler.close()


def test_without_memory_for_more_sequences_requests_take_turns(
    scripted: tuple[ScriptedModel, Scheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, scheduler = scripted
    make = model.new_session

    def new_session(n_ctx: int | None = None) -> Session:
        if scheduler.n_sessions >= 2:
            raise InsufficientMemoryError("no memory for a cache")
        return make(n_ctx)

    monkeypatch.setattr(model, "new_session", new_session)
    model.step_seconds = 0.01
    clients = [Client(scheduler, [run(model, f"Hi {i}")] * 3) for i in range(4)]
    assert all(client.over.wait(60) for client in clients)
    assert all(isinstance(client.reports[-1][1], Finished) for client in clients)
    assert scheduler.n_parallel == 2 and scheduler.n_sessions == 2


def test_the_metrics_report_concurrency(scripted: tuple[ScriptedModel, Scheduler]) -> None:
    with serving(ScriptedModel(script), n_parallel=3) as (url, _):
        lines = httpx.get(url + "/metrics").text.splitlines()
    assert "pydiffusion_lanes 0" in lines and "pydiffusion_lanes_limit 3" in lines


def test_a_batch_step_is_abandoned_when_all_sequences_are_cancelled(model: DiffusionModel) -> None:
    sessions = [model.native.new_session(512) for _ in range(2)]
    for session in sessions:
        session.encode(np.asarray(model.tokenize("abc"), dtype=np.int32))
        session.begin(
            **{**ENTROPY_BOUND_DEFAULTS, "steps": 10**6, "confidence_threshold": 0.0}, max_tokens=1, seed=0,
            eos=[],
        )  # fmt: skip
    batch = model.native.new_batch()
    outcomes: list[Any] = []

    def go_on() -> None:
        while not outcomes:
            got = batch.next_steps(sessions)
            if not all(isinstance(outcome, _native.Step) for outcome in got):
                outcomes.extend(got)

    thread = threading.Thread(target=go_on)
    thread.start()
    for session in sessions:
        session.cancel()
    thread.join(60)
    names = [type(outcome).__name__ for outcome in outcomes]
    assert "GenerationCancelled" in names and set(names) <= {"GenerationCancelled", "Step"}
    assert batch.next_steps([]) == []
