"""Calls that are not well-formed: read where one reading is possible, else kept as text. What models write of
this kind is in the reports that docs/dev/reports.md lists.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pydiffusion.chat.formats.gemma import GEMMA
from pydiffusion.chat.formats.gemma_calls import QUOTE, parse_call
from pydiffusion.chat.formats.gemma_healing import heal_call
from pydiffusion.chat.output_parser import Content, OutputParser, Part, ToolCall


def parse(text: str) -> list[Part]:
    return OutputParser(GEMMA).feed(text, last=True)


def marked(text: str) -> str:
    """A text with ^ for the marker around strings."""
    return text.replace("^", QUOTE)


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ("{dir:^north^steps:90}", {"dir": "north", "steps": 90}),
        ("{steps:90 dir:^north^}", {"steps": 90, "dir": "north"}),
        ("{steps:90,, dir:^north^;}", {"steps": 90, "dir": "north"}),
        ("{a:[^x^ ^y^]}", {"a": ["x", "y"]}),
        ("{steps:90}}", {"steps": 90}),
        ("{steps:90", {"steps": 90}),
        ("{a:[1,2}", {"a": [1, 2]}),
        ("{a:{b:[1,{c:^x^", {"a": {"b": [1, {"c": "x"}]}}),
        ("{a:[1]],b:2}", {"a": [1], "b": 2}),
        ("{a:^x^}\"\"", {"a": "x"}),
        ("{}^^", {}),
        ("{q:weather in Tokyo^}", {"q": "weather in Tokyo"}),
        ("{q:Paris, France^,limit:5}", {"q": "Paris, France", "limit": 5}),
        ("{n:1,q:x^,m:2}", {"n": 1, "q": "x", "m": 2}),
        ("{a:[north^,^south^]}", {"a": ["north", "south"]}),
        ("{dir:^north}", {"dir": "north"}),
        ("{a:{dir:^north}}", {"a": {"dir": "north"}}),
        ("{dir:north x:^a^}", {"dir": "north", "x": "a"}),
        ("{{a:1}}", {"a": 1}),
        ("({\"a\": 1})", {"a": 1}),
        ("{a:'it\\'s',b:'x'}", {"a": "it's", "b": "x"}),
        ("{a:True b:None}}", {"a": True, "b": None}),
        (":{a:1}", {"a": 1}),
        ("", {}),
    ],
)  # fmt: skip
def test_what_is_read(written: str, arguments: dict[str, Any]) -> None:
    text = marked(f"call:walk{written}")
    assert parse_call(text) is None, "it needs no healing"
    assert parse(f"<|tool_call>{text}<tool_call|>") == [ToolCall("walk", arguments)]


def test_an_equals_sign_in_place_of_a_colon() -> None:
    """ollama/ollama#17882; it always was read."""
    assert parse_call("call:f{code:1,save_as='report, 2.docx'}") == (
        "f",
        {"code": 1, "save_as": "report, 2.docx"},
    )


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "f", "arguments": {"a": 1,}}',
        "{'name': 'f', 'arguments': {'a': 1}}",
        '{"name": "f", "arguments": "{\\"a\\": 1}"}',
        '{"name": "f", "parameters": {"a": 1}',
        '{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}',
        '[{"name": "f", "arguments": {"a": 1}}]',
        '```json\n{"name": "f", "arguments": {"a": 1}}\n```',
        "```\ncall:f{a:1}\n```",
        "f{a:1}}",
    ],
)
def test_calls_as_json_and_in_fences(text: str) -> None:
    assert parse(f"<|tool_call>{text}<tool_call|>") == [ToolCall("f", {"a": 1})]


def test_text_around_a_call_is_kept() -> None:
    assert parse("<|tool_call>I look. call:f{a:1} Done.<tool_call|>") == [
        ToolCall("f", {"a": 1}), Content("I look. Done.")
    ]  # fmt: skip


@pytest.mark.parametrize(
    "written",
    [
        "call:f{dir:^north,steps:90}",  # the string may end before the comma or after it
        "call:f{a:^x,b:^y^}",
        "call:f{q:Paris, at:noon^}",
        "call:f{dir:north steps:90 x:^a^}",
        "call:f{code:^main(){}}",
        "call:f{a:1}call:g{b:2}",  # which one?
        "call:f{a:1}{b:2}",
        "call:f{a 1}",
        "call:f{:1}",
        "call:{a:1}",
        '{"arguments": {"a": 1}}',
        '{"name": "no name", "arguments": {"a": 1,}}',
        '{"name": "f", "arguments": "a"}',
        "I can't (it is not allowed).",
        "{}",
        "",
    ],
)
def test_what_stays_text(written: str) -> None:
    text = marked(written)
    said = [part.text for part in parse(f"<|tool_call>{text}<tool_call|>") if isinstance(part, Content)]
    assert "".join(said) == text.replace(QUOTE, '"')


def test_a_call_that_was_cut_short_is_not_completed() -> None:
    """Without its closing marker: ``max_tokens`` may have cut a number in two."""
    assert parse("<|tool_call>call:f{a:1") == [Content("call:f{a:1")]


# Of any kind

_NAMES = st.from_regex(r"[a-z_][a-z0-9_]{0,5}", fullmatch=True)
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8).filter(lambda s: "<" not in s),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_NAMES, inner, max_size=3),
    max_leaves=6,
)
_ARGUMENTS = st.dictionaries(_NAMES, _VALUES, max_size=4)


def written(value: Any) -> str:
    """A value as the model's template writes it."""
    if isinstance(value, str):
        return QUOTE + value + QUOTE
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{written(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(written, value)) + "]"
    return json.dumps(value)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(name=_NAMES, arguments=_ARGUMENTS)
def test_well_formed_calls_are_read_as_they_are(name: str, arguments: dict[str, Any]) -> None:
    text = f"call:{name}{written(arguments)}"
    assert parse(f"<|tool_call>{text}<tool_call|>") == [ToolCall(name, arguments)]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(name=_NAMES, arguments=_ARGUMENTS, data=st.data())
def test_damaged_calls_never_fail_and_never_call_another_function(
    name: str, arguments: dict[str, Any], data: st.DataObject
) -> None:
    head, text = f"call:{name}", written(arguments)
    pieces = st.sampled_from(
        ["", ",", "}", "{", "]", "[", QUOTE, '"', "'", " ", ":", "x", "call:", "```", ")"]
    )
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(1, len(text)))
        end = at + data.draw(st.sampled_from((0, 0, 1, 5)))
        text = text[:at] + data.draw(pieces) + text[end:]
    found = parse(f"<|tool_call>{head}{text}<tool_call|>")
    called = [part for part in found if isinstance(part, ToolCall)]
    assert {call.name for call in called} <= {name} and len(called) <= 1
    for call in called:
        json.dumps(call.arguments, allow_nan=False)
    if not called:
        said = "".join(part.text for part in found if isinstance(part, Content))
        assert said.strip() == f"{head}{text}".replace(QUOTE, '"').strip(), "nothing is lost"


@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=st.text(st.sampled_from(list("ab1:,{}[]()\"'` \n=")) | st.characters(), max_size=30))
def test_any_text(text: str) -> None:
    for each in (text, "call:f{" + text, "call:f{a:" + QUOTE + text, '{"name": "f", "arguments": ' + text):
        healed = heal_call(each)
        assert healed is None or healed.name


@pytest.mark.parametrize(
    "text", ["{a:" * 50000, "[" * 50000, "{a:b,c:" * 20000 + QUOTE, "{a:1" + "," * 50000 + "x"]
)
def test_long_texts_that_are_no_calls(text: str) -> None:
    assert heal_call("call:f" + text) is None
