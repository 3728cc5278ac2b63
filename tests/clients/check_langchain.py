"""langchain-openai: structured output by function calling and by a schema."""

from __future__ import annotations

from checks import MODEL, URL, run
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

model = ChatOpenAI(model=MODEL, base_url=URL, api_key="none")


class Person(BaseModel):
    """A person."""

    name: str
    age: int


@tool
def weather(city: str, days: int) -> str:
    """The weather in a city."""
    return f"{city}: {days} days of rain"


def chat() -> None:
    answer = model.bind(max_tokens=32).invoke([SystemMessage("Be brief."), HumanMessage("Hello")])
    assert answer.usage_metadata["output_tokens"] > 0


def stream() -> None:
    parts = list(model.bind(max_tokens=64).stream("Hello"))
    assert parts[-1].chunk_position == "last"
    assert "finish_reason" in set().union(*(part.response_metadata for part in parts))


def stream_with_usage() -> None:
    counting = ChatOpenAI(model=MODEL, base_url=URL, api_key="none", stream_usage=True, max_tokens=64)
    usage = [part.usage_metadata for part in counting.stream("Hello") if part.usage_metadata]
    assert 0 < sum(counts["output_tokens"] for counts in usage) <= 64


def structured_output() -> None:
    assert isinstance(model.with_structured_output(Person).invoke("Who was Ada Lovelace?"), Person)


def function_calling() -> None:
    structured = model.with_structured_output(Person, method="function_calling")
    assert isinstance(structured.invoke("Who was Ada Lovelace?"), Person)


def function_calling_strict() -> None:
    structured = model.with_structured_output(Person, method="function_calling", strict=True)
    assert isinstance(structured.invoke("Who was Ada Lovelace?"), Person)


def json_schema() -> None:
    structured = model.with_structured_output(Person, method="json_schema")
    assert isinstance(structured.invoke("Who was Ada Lovelace?"), Person)


def json_mode() -> None:
    structured = model.with_structured_output(Person.model_json_schema(), method="json_mode")
    assert isinstance(structured.invoke("Who was Ada Lovelace? Answer in JSON."), (dict, list))


def tools_and_their_results() -> None:
    bound = model.bind_tools([weather], tool_choice="any")
    asked = HumanMessage("How is the weather in Oslo?")
    answer = bound.invoke([asked])
    calls = answer.tool_calls
    results = [ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"]) for call in calls]
    assert results
    assert model.bind(max_tokens=32).invoke([asked, answer, *results]).usage_metadata["output_tokens"] > 0


run(
    "langchain-openai",
    [
        *(chat, stream, stream_with_usage, structured_output, function_calling, function_calling_strict),
        *(json_schema, json_mode, tools_and_their_results),
    ],
)
