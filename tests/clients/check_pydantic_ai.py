"""pydantic-ai: agents with a type of output."""

from __future__ import annotations

import asyncio

from checks import MODEL, URL, run
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=URL, api_key="none"))


class Person(BaseModel):
    name: str
    age: int


def text() -> None:
    result = Agent(model, instructions="Be brief.").run_sync("Hello", model_settings={"max_tokens": 32})
    assert result.usage.output_tokens > 0


def output_type() -> None:
    result = Agent(model, output_type=Person).run_sync("Who was Ada Lovelace?")
    assert isinstance(result.output, Person)


def output_of_two_types() -> None:
    result = Agent(model, output_type=[Person, bool]).run_sync("Who was Ada Lovelace?")
    assert isinstance(result.output, (Person, bool))


def native_output() -> None:
    result = Agent(model, output_type=NativeOutput(Person)).run_sync("Who was Ada Lovelace?")
    assert isinstance(result.output, Person)


def output_type_in_a_stream() -> None:
    async def ask() -> object:
        async with Agent(model, output_type=Person).run_stream("Who was Ada Lovelace?") as result:
            return await result.get_output()

    assert isinstance(asyncio.run(ask()), Person)


run("pydantic-ai", [text, output_type, output_of_two_types, native_output, output_type_in_a_stream])
