"""Concurrent requests, disconnects, time and queue limits, shutdown."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

import httpx
import openai
import pytest
from support.server_fakes import CHAT, ScriptedModel, ask, events, eventually, script, serving

from pydiffusion.events import EndEvent
from pydiffusion.openai.errors import ApiError
from pydiffusion.openai.prepared import PreparedRun
from pydiffusion.openai.reports import Failed, Finished
from pydiffusion.options import GenerationOptions
from pydiffusion.server.jobs import Job
from pydiffusion.server.scheduler import Scheduler


@pytest.fixture
def slow() -> ScriptedModel:
    """Its answer to "long" takes minutes, until ``step_seconds`` is set to 0."""
    model = ScriptedModel(script)
    model.step_seconds = 0.2
    return model


def post_in_thread(url: str, text: str, results: dict[str, Any], **fields: Any) -> threading.Thread:
    def post() -> None:
        body = {"messages": ask(text), **fields}
        results[text] = httpx.post(url + "/v1/chat/completions", json=body, timeout=120)
        results.setdefault("order", []).append(text)

    thread = threading.Thread(target=post, daemon=True)
    thread.start()
    return thread


def test_a_full_queue_is_429_with_retry_after(slow: ScriptedModel) -> None:
    results: dict[str, Any] = {}
    with serving(slow, n_parallel=1, max_queue=1) as (url, server):
        threads = [post_in_thread(url, "long 1", results, max_tokens=1000)]
        eventually(lambda: server.scheduler.n_active == 1)
        threads.append(post_in_thread(url, "Hi 2", results))
        eventually(lambda: server.scheduler.n_waiting == 1)
        client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model="scripted", messages=ask("3"))
        assert int(caught.value.response.headers["retry-after"]) >= 1
        slow.step_seconds = 0.0
        for thread in threads:
            thread.join(60)
        assert results["Hi 2"].json()["choices"][0]["message"]["content"] == "Hello, world!"
        assert results["long 1"].json()["choices"][0]["finish_reason"] == "length"


def test_without_a_queue_idle_slots_are_used(slow: ScriptedModel) -> None:
    results: dict[str, Any] = {}
    with serving(slow, n_parallel=1, max_queue=0) as (url, server):
        thread = post_in_thread(url, "long", results, max_tokens=1000)
        eventually(lambda: server.scheduler.n_active == 1)
        assert httpx.post(url + "/v1/chat/completions", json=CHAT, timeout=60).status_code == 429
        slow.step_seconds = 0.0
        thread.join(60)
        assert results["long"].status_code == 200


def test_a_short_request_overtakes_a_long_one(slow: ScriptedModel) -> None:
    results: dict[str, Any] = {}
    with serving(slow, n_parallel=2) as (url, server):
        first = post_in_thread(url, "long", results, max_tokens=1000)
        eventually(lambda: server.scheduler.n_active == 1)
        post_in_thread(url, "Hi", results).join(60)
        slow.step_seconds = 0.0
        first.join(60)
    assert results["order"] == ["Hi", "long"]


@pytest.mark.parametrize("stream", [False, True])
def test_generation_stops_within_a_step_on_disconnect(slow: ScriptedModel, stream: bool) -> None:
    slow.step_seconds = 1.0
    with serving(slow, n_parallel=1) as (url, server):
        host, _, port = url.removeprefix("http://").partition(":")
        body = json.dumps({"messages": ask("long"), "stream": stream}).encode()
        with socket.create_connection((host, int(port))) as connection:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            eventually(lambda: slow.n_steps >= 2)
            n_steps = slow.n_steps
        eventually(lambda: server.scheduler.n_active == 0)
        assert slow.n_steps <= n_steps + 1
        assert server.scheduler.counters.cancelled == 1
        slow.step_seconds = 0.0
        answer = httpx.post(url + "/v1/chat/completions", json=CHAT, timeout=60)
        assert answer.json()["choices"][0]["message"]["content"] == "Hello, world!"


def test_a_queued_request_is_dropped_on_disconnect(slow: ScriptedModel) -> None:
    results: dict[str, Any] = {}
    with serving(slow, n_parallel=1) as (url, server):
        thread = post_in_thread(url, "long", results, max_tokens=1000)
        eventually(lambda: server.scheduler.n_active == 1)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url + "/v1/chat/completions", json=CHAT, timeout=httpx.Timeout(60, read=0.3))
        eventually(lambda: server.scheduler.n_waiting == 0)
        slow.step_seconds = 0.0
        thread.join(60)
        assert slow.n_answers == 1 and results["long"].status_code == 200


def test_a_late_cancellation_does_not_affect_the_next_request(slow: ScriptedModel) -> None:
    slow.step_seconds = 0.0
    scheduler = Scheduler(slow, n_parallel=1)
    options = GenerationOptions(max_tokens=64).resolve(slow.metadata, slow.n_vocab)

    def end_of_a_job(leave: bool) -> Any:
        ends: list[Any] = []
        over = threading.Event()

        def emit(_: int, report: Any) -> None:
            if leave and isinstance(report, EndEvent):  # the last step is done: nothing is left to stop
                scheduler.cancel(job, ApiError(499, "gone"))
            if isinstance(report, (Failed, Finished)):
                ends.append(report)
                over.set()

        job = Job([PreparedRun(slow.tokenize("Hi"), options)], emit, chat=True)
        scheduler.submit(job)
        assert over.wait(20)
        return ends[0]

    try:
        for _ in range(20):
            end_of_a_job(leave=True)
            assert isinstance(end_of_a_job(leave=False), Finished)
    finally:
        scheduler.close()


@pytest.mark.parametrize("stream", [False, True])
def test_requests_time_out(slow: ScriptedModel, stream: bool) -> None:
    with serving(slow, timeout=0.6) as (url, server):
        body = {"messages": ask("long"), "stream": stream}
        response = httpx.post(url + "/v1/chat/completions", json=body, timeout=60)
        if stream:
            error = events(response)[-1]["error"]
        else:
            assert response.status_code == 504 and response.headers["x-should-retry"] == "false"
            error = response.json()["error"]
        assert (error["code"], error["type"]) == ("timeout", "server_error")
        eventually(lambda: server.scheduler.n_active == 0)


def test_shutdown_finishes_running_requests_and_refuses_queued_ones(slow: ScriptedModel) -> None:
    results: dict[str, Any] = {}
    with serving(slow, n_parallel=1, grace=60) as (url, server):
        threads = [post_in_thread(url, "long", results, max_tokens=1000)]
        eventually(lambda: server.scheduler.n_active == 1)
        threads.append(post_in_thread(url, "Hi", results))
        eventually(lambda: server.scheduler.n_waiting == 1)
        server.should_exit = True
        eventually(lambda: server.scheduler.n_waiting == 0)
        slow.step_seconds = 0.0
        for thread in threads:
            thread.join(60)
        assert results["long"].json()["choices"][0]["finish_reason"] == "length"
        assert results["Hi"].json()["error"]["code"] == "shutting_down"


def test_shutdown_aborts_requests_after_the_grace_period(slow: ScriptedModel) -> None:
    results: dict[str, Any] = {}
    with serving(slow, grace=0.2) as (url, server):
        thread = post_in_thread(url, "long", results, stream=True)
        eventually(lambda: server.scheduler.n_active == 1)
        server.should_exit = True
        thread.join(60)
        assert events(results["long"])[-1]["error"]["code"] == "shutting_down"


def test_many_clients_with_disconnects(slow: ScriptedModel) -> None:
    slow.step_seconds = 0.002
    results: dict[str, Any] = {}
    with serving(slow, n_parallel=3) as (url, server):
        threads = [post_in_thread(url, f"Hi {i}", results) for i in range(20)]
        for _ in range(10):
            with pytest.raises(httpx.TimeoutException):
                httpx.post(url + "/v1/chat/completions", json={"messages": ask("long")}, timeout=0.05)
        for thread in threads:
            thread.join(120)
        eventually(lambda: server.scheduler.n_active == 0)
    contents = {results[f"Hi {i}"].json()["choices"][0]["message"]["content"] for i in range(20)}
    assert contents == {"Hello, world!"}
