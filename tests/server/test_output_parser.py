"""Parsing of chat output into thinking, answer and tool calls: whole, and cut at every point."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pydiffusion.chat.formats.gemma import GEMMA
from pydiffusion.chat.formats.gemma_calls import QUOTE, parse_call
from pydiffusion.chat.output_parser import (
    Content,
    OutputParser,
    Part,
    Reasoning,
    ToolCall,
    _merged,
)


def parse(*texts: str, in_thought: bool = False) -> list[Part]:
    parser = OutputParser(GEMMA, in_thought)
    parts = [part for text in texts for part in parser.feed(text)]
    return _merged(parts + parser.feed("", last=True))


CASES: dict[str, tuple[str, list[Part]]] = {
    "plain text": ("Hello, 2 < 3 <b>x</b>", [Content("Hello, 2 < 3 <b>x</b>")]),
    "nothing": ("", []),
    "spaces in front stay": ("  x \n", [Content("  x \n")]),
    "thinking and answer": (
        "<|channel>thought\nLet me see.\n\nYes.\n<channel|>\nIt is.\n",
        [Reasoning("Let me see.\n\nYes."), Content("It is.\n")],
    ),
    "an empty thought": ("<|channel>thought\n<channel|>Hi", [Content("Hi")]),
    "a thought without a line break": ("<|channel>thought<channel|>Hi", [Content("Hi")]),
    "a thought without a name": (
        "<|channel>thoughtful people<channel|>Hi", [Reasoning("thoughtful people"), Content("Hi")]
    ),
    "a thought that never ends": ("<|channel>thought\nand then", [Reasoning("and then")]),
    "only the name": ("<|channel>thought", []),
    "two thoughts": (
        "<|channel>thought\na<channel|><|channel>thought\nb<channel|>c", [Reasoning("a\n\nb"), Content("c")]
    ),
    "the final channel": (
        "<|channel>thought\na<channel|><|channel>final\nb<channel|>", [Reasoning("a"), Content("b")]
    ),
    "think tags at the beginning": ("\n<think>\na\n</think>\n\nb", [Reasoning("a"), Content("b")]),
    "think tags later are text": ("use <think> and </think>", [Content("use <think> and </think>")]),
    "a call": (
        '<|tool_call>call:get_weather{city:<|"|>Oslo<|"|>,days:3}<tool_call|>',
        [ToolCall("get_weather", {"city": "Oslo", "days": 3})],
    ),
    "a thought, two calls, the response's marker": (
        "<|channel>thought\nI'll look.<channel|>\n<|tool_call>call:a{}<tool_call|>\n"
        "<|tool_call>call:b{x:1}<tool_call|><|tool_response>",
        [Reasoning("I'll look."), ToolCall("a", {}), ToolCall("b", {"x": 1})],
    ),
    "text, then a call": ("Wait.<|tool_call>call:a{}<tool_call|>", [Content("Wait."), ToolCall("a", {})]),
    "a call inside a thought ends it": (
        "<|channel>thought\nhm <|tool_call>call:a{}<tool_call|>", [Reasoning("hm"), ToolCall("a", {})]
    ),
    "a call that is not closed": ("<|tool_call>call:a{x:1}", [ToolCall("a", {"x": 1})]),
    "a call that another follows": (
        "<|tool_call>call:a{x:1}<|tool_call>call:b{}<tool_call|>",
        [ToolCall("a", {"x": 1}), ToolCall("b", {})],
    ),
    "a marker inside an argument": (
        '<|tool_call>call:write{text:<|"|>see <|channel>, end<|"|>}<tool_call|>',
        [ToolCall("write", {"text": "see <|channel>, end"})],
    ),
    "a call cut short is text": ('<|tool_call>call:a{x:<|"|>lon', [Content('call:a{x:"lon')]),
    "no call at all is text": ("<|tool_call>sorry<tool_call|>!", [Content("sorry!")]),
    "stray markers vanish": ('a<channel|>b<|"|>c<tool_call|>d<|think|>', [Content("abcd")]),
    "half a marker at the end is text": ("a<|tool_c", [Content("a<|tool_c")]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_output_is_split_into_parts(name: str) -> None:
    text, expected = CASES[name]
    assert parse(text) == expected


@pytest.mark.parametrize("name", CASES)
def test_parts_do_not_depend_on_chunking(name: str) -> None:
    text, expected = CASES[name]
    for cut in range(len(text) + 1):
        assert parse(text[:cut], text[cut:]) == expected, cut
    assert parse(*text) == expected


_PIECES = st.sampled_from(
    [
        *GEMMA.markers,
        "<think>",
        "</think>",
        "thought\n",
        "final\n",
        "call:f{",
        "}",
        "a:1",
        ",",
        "x ",
        "\n",
        "<|",
        "|>",
        "<",
    ]
)


@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(_PIECES, max_size=12), size=st.integers(1, 5), in_thought=st.booleans())
def test_any_text_in_any_chunks(pieces: list[str], size: int, in_thought: bool) -> None:
    text = "".join(pieces)
    whole = parse(text, in_thought=in_thought)
    portions = [text[i : i + size] for i in range(0, len(text), size)]
    assert parse(*portions, in_thought=in_thought) == whole
    for part in whole:
        if not isinstance(part, ToolCall) and "<|<" not in text and "|>" not in text.replace('<|"|>', ""):
            assert not any(marker in part.text for marker in GEMMA.markers)


def test_thinking_opened_by_the_prompt() -> None:
    assert GEMMA.leaves_reasoning_open("<|turn>model\n<|channel>thought\n")
    assert not GEMMA.leaves_reasoning_open("<|turn>model\n<|channel>thought\n<channel|>")
    assert not GEMMA.leaves_reasoning_open("<|turn>model\n")
    assert parse("a<channel|>b", in_thought=True) == [Reasoning("a"), Content("b")]
    assert parse("thought\na<channel|>b", in_thought=True) == [Reasoning("a"), Content("b")]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("{}", {}),
        ("{ }", {}),
        ('{a:<|"|>x, {"y"}: [z<|"|>}', {"a": 'x, {"y"}: [z'}),
        ('{<|"|>a b<|"|>:<|"|><|"|>}', {"a b": ""}),
        ("{a:1,b:-2.5,c:1e3,d:true,e:null}", {"a": 1, "b": -2.5, "c": 1e3, "d": True, "e": None}),
        ("{a:None,b:True}", {"a": None, "b": True}),
        ('{a:[1,[2],{b:<|"|>c<|"|>}],d:{}}', {"a": [1, [2], {"b": "c"}], "d": {}}),
        ("{a:[]}", {"a": []}),
        ('{"a": "b\\n\\"c\\"", "d": 1}', {"a": 'b\n"c"', "d": 1}),
        ("{a: 'b'}", {"a": "b"}),
        ("{a: some words, b:2}", {"a": "some words", "b": 2}),
        ("{a:1e999,b:" + 5000 * "9" + "}", {"a": "1e999", "b": 5000 * "9"}),
        ('(a="b", c=[1])', {"a": "b", "c": [1]}),
        ("{a:1,}", {"a": 1}),
        ("{größe:1}", {"größe": 1}),
    ],
)  # fmt: skip
def test_arguments(arguments: str, expected: dict[str, Any]) -> None:
    assert parse_call("call:f.g-h" + arguments) == ("f.g-h", expected)
    json.dumps(expected, allow_nan=False)


@pytest.mark.parametrize(
    "text",
    [
        "", "call:", "call:f", "call:f{", "call:f{a", "call:f{a:", "call:f{a:1", "call:f{a:1}}",
        "call:f{a 1}",
        'call:f{a:<|"|>x}', "call:f{a:[1,2}", "call:f{:1}", "call:{}", "f", "{}", "[1]",
        '{"name": 3}', "call:f" + 100 * "{a:", "call:f{a:" + 100000 * "[", "{" + 100000 * '"a":{',
    ],
)  # fmt: skip
def test_invalid_calls(text: str) -> None:
    assert parse_call(text) is None


def test_a_call_as_json() -> None:
    assert parse_call('{"name": "f", "arguments": {"a": 1}}') == ("f", {"a": 1})


_NAMES = st.from_regex(r"[a-z_]\w*", fullmatch=True)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text().filter(lambda s: QUOTE not in s),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_NAMES, inner, max_size=3),
        max_leaves=8,
    )
)  # fmt: skip
def test_calls_round_trip(value: Any) -> None:
    def written(value: Any) -> str:
        if isinstance(value, str):
            return QUOTE + value + QUOTE
        if isinstance(value, dict):
            return "{" + ",".join(f"{k}:{written(v)}" for k, v in value.items()) + "}"
        if isinstance(value, list):
            return "[" + ",".join(map(written, value)) + "]"
        return json.dumps(value)

    assert parse_call("call:f{x:" + written(value) + "}") == ("f", {"x": value})
