"""The server over real HTTP on localhost, with a scripted model (support/server_fakes.py)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from support.paths import REPOSITORY
from support.server_fakes import CANVAS, CHAT, TOOLS, ScriptedModel, ask, events, script, serving

from pydiffusion.chat.formats.gemma import GEMMA
from pydiffusion.openai.fields import EQUIVALENTS, IGNORED, UNSUPPORTED


def calling(function: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function}]}


@pytest.fixture(scope="module")
def model() -> ScriptedModel:
    return ScriptedModel(script)


@pytest.fixture(scope="module")
def url(model: ScriptedModel) -> Iterator[str]:
    with serving(model, max_body=20_000) as (address, _):
        yield address


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=60)


# With the official client


def test_a_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="scripted", messages=ask("Hi"), seed=7)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", "Hello, world!")
    assert (choice.finish_reason, choice.index, choice.message.tool_calls) == ("stop", 0, None)
    usage = answer.usage
    assert usage is not None and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.completion_tokens == len("Hello, world!")
    assert answer.model_extra["diffusion"]["seeds"] == [7]
    assert answer.model_extra["diffusion"]["canvas_steps"] == [[3, 3]]


def test_a_stream(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="scripted", messages=ask("Hi"), stream=True, stream_options={"include_usage": True}
        )
    )
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert [text for text in texts if text] == ["Hello, ", "world!"]
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len("Hello, world!")
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_thinking_is_in_reasoning_content(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="scripted", messages=ask("think"), reasoning_effort="high", stop=["yes", "!"]
    )
    message = answer.choices[0].message
    assert message.content == "It is so. Über"  # a stop string inside a thought stops nothing
    assert message.model_extra["reasoning_content"] == "Hm, yes."
    assert answer.usage.completion_tokens_details.reasoning_tokens == len("Hm, yes.")
    parts = [
        chunk.choices[0].delta
        for chunk in client.chat.completions.create(model="scripted", messages=ask("think"), stream=True)
    ]
    assert "".join(part.model_extra.get("reasoning_content", "") for part in parts) == "Hm, yes."
    assert "".join(part.content or "" for part in parts) == "It is so. Über!"


def test_tool_calls_and_their_results(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="scripted", messages=ask("weather?"), tools=TOOLS)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    calls = choice.message.tool_calls
    assert [call.function.name for call in calls] == ["get_weather", "b"]
    assert json.loads(calls[0].function.arguments) == {"city": "Oslo", "days": 3}
    assert len({call.id for call in calls}) == 2 and {call.type for call in calls} == {"function"}
    result = {"role": "tool", "tool_call_id": calls[0].id, "content": "rain"}
    messages = [*ask("weather?"), choice.message, result]
    after = client.chat.completions.create(model="scripted", messages=messages, tools=TOOLS)
    assert after.choices[0].message.content == "It rains in Oslo."


def test_tool_calls_streamed(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="scripted", messages=ask("weather?"), tools=TOOLS) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].finish_reason == "tool_calls"
    calls = final.choices[0].message.tool_calls
    assert [call.function.name for call in calls] == ["get_weather", "b"]
    assert json.loads(calls[0].function.arguments) == {"city": "Oslo", "days": 3}


def test_parallel_tool_calls_off_and_tool_choice_none(client: openai.OpenAI, model: ScriptedModel) -> None:
    answer = client.chat.completions.create(
        model="scripted", messages=ask("weather?"), tools=TOOLS, parallel_tool_calls=False
    )
    assert [call.function.name for call in answer.choices[0].message.tool_calls] == ["get_weather"]
    prompts: list[str] = []
    model.script, before = lambda prompt, i: (prompts.append(prompt), ["x"])[1], model.script
    try:
        client.chat.completions.create(
            model="scripted", messages=ask("weather?"), tools=TOOLS, tool_choice="none"
        )
        client.chat.completions.create(
            model="scripted", messages=ask("hi"), extra_body={"enable_thinking": True}
        )
    finally:
        model.script = before
    assert "<|tool>" not in prompts[0] and "<|think|>" in prompts[1]


def test_several_choices_and_limits(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="scripted", messages=ask("Hi"), n=3, seed=2**64 - 2, max_completion_tokens=5
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.message.content for choice in answer.choices} == {"Hello"}
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    assert answer.model_extra["diffusion"]["seeds"] == [2**64 - 2, 2**64 - 1, 0]
    assert answer.usage.completion_tokens == 15


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="scripted.gguf", prompt=["Hi", "Ho"], echo=True, stop="wor")
    assert [choice.text for choice in answer.choices] == ["HiHello, ", "HoHello, "]
    assert answer.object == "text_completion"
    streamed = client.completions.create(model="scripted", prompt=[40, 41, 42], stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == "Hello, world!"


def test_models(client: openai.OpenAI) -> None:
    assert [entry.id for entry in client.models.list()] == ["scripted"]
    assert client.models.retrieve("scripted").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_the_prompt_cache_is_reused(client: openai.OpenAI) -> None:
    messages = ask("Tell me about rivers, a conversation of its own")
    client.chat.completions.create(model="scripted", messages=messages)
    messages += [{"role": "assistant", "content": "Hello, world!"}, *ask("And roads?")]
    second = client.chat.completions.create(model="scripted", messages=messages)
    assert second.usage.prompt_tokens_details.cached_tokens > 50


def test_ignored_parameters_are_listed(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="scripted", messages=ask("Hi"), temperature=0.3, top_p=0.9, user="me", logprobs=False
    )
    assert answer.model_extra["diffusion"]["ignored_parameters"] == ["top_p", "user"]


# Drafts


def test_a_stream_event_for_every_step(url: str, client: openai.OpenAI) -> None:
    body = {"messages": ask("think"), "stream": True, "stream_options": {"diffusion": True}, "n": 2}
    got = events(httpx.post(url + "/v1/chat/completions", json=body, timeout=60))
    drafts = [event["diffusion"] for event in got if event.get("diffusion", {}).get("type") == "draft"]
    drafts.sort(key=lambda draft: draft["index"])  # choices run in parallel
    assert [(d["index"], d["canvas"], d["step"]) for d in drafts] == [
        (i, canvas, step) for i in range(2) for canvas in range(4) for step in (1, 2, 3)
    ]
    for draft in drafts:
        assert len(draft["pieces"]) == len(draft["settled"]) == len(draft["entropy"]) == CANVAS
        assert sum(draft["settled"]) == CANVAS * draft["step"] // 3
        assert not any(marker in "".join(draft["pieces"]) for marker in GEMMA.markers)
    assert "".join(drafts[-1]["pieces"]).startswith("so. Über!")
    assert got[-1]["diffusion"]["type"] == "summary"
    # the official client reads them as chunks without choices
    stream = client.chat.completions.create(
        model="scripted", messages=ask("Hi"), stream=True, stream_options={"diffusion": True}
    )
    assert "".join(c.choices[0].delta.content or "" for c in stream if c.choices) == "Hello, world!"


# What is refused


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "code"),
    [
        ("chat/completions", {**CHAT, "logprobs": True}, 400, "logprobs", "unsupported_parameter"),
        (
            "chat/completions",
            {**CHAT, "response_format": {"type": "yaml"}},
            400,
            "response_format",
            None,
        ),
        ("chat/completions", {**CHAT, "temperature": "hot"}, 400, "temperature", None),
        ("chat/completions", {**CHAT, "temperature": -0.1}, 400, "temperature", None),
        ("completions", {"prompt": "x", "stop_token_ids": 3}, 400, "stop_token_ids", "invalid_type"),
        ("completions", {"prompt": "x", "stop_token_ids": [99999]}, 400, "stop_token_ids", None),
        ("completions", {"prompt": "x", "special": 1}, 400, "special", "invalid_type"),
        ("chat/completions", {**CHAT, "tool_choice": "required"}, 400, "tool_choice", None),
        ("chat/completions", {**CHAT, "model": 3}, 400, "model", "invalid_type"),
        ("chat/completions", {**CHAT, "max_tokens": 0}, 400, "max_tokens", None),
        ("chat/completions", {**CHAT, "max_tokens": 1, "max_completion_tokens": 0}, 400,
         "max_completion_tokens", None),
        ("chat/completions", {**CHAT, "n": 17}, 400, "n", None),
        ("chat/completions", {**CHAT, "n": True}, 400, "n", None),
        ("chat/completions", {**CHAT, "seed": "x"}, 400, "seed", None),
        ("chat/completions", {**CHAT, "stop": [""]}, 400, "stop", None),
        ("chat/completions", {**CHAT, "steps": -1}, 400, "steps", None),
        ("chat/completions", {**CHAT, "stream": "yes"}, 400, "stream", "invalid_type"),
        ("chat/completions", {**CHAT, "stream_options": {}, "n": 0}, 400, "n", None),
        ("chat/completions", {**CHAT, "stream": True, "stream_options": 3}, 400, "stream_options",
         "invalid_type"),
        ("chat/completions", {**CHAT, "reasoning_effort": "huge"}, 400, "reasoning_effort", None),
        (
            "chat/completions",
            {**CHAT, "chat_template_kwargs": {"messages": 1}},
            400,
            "chat_template_kwargs",
            "invalid_value",
        ),
        (
            "chat/completions",
            {**CHAT, "chat_template_kwargs": {"self": 1}},
            400,
            "chat_template_kwargs",
            "invalid_value",
        ),
        ("chat/completions", {}, 400, "messages", None),
        ("chat/completions", {"messages": []}, 400, "messages", None),
        ("chat/completions", {"messages": [3]}, 400, "messages[0]", "invalid_type"),
        ("chat/completions", {"messages": [{"role": "king"}]}, 400, "messages[0].role", None),
        ("chat/completions", {"messages": [{"role": "user"}]}, 400, "messages[0].content", None),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            400,
            "messages[0].content[0]",
            None,
        ),
        ("chat/completions", {"messages": ask(5)}, 400, "messages[0].content", None),
        (
            "chat/completions",
            {"messages": ask([{"type": "text", "text": None}])},
            400,
            "messages[0].content[0]",
            None,
        ),
        (
            "chat/completions",
            {"messages": [*ask("Hi"), {"role": "tool", "tool_call_id": "1"}]},
            400,
            "messages[1].content",
            None,
        ),
        (
            "chat/completions",
            {"messages": [*ask("Hi"), calling({"name": "f", "arguments": 3})]},
            400,
            "messages[1].tool_calls[0]",
            None,
        ),
        (
            "chat/completions",
            {"messages": [{"role": "tool", "content": ""}]},
            400,
            "messages[0].tool_call_id",
            None,
        ),
        ("chat/completions", {**CHAT, "tools": [{"type": "x"}]}, 400, "tools[0].type", None),
        ("chat/completions", {"messages": ask("forbidden")}, 400, "messages", None),
        ("chat/completions", {"messages": ask("\ud800")}, 400, "messages", None),
        ("chat/completions", {"messages": ask(1000 * "x")}, 400, "messages", "context_length_exceeded"),
        ("chat/completions", [], 400, None, None),
        ("completions", {}, 400, "prompt", None),
        ("completions", {"prompt": []}, 400, "prompt", None),
        ("completions", {"prompt": [99999]}, 400, "prompt", None),
        ("completions", {"prompt": ["a", 3]}, 400, "prompt", None),
        ("completions", {"prompt": 1000 * "x"}, 400, "prompt", "context_length_exceeded"),
        ("completions", {"prompt": "x", "suffix": 3}, 400, "suffix", "invalid_type"),
        ("completions", {"prompt": "x", "messages": ask("Hi")}, 400, "messages", "unknown_parameter"),
        ("nonsense", {}, 404, None, "unknown_url"),
        ("models", {}, 405, None, "method_not_allowed"),
    ],
)  # fmt: skip
def test_invalid_requests_get_an_error_with_param_and_code(
    url: str, path: str, body: Any, status: int, param: str | None, code: str | None
) -> None:
    response = httpx.post(f"{url}/v1/{path}", content=json.dumps(body), timeout=60)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (status, param, code), error
    assert error["type"] == "invalid_request_error" and error["message"]
    assert set(error) == {"message", "type", "param", "code"}


BELOW_ZERO = {
    "steps": 0, "t_min": -1, "t_max": -1, "entropy_bound": -1, "stability_threshold": -1,
    "confidence_threshold": -1,
}  # fmt: skip
LIMITS = {
    "thinking_budget": -1,
    "stop_on_repetition": 1,
    "trim_after_eos": "x",
    "stop": [""],
    "max_tokens": 0,
}


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [("chat/completions", name, value) for name, value in {**BELOW_ZERO, **LIMITS}.items()]
    + [("completions", name, value) for name, value in {**BELOW_ZERO, **LIMITS}.items()]
    + [("infill", name, value) for name, value in BELOW_ZERO.items()]
    + [
        ("chat/completions", "max_completion_tokens", 2**31),
        ("chat/completions", "t_min", 7.5),  # above the t_max that a file without one has
        ("completions", "t_max", 0.001),
        ("completions", "t_max", "warm"),
        ("completions", "regex", "("),
        ("completions", "response_format", {"type": "json_schema", "json_schema": {"schema": {"type": 3}}}),
        ("infill", "hole_tokens", 0),
    ],
)
def test_an_option_out_of_range_is_the_param_of_the_error(url: str, path: str, name: str, value: Any) -> None:
    content = {"chat/completions": CHAT, "completions": {"prompt": "a"}, "infill": {"text": "a<|hole|>"}}
    response = httpx.post(f"{url}/v1/{path}", json={**content[path], name: value}, timeout=60)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, name), error


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b'{"a": NaN}', 400),
        (b'{"a": "\xff"}', 400),
        (b"[" * 15_000, 400),
        (b'{"n": ' + 9_000 * b"9" + b"}", 400),
        (b" " * 20_001, 413),
    ],
)
def test_malformed_bodies(url: str, content: bytes, status: int) -> None:
    response = httpx.post(url + "/v1/chat/completions", content=content, timeout=60)
    assert response.status_code == status and response.json()["error"]["message"]
    parts = (content[i : i + 500] for i in range(0, len(content), 500))  # chunked: without Content-Length
    assert httpx.post(url + "/v1/chat/completions", content=parts, timeout=60).status_code == status


def test_the_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="context") as caught:
        client.chat.completions.create(model="scripted", messages=ask(1000 * "x"))
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "messages"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_the_api_key(model: ScriptedModel) -> None:
    with serving(model, api_key="sésame") as (url, _):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic s"}):
            response = httpx.get(url + "/v1/models", headers=headers)
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        assert httpx.get(url + "/metrics").status_code == 401
        assert httpx.get(url + "/health").status_code == 200
        right = {"Authorization": "Bearer sésame".encode()}
        assert httpx.get(url + "/v1/models", headers=right).status_code == 200
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=url + "/v1", api_key="x", max_retries=0).models.list()


def test_cross_origin_requests(model: ScriptedModel, url: str) -> None:
    assert httpx.get(url + "/v1/models", headers={"Origin": "https://evil.example"}).status_code == 403
    assert httpx.get(url + "/v1/models", headers={"Origin": url}).status_code == 200
    with serving(model, cors=("https://good.example",)) as (other, _):
        good = httpx.get(other + "/v1/models", headers={"Origin": "https://good.example"})
        assert good.headers["access-control-allow-origin"] == "https://good.example"
        assert httpx.get(other + "/v1/models", headers={"Origin": "https://x.example"}).status_code == 403


# Health, metrics, and their documentation


def test_health_and_metrics(url: str) -> None:
    httpx.post(url + "/v1/chat/completions", json=CHAT, timeout=60)
    health = httpx.get(url + "/health").json()
    assert (health["status"], health["model"]) == ("ok", "scripted")
    text = httpx.get(url + "/metrics").text
    for line in text.splitlines():
        assert re.fullmatch(r"# (HELP|TYPE) \w+ .+|\w+(\{[^}]*\})? [0-9.e+-]+", line), line
    assert 'pydiffusion_http_responses_total{path="/v1/chat/completions",status="200"}' in text
    steps = re.search(r"^pydiffusion_steps_total (\d+)$", text, re.MULTILINE)
    assert steps and int(steps[1]) > 0


def test_the_page_lists_what_is_ignored_and_refused() -> None:
    page = (REPOSITORY / "docs" / "server.md").read_text(encoding="utf-8")
    for name in (*IGNORED, *UNSUPPORTED, *EQUIVALENTS):
        assert f"`{name}`" in page, name
