"""Requests that broke other servers or their clients, from public reports, by OpenAI's client."""

from __future__ import annotations

from checks import MODEL, QUESTION, URL, run
from openai import BadRequestError, OpenAI

client = OpenAI(base_url=URL, api_key="none")
CREATE = client.chat.completions.create
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def tools_and_tool_choice_of_null() -> None:
    """plmbr/notebook-intelligence#55: vLLM refused a tool_choice of null without tools."""
    nothing = {"tools": None, "tool_choice": None, "response_format": None, "stop": None, "functions": None}
    answer = CREATE(model=MODEL, messages=QUESTION, max_tokens=16, extra_body=nothing)
    assert answer.choices[0].finish_reason in ("stop", "length")


def calls_whose_ids_are_null() -> None:
    """sigoden/aichat#1296: llama-server answered 500."""
    call = {"id": None, "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": None, "content": "Rain"},
    ]
    answer = CREATE(model=MODEL, messages=messages, tools=[WEATHER], max_tokens=16)
    assert answer.usage.completion_tokens > 0


def a_prompt_that_is_too_long_in_a_stream() -> None:
    """ggml-org/llama.cpp#14566: status 200, and the error in a chunk."""
    messages = [{"role": "user", "content": "Hello there. " * 20000}]
    try:
        CREATE(model=MODEL, messages=messages, stream=True)
    except BadRequestError as error:
        assert error.code == "context_length_exceeded"
    else:
        raise AssertionError("accepted")


def no_chunk_without_choices_unless_usage_is_asked_for() -> None:
    """BerriAI/litellm#30870, osaurus-ai/osaurus#1661: clients read choices[0] of every chunk."""
    parts = list(CREATE(model=MODEL, messages=QUESTION, max_tokens=64, stream=True))
    assert [len(part.choices) for part in parts] == [1] * len(parts)
    assert [part.choices[0].finish_reason for part in parts].count(None) == len(parts) - 1


def choices_of_a_stream_have_their_index() -> None:
    """BerriAI/litellm#3276: chunks of n=2 with wrong indices."""
    ends: dict[int, list[str]] = {0: [], 1: []}
    for part in CREATE(model=MODEL, messages=QUESTION, n=2, max_tokens=32, stream=True):
        for choice in part.choices:
            ends[choice.index] += [choice.finish_reason] if choice.finish_reason else []
    assert [len(reasons) for reasons in ends.values()] == [1, 1]


def calls_of_a_stream_have_index_id_and_name() -> None:
    """ollama/ollama#7881, vercel/ai#7238, vllm-project/vllm#13078: no index, no id, arguments of text."""
    calls = [
        call
        for part in CREATE(
            model=MODEL, messages=QUESTION, tools=[WEATHER], tool_choice="required", stream=True
        )
        for choice in part.choices
        for call in choice.delta.tool_calls or []
    ]
    assert calls
    named: dict[int, str] = {}
    for call in calls:
        if call.index not in named:
            assert call.id and call.type == "function" and call.function.name == "weather"
            named[call.index] = call.id
        assert call.id in (None, named[call.index])
    assert len(set(named.values())) == len(named)


def parallel_tool_calls_without_tools() -> None:
    """langchain-ai/langchain#25357: an unknown parameter for some models."""
    answer = CREATE(model=MODEL, messages=QUESTION, max_tokens=16, extra_body={"parallel_tool_calls": False})
    assert answer.usage.completion_tokens > 0


def an_empty_list_of_tools() -> None:
    """evalstate/fast-agent#781: vLLM refuses what an agent without tools sends."""
    answer = CREATE(model=MODEL, messages=QUESTION, max_tokens=16, tools=[])
    assert answer.usage.completion_tokens > 0


def a_message_has_all_fields() -> None:
    """mlcommons/endpoints#133: a strict reader missed `refusal`."""
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=QUESTION, max_tokens=16)
    message = raw.http_response.json()["choices"][0]["message"]
    assert {"role", "content", "refusal"} <= set(message)


run(
    "reports",
    [
        *(tools_and_tool_choice_of_null, calls_whose_ids_are_null, a_prompt_that_is_too_long_in_a_stream),
        *(no_chunk_without_choices_unless_usage_is_asked_for, choices_of_a_stream_have_their_index),
        *(calls_of_a_stream_have_index_id_and_name, parallel_tool_calls_without_tools),
        *(an_empty_list_of_tools, a_message_has_all_fields),
    ],
)
