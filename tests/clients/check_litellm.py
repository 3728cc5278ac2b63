"""litellm, as a proxy or an agent calls it."""

from __future__ import annotations

import json

import litellm
from checks import MODEL, QUESTION, URL, run
from pydantic import BaseModel

WHERE = {"model": f"openai/{MODEL}", "api_base": URL, "api_key": "none"}


class Person(BaseModel):
    name: str
    age: int


TOOLS = [
    {
        "type": "function",
        "function": {"name": "person", "description": "A person", "parameters": Person.model_json_schema()},
    }
]


def chat() -> None:
    answer = litellm.completion(**WHERE, messages=QUESTION, max_tokens=32, temperature=0)
    assert answer.usage.completion_tokens > 0


def stream() -> None:
    parts = list(
        litellm.completion(
            **WHERE, messages=QUESTION, max_tokens=64, stream=True, stream_options={"include_usage": True}
        )
    )
    assert parts[-1].usage.completion_tokens > 0


def tool_choice_required() -> None:
    answer = litellm.completion(**WHERE, messages=QUESTION, tools=TOOLS, tool_choice="required")
    Person.model_validate_json(answer.choices[0].message.tool_calls[0].function.arguments)


def response_format() -> None:
    answer = litellm.completion(**WHERE, messages=QUESTION, response_format=Person)
    Person.model_validate(json.loads(answer.choices[0].message.content))


def text_completion() -> None:
    answer = litellm.text_completion(
        model=f"text-completion-openai/{MODEL}", api_base=URL, api_key="none", prompt="Once", max_tokens=32
    )
    assert answer.usage.completion_tokens > 0


run("litellm", [chat, stream, tool_choice_required, response_format, text_completion])
