"""OpenAI's Python client."""

from __future__ import annotations

import asyncio

from checks import MODEL, QUESTION, URL, run
from openai import AsyncOpenAI, OpenAI, pydantic_function_tool
from pydantic import BaseModel

client = OpenAI(base_url=URL, api_key="none")


class Person(BaseModel):
    name: str
    age: int


class Weather(BaseModel):
    city: str
    days: int


TOOLS = [pydantic_function_tool(Person), pydantic_function_tool(Weather)]


def models() -> None:
    assert MODEL in [model.id.removesuffix(".gguf") for model in client.models.list()]


def chat() -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION)
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.completion_tokens > 0


def chat_with_settings_that_programs_send() -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "system", "content": "Be brief."}, *QUESTION],
        temperature=0.7,
        top_p=0.9,
        frequency_penalty=0.1,
        max_tokens=32,
        seed=1,
        user="me",
    )
    assert answer.usage.completion_tokens <= 32


def stream() -> None:
    parts = list(
        client.chat.completions.create(
            model=MODEL, messages=QUESTION, max_tokens=96, stream=True, stream_options={"include_usage": True}
        )
    )
    assert parts[-1].usage.completion_tokens > 0
    assert [part.choices[0].finish_reason for part in parts if part.choices][-1] in ("stop", "length")


def tools() -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, tools=TOOLS, max_tokens=96)
    assert answer.choices[0].finish_reason in ("stop", "length", "tool_calls")


def tool_choice_required() -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, tools=TOOLS, tool_choice="required"
    )
    call = answer.choices[0].message.tool_calls[0].function
    {"Person": Person, "Weather": Weather}[call.name].model_validate_json(call.arguments)
    assert answer.choices[0].finish_reason in ("tool_calls", "stop")


def tool_choice_named() -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        tools=TOOLS,
        tool_choice={"type": "function", "function": {"name": "Weather"}},
    )
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "Weather"
    Weather.model_validate_json(call.function.arguments)


def tool_choice_required_in_a_stream() -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=QUESTION, tools=TOOLS, tool_choice="required"
    ) as events:
        for _ in events:
            pass
        message = events.get_final_completion().choices[0].message
    assert isinstance(message.tool_calls[0].function.parsed_arguments, (Person, Weather))


def parse() -> None:
    answer = client.chat.completions.parse(model=MODEL, messages=QUESTION, response_format=Person)
    assert isinstance(answer.choices[0].message.parsed, Person)


def parse_with_tools() -> None:
    answer = client.chat.completions.parse(
        model=MODEL, messages=QUESTION, response_format=Person, tools=TOOLS, max_tokens=256
    )
    message = answer.choices[0].message
    calls = [call.function.parsed_arguments for call in message.tool_calls or []]
    assert isinstance(message.parsed, Person) or all(isinstance(call, (Person, Weather)) for call in calls)
    assert message.parsed or calls


def parse_in_a_stream() -> None:
    with client.chat.completions.stream(model=MODEL, messages=QUESTION, response_format=Person) as events:
        for _ in events:
            pass
        assert isinstance(events.get_final_completion().choices[0].message.parsed, Person)


def completion() -> None:
    answer = client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=32)
    assert answer.usage.completion_tokens <= 32
    assert isinstance(answer.choices[0].text, str)


def completion_in_a_stream() -> None:
    parts = list(client.completions.create(model=MODEL, prompt="Once", max_tokens=32, stream=True))
    assert parts[-1].choices[0].finish_reason in ("stop", "length")


def asynchronous() -> None:
    async def ask() -> list[int]:
        async with AsyncOpenAI(base_url=URL, api_key="none") as other:
            create = other.chat.completions.create
            questions = [create(model=MODEL, messages=QUESTION, max_tokens=16) for _ in range(2)]
            return [answer.usage.completion_tokens for answer in await asyncio.gather(*questions)]

    assert all(0 < count <= 16 for count in asyncio.run(ask()))


run(
    "openai (Python)",
    [
        *(models, chat, chat_with_settings_that_programs_send, stream, tools),
        *(tool_choice_required, tool_choice_named, tool_choice_required_in_a_stream),
        *(parse, parse_with_tools, parse_in_a_stream, completion, completion_in_a_stream, asynchronous),
    ],
)
