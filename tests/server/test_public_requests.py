"""Requests that people reported to other servers in public threads, which each test names."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from support.server_fakes import CHAT, ScriptedModel, events, script, serving

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(ScriptedModel(script), cors=("app://obsidian.md",)) as (address, _):
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as opened:
        yield opened


def ignored(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == "Hello, world!"
    return answer.json()["diffusion"]["ignored_parameters"]


def test_fields_in_messages_that_only_the_client_knows(client: httpx.Client) -> None:
    """vllm-project/vllm#10463: an editor's plugin keeps ids and options in its messages."""
    message = {"role": "user", "content": "Hi", "id": 1947269257, "opts": {"visible": False}, "name": "me"}
    assert ignored(client.post("/v1/chat/completions", json={"messages": [message]})) == []


def test_the_fields_of_a_probe(client: httpx.Client) -> None:
    """NVIDIA/garak#748."""
    sent = {"frequency_penalty": 0.0, "presence_penalty": 0.0, "top_p": 1.0, "n": 1, "stop": ["#", ";"]}
    answer = client.post("/v1/chat/completions", json={**CHAT, **sent, "temperature": 0.7, "max_tokens": 150})
    assert ignored(answer) == ["frequency_penalty", "presence_penalty", "top_p"]


def test_stream_options_without_a_stream(client: httpx.Client) -> None:
    """BerriAI/litellm#29431, digitalocean/langchain-gradient#29."""
    for more in ({}, {"stream": False}):
        body = {**CHAT, "stream_options": {"include_usage": True}, **more}
        assert ignored(client.post("/v1/chat/completions", json=body)) == ["stream_options"]


def test_stream_options_of_another_server(client: httpx.Client) -> None:
    """vLLM's own, beside OpenAI's."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {**CHAT, "stream": True, "stream_options": options}
    chunks = events(client.post("/v1/chat/completions", json=body))
    assert chunks[-1]["usage"]["completion_tokens"] == len("Hello, world!")
    assert chunks[-2]["diffusion"]["ignored_parameters"] == ["stream_options.continuous_usage_stats"]


def test_stop_strings_by_the_dozen_and_empty_ones(client: httpx.Client) -> None:
    """SillyTavern/SillyTavern#1844: four are OpenAI's limit, not a local model's. mlc-ai/mlc-llm#2070."""
    stops = [f"\nUser {i}:" for i in range(40)]
    for stop in (stops, [], "", None):
        assert ignored(client.post("/v1/chat/completions", json={**CHAT, "stop": stop})) == []
    body = {**CHAT, "stop": [*stops, "world"]}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.json()["choices"][0]["message"]["content"] == "Hello, "


def test_limits_beyond_the_context(client: httpx.Client) -> None:
    """getumbrel/llama-gpt#113, JustVugg/colibri#260; the context ends such an answer, see
    test_constrained_requests.py.
    """
    for limit in (None, -1, 100_000_000):
        assert ignored(client.post("/v1/chat/completions", json={**CHAT, "max_tokens": limit})) == []


def test_labels_beside_a_response_format(client: httpx.Client) -> None:
    """i-am-bee/beeai-framework#980: ``strict`` where it has no place."""
    for label in ({"strict": True}, {"name": "x"}, {"description": "y"}):
        body = {**CHAT, "response_format": {"type": "text", **label}}
        assert ignored(client.post("/v1/chat/completions", json=body)) == []


def test_preflights_of_plugins(client: httpx.Client) -> None:
    """logancyang/obsidian-copilot#2877: a header that only this client has."""
    asked = {"Access-Control-Request-Method": "POST", "Origin": "app://obsidian.md"}
    headers = {**asked, "Access-Control-Request-Headers": "authorization,dangerously-allow-browser"}
    answer = client.options("/v1/chat/completions", headers=headers)
    assert answer.status_code == 200
    assert "dangerously-allow-browser" in answer.headers["access-control-allow-headers"]


def test_options_that_are_no_preflight(client: httpx.Client) -> None:
    """mostlygeek/llama-swap#42, jwadow/kiro-gateway#6, Trans-N-ai/swama#87."""
    for path, method in (("/v1/chat/completions", "POST"), ("/v1/models", "GET")):
        answer = client.options(path)
        assert answer.status_code == 204 and method in answer.headers["allow"]


def test_paths_of_other_servers_get_a_hint(client: httpx.Client) -> None:
    """letta-ai/letta#1856, OpenHands/OpenHands#485."""
    for path, meant in (
        ("/v1/completion", "/v1/completions"),
        ("/chat/completions", "/v1/chat/completions"),
    ):
        assert f"did you mean {meant}?" in client.post(path, json={}).json()["error"]["message"]
