"""JSON schemas, regexes and infilling through the server, on the demo model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from support.server_fakes import ask, events, serving

from pydiffusion import DiffusionModel

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
EMPTY = {"minItems": 2, "maxItems": 1}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from pydiffusion.convert import convert
    from pydiffusion.demo import checkpoint_path

    target = tmp_path_factory.mktemp("served") / "demo.gguf"
    convert(checkpoint_path(), target, "q8_0")
    with serving(DiffusionModel(target, n_threads=1, n_ctx=512)) as (address, _):
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)


def test_a_schema_through_the_official_client(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=ask("json: bob 7"), response_format=FORMAT, seed=1, extra_body={"steps": 4}
    )  # type: ignore[call-overload]
    jsonschema.validate(json.loads(answer.choices[0].message.content), SCHEMA)
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("path", "kind"),
    [("chat/completions", "json_object"), ("completions", "json_object"), ("completions", "json_schema")],
)
def test_a_schema_in_the_form_of_llama_cpp(url: str, path: str, kind: str) -> None:
    """Its server documents ``{"type": "json_object", "schema": ...}``; others send that as json_schema."""
    start = {"messages": ask("json: bob 7")} if path.startswith("chat") else {"prompt": "json: bob 7"}
    body = {**start, "response_format": {"type": kind, "schema": SCHEMA}, "seed": 1, "steps": 4}
    choice = httpx.post(f"{url}/v1/{path}", json=body).json()["choices"][0]
    jsonschema.validate(
        json.loads(choice["message"]["content"] if "message" in choice else choice["text"]), SCHEMA
    )


def test_the_smaller_of_two_token_limits_applies(url: str) -> None:
    body = {"messages": ask("x"), "regex": "[a-z]{40}", "steps": 1}
    for limits in ((7, 100), (100, 7), (7, -1), (-1, 7), (7, None), (None, 7)):
        body |= dict(zip(("max_tokens", "max_completion_tokens"), limits, strict=True))
        answer = httpx.post(url + "/v1/chat/completions", json=body)
        assert answer.status_code == 400 and "leave 7" in answer.text, limits
    del body["regex"]
    answer = httpx.post(url + "/v1/chat/completions", json=body | {"max_tokens": 3}).json()
    assert answer["usage"]["completion_tokens"] <= 3


def test_a_schema_streamed(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="demo", messages=ask("x"), response_format={"type": "json_object"}, seed=2, max_tokens=60,
        stream=True, extra_body={"steps": 3},
    )  # fmt: skip
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert isinstance(json.loads(text), dict)


def test_a_regex(url: str) -> None:
    body = {"prompt": "when: ", "regex": r"\d{4}-\d{2}-\d{2}", "max_tokens": 10, "steps": 3, "n": 2}
    answer = httpx.post(url + "/v1/completions", json=body).json()
    for choice in answer["choices"]:
        assert re.fullmatch(body["regex"], choice["text"]), answer


@pytest.mark.parametrize(
    ("more", "param", "message"),
    [
        ({"response_format": {**FORMAT, "json_schema": {}}}, "response_format", "must be a JSON schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": []}}}},
         "response_format", "at least one value"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": EMPTY}}
          }, "response_format", "nothing satisfies"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}},
         "response_format", "recursive"),
        ({"response_format": FORMAT, "max_tokens": 3}, "max_tokens", "shortest answer"),
        ({"response_format": FORMAT, "enable_thinking": True}, "response_format", "thinking"),
        ({"response_format": FORMAT, "stop": "x"}, "stop", "can't be combined"),
        ({"response_format": 3}, "response_format", "must be an object"),
        ({"response_format": {"type": "text", "schema": SCHEMA}}, "response_format", "schema is not"),
        ({"response_format": {**FORMAT, "schema": SCHEMA}}, "response_format", "exclude each other"),
        ({"response_format": {**FORMAT, "type": "json_object"}}, "response_format", "json_schema is not"),
        ({"response_format": {"type": "json_object", "schema": "x"}}, "response_format",
         "response_format.schema must be a JSON schema"),
        ({"response_format": {"type": "json_object", "schema": {"type": 3}}}, "response_format", "type"),
        ({"response_format": {"type": "json_object", "shema": {}}}, "response_format", "shema is not"),
        ({"max_tokens": 5, "max_completion_tokens": "x"}, "max_completion_tokens", "permitted is an integer"),
        ({"regex": "("}, "regex", "not a valid regular expression"),
        ({"regex": "(a{200}){2000}"}, "regex", "too large"),
        ({"regex": 3}, "regex", "permitted is a string"),
    ],
)  # fmt: skip
def test_impossible_constraints_are_refused_in_one_line(
    url: str, more: dict[str, Any], param: str, message: str
) -> None:
    answer = httpx.post(url + "/v1/chat/completions", json={"messages": ask("x"), **more})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param and message in error["message"], error
    assert "\n" not in error["message"]
    after = httpx.post(url + "/v1/completions", json={"prompt": "a", "max_tokens": 2, "steps": 1})
    assert after.status_code == 200, "the next request works"


def test_without_an_end_the_context_ends_the_text(url: str) -> None:
    """modular/modular#6673: with a limit beyond the context, the finish reason says what happened."""
    body = {"prompt": "sort: b a", "max_tokens": 100_000_000, "ignore_eos": True, "steps": 1, "seed": 1}
    answer = httpx.post(url + "/v1/completions", json=body, timeout=60).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert 400 < answer["usage"]["total_tokens"] <= 512


# Texts with holes


def test_a_suffix_through_the_official_client(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="demo", prompt="red ", suffix=" blue", max_tokens=4, seed=1, echo=True, n=2,
        extra_body={"steps": 3},
    )  # fmt: skip
    for choice in answer.choices:
        assert choice.text.startswith("red ") and choice.finish_reason == "stop"
    assert answer.usage is not None


def test_a_hole_before_a_suffix_ends_before_a_stop_string(url: str) -> None:
    body = {"prompt": "red ", "suffix": " blue", "max_tokens": 12, "seed": 1, "steps": 6}
    whole = httpx.post(url + "/v1/completions", json=body).json()
    text = whole["choices"][0]["text"]

    def n_prompt(**plain: Any) -> int:
        asked = {"max_tokens": 1, "steps": 1, **plain}
        return httpx.post(url + "/v1/completions", json=asked).json()["usage"]["prompt_tokens"]

    held = n_prompt(prompt=" blue", add_special_tokens=False)
    assert whole["usage"]["prompt_tokens"] == n_prompt(prompt="red ") + held
    stop = text[2:4]
    assert text.find(stop) > 0
    for more in ({"stop": stop}, {"stop": [stop, "never in it"], "echo": True}):
        cut = httpx.post(url + "/v1/completions", json={**body, **more}).json()
        head = "red " if "echo" in more else ""
        assert cut["choices"][0]["text"] == head + text.partition(stop)[0]
        assert cut["choices"][0]["finish_reason"] == "stop"
        assert cut["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"]
        assert 0 < cut["usage"]["completion_tokens"] < whole["usage"]["completion_tokens"] <= 12
    stream = {**body, "stop": stop, "stream": True, "stream_options": {"include_usage": True}}
    chunks = events(httpx.post(url + "/v1/completions", json=stream))
    assert "".join(c["choices"][0]["text"] for c in chunks if c["choices"]) == text.partition(stop)[0]
    assert chunks[-1]["usage"] == httpx.post(url + "/v1/completions", json={**body, "stop": stop}).json()[
        "usage"
    ] | {"prompt_tokens_details": chunks[-1]["usage"]["prompt_tokens_details"]}


def test_holes(url: str) -> None:
    text = "def f(x):\n    <|hole|>\n    return <|hole:2|> + y"
    body = {"text": text, "hole_tokens": 5, "seed": 1, "steps": 3}
    (choice,) = httpx.post(url + "/v1/infill", json=body).json()["choices"]
    first, second = choice["holes"]
    assert choice["text"] == text.replace("<|hole|>", first).replace("<|hole:2|>", second)
    stream = httpx.post(
        url + "/v1/infill", json={**body, "stream": True, "stream_options": {"diffusion": True}}
    )
    chunks = events(stream)
    assert [c["choices"][0]["text"] for c in chunks if c["choices"]] == [choice["text"]]
    drafts = [c["diffusion"] for c in chunks if not c["choices"]]
    assert all(draft["type"] == "draft" for draft in drafts) and len(drafts) >= 2
    assert chunks[-1]["diffusion"]["seeds"] == [1]


def test_holes_in_an_answer_to_an_instruction(url: str) -> None:
    body = {"text": "a <|hole:3|> z", "instruction": "copy: a b z", "seed": 1, "steps": 3}
    (choice,) = httpx.post(url + "/v1/infill", json=body).json()["choices"]
    assert choice["text"].startswith("a ") and choice["text"].endswith(" z")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("infill", {}, "text"),
        ("infill", {"text": 3}, "text"),
        ("infill", {"text": "none"}, "text"),
        ("infill", {"text": "a<|hole:0|>"}, "text"),
        ("infill", {"text": "a<|hole|>", "hole_tokens": "many"}, "hole_tokens"),
        ("infill", {"text": "a<|hole|>", "instruction": 3}, "instruction"),
        ("infill", {"text": "a<|hole|>", "max_tokens": 3}, "max_tokens"),
        ("infill", {"text": "a<|hole:900|>"}, None),
        ("infill", {"text": "a<|hole|>", "steps": 0}, "steps"),
        ("completions", {"prompt": "a", "suffix": 3}, "suffix"),
        ("completions", {"prompt": "a", "suffix": "b", "max_tokens": 0}, "max_tokens"),
        ("completions", {"prompt": "a", "suffix": "b", "stop": 3}, "stop"),
        ("completions", {"prompt": "a", "suffix": "b", "stop_token_ids": [1]}, "stop_token_ids"),
        ("completions", {"prompt": "a", "suffix": "b", "max_completion_tokens": 0}, "max_completion_tokens"),
        ("completions", {"prompt": "a", "suffix": "b", "regex": "x"}, "regex"),
    ],
)
def test_holes_that_are_refused(url: str, path: str, body: dict[str, Any], param: str | None) -> None:
    answer = httpx.post(f"{url}/v1/{path}", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param, answer.text


# Grammars, and schemas that are not enforced in full

GRAMMAR = 'root ::= ("yes" | "no") (", " word){1,2}\nword ::= [a-z]{2,5}'
GRAMMAR_TEXT = r"(yes|no)(, [a-z]{2,5}){1,2}"


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
@pytest.mark.parametrize(
    "constraint",
    [
        {"grammar": GRAMMAR},
        {"grammar": GRAMMAR, "response_format": {"type": "text"}, "json_schema": None},
        {"response_format": {"type": "grammar", "grammar": GRAMMAR}},
    ],
)
def test_a_grammar(url: str, path: str, constraint: dict[str, Any]) -> None:
    start = {"messages": ask("is it?")} if path.startswith("chat") else {"prompt": "is it?"}
    answer = httpx.post(
        f"{url}/v1/{path}", json={**start, **constraint, "seed": 1, "steps": 3, "max_tokens": 40}
    )
    choice = answer.json()["choices"][0]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    assert re.fullmatch(GRAMMAR_TEXT, text), text


def test_a_grammar_through_the_official_client(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=ask("x"), seed=1, max_tokens=40, extra_body={"grammar": GRAMMAR, "steps": 3}
    )  # type: ignore[call-overload]
    assert re.fullmatch(GRAMMAR_TEXT, answer.choices[0].message.content)


def test_an_empty_grammar_is_none(url: str) -> None:
    """Clients of llama.cpp send one by default."""
    body = {"messages": ask("x"), "grammar": "", "max_tokens": 3, "steps": 1}
    assert httpx.post(url + "/v1/chat/completions", json=body).status_code == 200


def test_a_schema_as_llama_cpps_own_field(url: str) -> None:
    body = {"prompt": "json: bob 7", "json_schema": SCHEMA, "seed": 1, "steps": 3, "max_tokens": 60}
    answer = httpx.post(url + "/v1/completions", json=body).json()
    jsonschema.validate(json.loads(answer["choices"][0]["text"]), SCHEMA)


@pytest.mark.parametrize(
    ("more", "param", "message"),
    [
        ({"grammar": "root ::= ("}, "grammar", "line 1, column 10: this parenthesis is not closed"),
        ({"grammar": 3}, "grammar", "permitted is a string"),
        ({"grammar": 'root ::= a "x"\na ::= a "y"'}, "grammar", "left-recursive"),
        ({"grammar": GRAMMAR, "regex": "a"}, "grammar", "exclude each other"),
        ({"grammar": GRAMMAR, "response_format": {"type": "json_object"}}, "grammar", "exclude each other"),
        ({"grammar": GRAMMAR, "max_tokens": 3}, "max_tokens", "satisfies grammar takes"),
        ({"response_format": {"type": "grammar"}}, "grammar", "at least one character"),
        ({"json_schema": {"not": {}}}, "response_format", "'not' is not supported"),
    ],
)  # fmt: skip
def test_grammars_that_are_refused(url: str, more: dict[str, Any], param: str, message: str) -> None:
    answer = httpx.post(url + "/v1/chat/completions", json={"messages": ask("x"), **more})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param and message in error["message"], error


def test_what_a_schema_does_not_enforce_is_in_the_response(url: str) -> None:
    tags = {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 3, "uniqueItems": True}
    schema = {"type": "object", "properties": {"tags": tags}, "required": ["tags"]}
    body = {"messages": ask("x"), "max_tokens": 60, "steps": 2, "seed": 1,
            "response_format": {"type": "json_object", "schema": schema}}  # fmt: skip
    answer = httpx.post(url + "/v1/chat/completions", json=body).json()
    assert answer["diffusion"]["unenforced"] == ["uniqueItems at properties/tags"]
    del tags["uniqueItems"]
    assert "unenforced" not in httpx.post(url + "/v1/chat/completions", json=body).json()["diffusion"]
