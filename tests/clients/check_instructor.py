"""instructor: validated objects by tools, its default, and by a schema."""

from __future__ import annotations

import instructor
from checks import MODEL, QUESTION, URL, run
from openai import OpenAI
from pydantic import BaseModel, Field

openai = OpenAI(base_url=URL, api_key="none")


class Person(BaseModel):
    """A person."""

    name: str = Field(description="The whole name")
    age: int = Field(ge=0, le=150)
    tags: list[str] = Field(default_factory=list, max_length=3)


def tools_mode() -> None:
    client = instructor.from_openai(openai)
    assert client.mode == instructor.Mode.TOOLS
    person = client.chat.completions.create(model=MODEL, messages=QUESTION, response_model=Person)
    assert isinstance(person, Person)


def tools_mode_with_the_completion() -> None:
    client = instructor.from_openai(openai)
    person, completion = client.chat.completions.create_with_completion(
        model=MODEL, messages=QUESTION, response_model=Person, max_retries=1
    )
    assert isinstance(person, Person)
    assert completion.usage.completion_tokens > 0


def partial_objects_in_a_stream() -> None:
    completions = instructor.from_openai(openai).chat.completions
    partial = list(completions.create_partial(model=MODEL, messages=QUESTION, response_model=Person))
    Person.model_validate(partial[-1].model_dump())


def json_schema_mode() -> None:
    client = instructor.from_openai(openai, mode=instructor.Mode.JSON_SCHEMA)
    person = client.chat.completions.create(model=MODEL, messages=QUESTION, response_model=Person)
    assert isinstance(person, Person)


run(
    "instructor",
    [tools_mode, tools_mode_with_the_completion, partial_objects_in_a_stream, json_schema_mode],
)
