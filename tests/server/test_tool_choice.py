"""Forced calls, strict tools, tools with ``response_format``: through the server and in Python, on the demo
model; requests as the documentation of known clients shows them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from openai.types.chat import ChatCompletion
from support.server_fakes import ask, events, serving

from pydiffusion import DiffusionModel, OptionError
from pydiffusion.openai.tool_choice import read_tool_choice, tool_use

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["a", "b"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
PLACE = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 8}}, "required": ["city"]}
SCHEMAS = {"save_person": PERSON, "look-up": PLACE}


def tool(name: str, parameters: Any = None, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


TOOLS = [tool(name, schema) for name, schema in SCHEMAS.items()]


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiffusionModel]:
    from pydiffusion.convert import convert
    from pydiffusion.demo import checkpoint_path

    target = tmp_path_factory.mktemp("served") / "demo.gguf"
    convert(checkpoint_path(), target, "q8_0")
    with DiffusionModel(target, n_threads=1, n_ctx=1024) as opened:
        yield opened


@pytest.fixture(scope="module")
def url(model: DiffusionModel) -> Iterator[str]:
    with serving(model) as (address, _):
        yield address


def post(url: str, **fields: Any) -> httpx.Response:
    body = {"messages": ask("json: bob 7"), "seed": 1, "steps": 3, "max_tokens": 120} | fields
    return httpx.post(url + "/v1/chat/completions", json=body)


def checked_calls(choice: Any) -> list[str]:
    """The names of a choice's calls, whose arguments satisfy their schemas."""
    names = []
    for call in choice["message"]["tool_calls"]:
        jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMAS[call["function"]["name"]])
        names.append(call["function"]["name"])
    return names


# One choice: what is called, and what the client is told

CHOICES: dict[str, tuple[Any, set[str], str]] = {
    "required": ("required", set(SCHEMAS), "tool_calls"),
    "any, as Mistral's API has it": ("any", set(SCHEMAS), "tool_calls"),
    "any, as Anthropic's has it": ({"type": "any"}, set(SCHEMAS), "tool_calls"),
    "a function": (named("look-up"), {"look-up"}, "stop"),
    "a function, as in OpenAI's Responses": ({"type": "function", "name": "look-up"}, {"look-up"}, "stop"),
    "a tool, as Anthropic's API has it": ({"type": "tool", "name": "save_person"}, {"save_person"}, "stop"),
    "one of some": (
        {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named("save_person")]}},
        {"save_person"}, "tool_calls"),
    "one of some, as in Responses": (
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "look-up"}]},
        {"look-up"}, "tool_calls"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHOICES)
def test_a_call_is_forced(url: str, kind: str) -> None:
    choice, names, finish_reason = CHOICES[kind]
    answer = post(url, tools=TOOLS, tool_choice=choice, n=3)
    for found in answer.json()["choices"]:
        assert set(checked_calls(found)) <= names and found["message"]["content"] is None
        assert found["finish_reason"] == finish_reason
    ChatCompletion.model_validate(answer.json(), strict=True)


def test_with_any_seed_and_hardly_any_steps(model: DiffusionModel) -> None:
    for seed in range(12):
        answer = model.create_chat_completion(
            ask("x"), tools=TOOLS, tool_choice="required", seed=seed, steps=1, t_max=5.0, max_tokens=80
        )
        assert checked_calls(answer["choices"][0])


def test_one_call_at_most(url: str, model: DiffusionModel) -> None:
    for seed in range(4):
        answer = post(url, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, seed=seed, steps=1)
        assert len(checked_calls(answer.json()["choices"][0])) == 1
    answer = model.create_chat_completion(
        ask("x"), tools=TOOLS, tool_choice="required", parallel_tool_calls=False, seed=1, steps=1
    )
    assert len(checked_calls(answer["choices"][0])) == 1


def test_streamed_and_whole_are_the_same_call(url: str) -> None:
    fields: dict[str, Any] = {"tools": TOOLS, "tool_choice": named("save_person")}
    whole = post(url, **fields).json()["choices"][0]
    chunks = events(post(url, stream=True, **fields))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    (call,) = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert call["index"] == 0 and call["function"] == whole["message"]["tool_calls"][0]["function"]
    assert not any(delta.get("content") for delta in deltas)
    assert [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]][-1] == "stop"


def test_library_and_server_give_the_same_call(url: str, model: DiffusionModel) -> None:
    fields: dict[str, Any] = {
        "tools": TOOLS,
        "tool_choice": "required",
        "max_tokens": 120,
        "seed": 5,
        "steps": 3,
    }
    ours = model.create_chat_completion(ask("json: bob 7"), **fields)["choices"][0]
    theirs = post(url, **fields).json()["choices"][0]
    assert ours["finish_reason"] == theirs["finish_reason"] == "tool_calls"
    for mine, other in zip(ours["message"]["tool_calls"], theirs["message"]["tool_calls"], strict=True):
        assert mine["function"] == other["function"]


# auto


def test_a_schema_or_calls(url: str) -> None:
    """``response_format`` is for the answer's text; the model may call a tool instead."""
    answer_schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    fields: dict[str, Any] = {
        "tools": TOOLS,
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": answer_schema}},
    }
    for seed in range(5):
        message = post(url, **fields, seed=seed, steps=1).json()["choices"][0]["message"]
        if message.get("tool_calls"):
            assert checked_calls({"message": message}) and message["content"] is None
        else:
            jsonschema.validate(json.loads(message["content"]), answer_schema)
    message = post(url, **fields, tool_choice="none").json()["choices"][0]["message"]
    jsonschema.validate(json.loads(message["content"]), answer_schema)
    assert "tool_calls" not in message
    assert checked_calls(post(url, **fields, tool_choice="required").json()["choices"][0])


def test_strict_tools_leave_the_answer_free(model: DiffusionModel) -> None:
    """The demo model answers its tasks, with such tools or without."""
    strict = [tool("save_person", PERSON, strict=True), TOOLS[1]]
    assert tool_use(strict).constraint["function_calls"]["functions"][1]["parameters"] is None
    for task, right in (("sort: d a c", "a c d"), ("add: 17+25", "42")):
        answer = model.create_chat_completion(ask(task), tools=strict, seed=1, max_tokens=64)
        assert answer["choices"][0]["message"] == {"role": "assistant", "content": right}
        assert answer["choices"][0]["finish_reason"] == "stop"


def test_only_allowed_tools_are_called_if_any(model: DiffusionModel) -> None:
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [named("look-up")]}}
    use = tool_use(TOOLS, allowed)
    assert use.shown == TOOLS, "the prompt stays as it is, and with it its cache"
    permitted = use.constraint["function_calls"]
    assert [f["name"] for f in permitted["functions"]] == ["look-up"] and permitted["otherwise"] == "text"
    answer = model.create_chat_completion(ask("sort: d a c"), tools=TOOLS, tool_choice=allowed, seed=1)
    assert answer["choices"][0]["message"]["content"] == "a c d"


def test_without_strict_an_answer_with_tools_is_as_ever() -> None:
    for choice in (None, "auto", {"type": "auto"}):
        assert not tool_use(TOOLS, choice).constraint
        assert tool_use(TOOLS, choice, parallel=False).cuts_after_call
    assert tool_use(TOOLS, "none").shown is None


# What known clients send

OPENAI_CLIENT = {"model": "demo", "messages": [{"role": "user", "content": "Jason is 25 years old"}]}
USER = {
    "properties": {"name": {"title": "Name", "type": "string", "maxLength": 12},
                   "age": {"title": "Age", "type": "integer"}},
    "required": ["name", "age"], "title": "User", "type": "object",
}  # fmt: skip
PAYLOADS: dict[str, tuple[dict[str, Any], Any]] = {
    "langchain, with_structured_output by function calling": (
        {**OPENAI_CLIENT, "stream": False, "n": 1, "parallel_tool_calls": False,
         "tools": [tool("User", USER, description="A user.")], "tool_choice": named("User")}, USER),
    "instructor, tools mode": (
        {**OPENAI_CLIENT, "tool_choice": named("User"),
         "tools": [tool("User", USER, description="The user.")]}, USER),
    "pydantic-ai, output_type": (
        {**OPENAI_CLIENT, "stream": False, "tool_choice": "required",
         "tools": [tool("final_result", USER, strict=True,
                        description="The final response which ends this conversation")]}, USER),
    "AI SDK, toolChoice required": (
        {**OPENAI_CLIENT, "tool_choice": "required",
         "tools": [tool("json", {**USER, "$schema": "http://json-schema.org/draft-07/schema#",
                                 "additionalProperties": False}, description="Respond with a JSON object.")]},
        USER),
    "OpenAI Agents SDK, output_type and a tool": (
        {**OPENAI_CLIENT, "tool_choice": None, "parallel_tool_calls": None, "stream": False,
         "tools": [tool("search", {**PLACE, "additionalProperties": False}, strict=True)],
         "response_format": {"type": "json_schema", "json_schema": {
             "name": "final_output", "strict": True,
             "schema": {**USER, "additionalProperties": False}}}}, USER),
}  # fmt: skip


@pytest.mark.parametrize("client", PAYLOADS)
def test_requests_of_known_clients(url: str, client: str) -> None:
    body, schema = PAYLOADS[client]
    answer = httpx.post(url + "/v1/chat/completions", json={**body, "max_tokens": 200, "seed": 3, "steps": 2})
    assert answer.status_code == 200, answer.text
    message = ChatCompletion.model_validate(answer.json()).choices[0].message
    if message.tool_calls:
        (call,) = message.tool_calls[:1]
        assert call.type == "function"
        expected = PLACE if call.function.name == "search" else schema
        jsonschema.validate(json.loads(call.function.arguments), expected)
    else:
        assert "response_format" in body and message.content
        jsonschema.validate(json.loads(message.content), schema)


def test_the_official_client_parses_a_forced_call(url: str) -> None:
    client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
    answer = client.chat.completions.parse(
        model="demo", messages=ask("x"), tools=[tool("save_person", PERSON, strict=True)],
        tool_choice=named("save_person"), seed=1, max_tokens=120,
    )  # type: ignore[arg-type]  # fmt: skip
    (call,) = answer.choices[0].message.tool_calls or []
    jsonschema.validate(call.function.parsed_arguments, PERSON)


NO_ARGUMENTS = (
    {"type": "object", "properties": {}, "required": [], "additionalProperties": False},
    {"type": "object", "properties": {}},
    {"type": "object"},
    {},
    None,
)


@pytest.mark.parametrize("parameters", NO_ARGUMENTS)
def test_a_function_without_parameters_gets_none(model: DiffusionModel, parameters: Any) -> None:
    """ai-dynamo/dynamo#13789: elsewhere whitespace up to max_tokens; ggml-org/llama.cpp#17667: refused."""
    clock = tool("get_server_time", parameters)
    if parameters is None:
        del clock["function"]["parameters"]
    answer = model.create_chat_completion(
        ask("x"), tools=[clock], tool_choice=named("get_server_time"), seed=1, steps=1, max_tokens=60
    )
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"]["arguments"] == "{}"


def test_none_without_tools(url: str) -> None:
    """vllm-project/vllm#9426."""
    assert post(url, tool_choice="none", max_tokens=4).status_code == 200


# The next turn


def test_results_without_ids_belong_to_the_calls_before(model: DiffusionModel, url: str) -> None:
    def turn(*calls: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {"role": "assistant", "content": None, "tool_calls": list(calls), **more}

    def call(name: str, arguments: Any, **more: Any) -> dict[str, Any]:
        return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}

    with_ids = [
        *ask("hi"), turn(call("f", '{"a": 1}', id="1"), call("g", "{}", id="2")),
        {"role": "tool", "tool_call_id": "1", "content": "one"},
        {"role": "tool", "tool_call_id": "2", "content": "two"},
    ]  # fmt: skip
    expected = model.chat_prompt(with_ids)
    first, second = {"role": "tool", "content": "one"}, {"role": "tool", "content": "two"}
    without = [*ask("hi"), turn(call("f", {"a": 1}), call("g", None))]
    assert model.chat_prompt([*without, first, second]) == expected
    named_results = [{**first, "name": "f"}, {**second, "tool_name": "g"}]  # the second is Ollama's field
    assert model.chat_prompt([*without, *named_results]) == expected
    by_name = model.chat_prompt([*without, *named_results[::-1]])
    texts = [model.detokenize(ids) for ids in (expected, by_name)]
    assert sorted(texts[0]) == sorted(texts[1]) and texts[0] != texts[1], "each under its function's name"
    answer = post(url, messages=[*without, first, second], max_tokens=4)
    assert answer.status_code == 200 and answer.json()["usage"]["prompt_tokens"] == len(expected)
    for alone in ([{"role": "tool", "content": "x"}], [*ask("x"), first]):
        error = post(url, messages=alone).json()["error"]
        assert error["param"] == f"messages[{len(alone) - 1}].tool_call_id"


# What is refused, in the same words by both

ODD = {"type": "object", "properties": {"a": {"not": {}}}}
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "an unknown word": ({"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice", "permitted is 'auto'"),
    "a number": ({"tools": TOOLS, "tool_choice": 3}, "tool_choice", "permitted is 'auto'"),
    "a custom tool": ({"tools": TOOLS, "tool_choice": {"type": "custom", "custom": {"name": "x"}}},
                      "tool_choice", "permitted is 'auto'"),
    "an unknown function": ({"tools": TOOLS, "tool_choice": named("h")}, "tool_choice", "names 'h'"),
    "no name": ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice", "must name a function"),
    "no tools": ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
    "a function without tools": ({"tool_choice": named("f")}, "tool_choice", "there are no tools"),
    "allowed tools without any": ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "mode": "auto"}},
                                  "tool_choice", "needs a mode"),
    "an unsupported schema": ({"tools": [TOOLS[0], tool("odd", ODD)], "tool_choice": "required"},
                              "tools[1].function.parameters", "of 'odd': at properties/a: the keyword 'not'"),
    "a strict one": ({"tools": [tool("odd", ODD, strict=True)]}, "tools[0].function.parameters", "'not'"),
    "not of an object": ({"tools": [tool("s", {"type": "string"})], "tool_choice": named("s")},
                         "tools[0].function.parameters", "must be of an object"),
    "a name": ({"tools": [tool("a b", {})], "tool_choice": "required"}, "tools[0].function.name", "'a b'"),
    "strict of another type": ({"tools": [tool("f", {}, strict="yes")]}, "tools[0].function.strict", "wrong"),
    "a regex with tools": ({"tools": TOOLS, "regex": "a"}, "regex", "can't be combined with tools"),
    "a stop string": ({"tools": TOOLS, "tool_choice": "required", "stop": "x"}, "stop", "can't be combined"),
    "tools of another type": ({"tools": "f"}, "tools", "must be an array"),
    "a tool of another type": ({"tools": [{"type": "x"}]}, "tools[0].type", "'function'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_what_and_where(model: DiffusionModel, url: str, name: str) -> None:
    fields, param, message = REFUSED[name]
    with pytest.raises(OptionError) as caught:
        model.create_chat_completion(ask("x"), max_tokens=60, **fields)
    assert caught.value.param == param and message in str(caught.value)
    answer = post(url, **fields)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param
    assert answer.json()["error"]["message"] == str(caught.value)


def test_too_little_room_for_a_call(url: str) -> None:
    error = post(url, tools=TOOLS, tool_choice="required", max_tokens=3).json()["error"]
    assert error["param"] == "max_tokens" and "tool_choice takes" in error["message"]


def test_a_choice_that_names_a_tool_twice() -> None:
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [named("look-up"), named("look-up")]}
    assert read_tool_choice(choice, TOOLS).names == ("look-up",)


def test_thinking_before_a_forced_call() -> None:
    reasoning = {
        thinking: tool_use(TOOLS, "required", thinking=thinking).constraint["function_calls"]["reasoning"]
        for thinking in (None, False, True)
    }
    assert reasoning == {None: False, False: False, True: True}
