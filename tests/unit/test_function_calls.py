"""Guaranteed tool calls: random schemas and random distributions against the jsonschema package, markers as
the file types them, what is refused.
"""

from __future__ import annotations

import json
import pickle
import random
from typing import Any

import jsonschema
import numpy as np
import pytest
from support.random_schemas import random_schema
from support.server_fakes import metadata

from pydiffusion import GenerationOptions
from pydiffusion.chat.formats.gemma_calls import QUOTE
from pydiffusion.constrained import Automaton, Guide, automaton_for
from pydiffusion.errors import FunctionError, OptionError
from pydiffusion.events import Content, Part, Reasoning, ToolCall
from pydiffusion.generation.streaming import ChatStream
from pydiffusion.tokenizer import Tokenizer, TokenType

EOS = 1
TURN_END = 5
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}


def tokenizer(**changes: TokenType | None) -> Tokenizer:
    """Of the scripted model. changes: marker -> its type, None to take it out of the vocabulary."""
    fields = metadata()
    for marker, kind in changes.items():
        at = fields["tokenizer.ggml.tokens"].index(marker)
        if kind is None:
            fields["tokenizer.ggml.tokens"][at] = "another"
        else:
            fields["tokenizer.ggml.token_type"][at] = int(kind)
    return Tokenizer(fields)


def calls(*functions: tuple[str, Any], **more: Any) -> GenerationOptions:
    given = [{"name": name, "parameters": parameters} for name, parameters in functions]
    return GenerationOptions(function_calls={"functions": given, **more})


def noise(
    automaton: Automaton, known: Tokenizer, seed: int, *, more: int = 40, ends: float = 0.0, state: int = 0
) -> list[int]:
    """Tokens that the guide chooses when all distributions are noise. ends: added at most to the eos."""
    rng = np.random.default_rng(seed)
    n_canvas, budget = 16, int(automaton.tokens_left[state]) + more
    guide = Guide(automaton, n_canvas, budget, [EOS], known.n_vocab, state)
    written: list[int] = []
    while not guide.finished:
        logits = rng.normal(scale=3, size=(n_canvas, known.n_vocab)).astype(np.float32)
        logits[:, EOS] += ends * rng.random()
        order = np.argsort(-logits, axis=1).astype(np.int32)[:, : guide.n_likeliest]
        path = guide.choose(order, np.take_along_axis(logits, order, 1), logits[:, guide.extra])
        guide.commit()
        canvas = path.tolist()[: budget - len(written)]
        written += canvas[: canvas.index(EOS)] if guide.finished and EOS in canvas else canvas
    assert len(written) <= budget
    return written


def parts(known: Tokenizer, tokens: list[int], in_thought: bool = False) -> list[Part]:
    stream = ChatStream(known, (), in_thought, shielded=True)
    half = len(tokens) // 2
    stream.feed(tokens[:half], last=False)
    found = stream.parts
    stream.feed(tokens[half:], last=True)
    return [*found, *stream.parts]


def validated(schema: Any, arguments: Any) -> None:
    # This draft's format checker: the default one checks times as draft 3 does, without an offset.
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    jsonschema.Draft202012Validator(schema, format_checker=checker).validate(arguments)


KINDS: dict[str, dict[str, TokenType | None]] = {
    "visible markers": {},
    "control markers": dict.fromkeys((QUOTE, "<|tool_call>", "<tool_call|>"), TokenType.CONTROL),
    "no quote": {QUOTE: None},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_random_schemas_and_random_distributions_give_valid_calls_only(kind: str) -> None:
    known, n_made = tokenizer(**KINDS[kind]), 0
    for seed in range(14):
        rng = random.Random(seed)
        schema = random_schema(rng)
        schema = {
            "type": "object",
            "properties": {"a": schema, "bö": random_schema(rng, 1)},
            "required": ["a"],
        }
        try:
            automaton = automaton_for(calls(("first", schema), ("second", PERSON)), known, [EOS])
        except OptionError as error:
            assert "satisf" in str(error) or "too large" in str(error), (schema, error)
            continue
        found = parts(known, noise(automaton, known, seed))
        assert found and all(isinstance(part, ToolCall) for part in found), found
        for part in found:
            assert isinstance(part, ToolCall)
            validated({"first": schema, "second": PERSON}[part.name], part.arguments)
        n_made += 1
    assert n_made > 9


def test_strings_may_spell_markers_out() -> None:
    known = tokenizer()
    spelled = '<tool_call|>,x:<|"|> <|turn>'
    schema = {"type": "object", "properties": {"s": {"const": spelled}}, "required": ["s"]}
    automaton = automaton_for(calls(("f", schema), max_calls=1), known, [EOS])
    tokens = noise(automaton, known, 0)
    assert parts(known, tokens) == [ToolCall("f", {"s": spelled})]
    assert tokens.count(known.token_id(QUOTE)) == 2, "the quotes of the string are markers, others are not"
    # Of any string, no marker token is a part.
    schema = {"type": "object", "properties": {"s": {"type": "string", "minLength": 30}}, "required": ["s"]}
    automaton = automaton_for(calls(("f", schema), max_calls=1), known, [EOS])
    for seed in range(10):
        tokens = noise(automaton, known, seed)
        assert [tokens.count(known.token_id(m)) for m in (QUOTE, "<|tool_call>", "<tool_call|>")] == [2, 1, 1]
        assert not any(known.token_id(m) in tokens for m in ("<|turn>", "<|channel>", "<|think|>"))


@pytest.mark.parametrize("max_calls", [1, None])
def test_the_number_of_calls(max_calls: int | None) -> None:
    known = tokenizer()
    automaton = automaton_for(calls(("f", {}), max_calls=max_calls), known, [EOS])
    seen = {len(parts(known, noise(automaton, known, seed, ends=-300))) for seed in range(20)}
    assert (seen == {1}) if max_calls else (min(seen) >= 1 and len(seen) > 1), seen


def test_calls_or_an_answer_of_a_schema() -> None:
    known = tokenizer()
    answers = ["as long", "a call."]
    automaton = automaton_for(calls(("f", {}), otherwise={"enum": answers}), known, [EOS])
    texts = set()
    for seed in range(40):
        found = parts(known, noise(automaton, known, seed))
        texts.add("".join(part.text for part in found if isinstance(part, Content)))
        assert all(isinstance(part, Content) for part in found) or set(map(type, found)) == {ToolCall}
    assert texts == {"", *map(json.dumps, answers)}


def test_text_with_calls_in_it() -> None:
    """Arguments of a function with a schema satisfy it, those of another one are as the model writes them."""
    known = tokenizer()
    automaton = automaton_for(calls(("f", PERSON), ("g", None), otherwise="text"), known, [EOS])
    for text in ("", "Hello.", 'Hello.<|tool_call>call:f{age:3,name:<|"|>a<|"|>}<tool_call|>!',
                 "<|tool_call>call:g{any:thing[}<tool_call|>"):  # fmt: skip
        assert accepts(automaton, known, text), text
    for text in ("<|tool_call>call:f{age:3}<tool_call|>", "<|tool_call>call:h{}<tool_call|>", "<|channel>"):
        assert not accepts(automaton, known, text), text
    for seed in range(20):
        for part in parts(known, noise(automaton, known, seed)):
            if isinstance(part, ToolCall) and part.name == "f":
                validated(PERSON, part.arguments)


def accepts(automaton: Automaton, known: Tokenizer, text: str) -> bool:
    states = {0}
    for token in known.tokenize(text, add_bos=False, parse_special=True):
        moves = zip(*automaton.moves(token), strict=True)
        states = {int(target) for source, target in moves if source in states}
    return any(automaton.accepting[state] for state in states)


def test_reasoning_before_a_call() -> None:
    known = tokenizer()
    automaton = automaton_for(calls(("f", {}), max_calls=1, reasoning=True), known, [EOS])
    assert accepts(automaton, known, "<|channel>thought\nhm<channel|><|tool_call>call:f{}<tool_call|>")
    assert accepts(automaton, known, "<|tool_call>call:f{}<tool_call|>")
    assert not accepts(automaton, known, "hm<|tool_call>call:f{}<tool_call|>")
    state = automaton.after("<|channel>")  # of a prompt that opened the block
    for seed in range(5):
        found = parts(known, noise(automaton, known, seed, state=state), in_thought=True)
        assert found[-1] == ToolCall("f", {}) and all(isinstance(part, Reasoning) for part in found[:-1])


def test_keys_are_in_the_order_of_the_template() -> None:
    known = tokenizer()
    properties: dict[str, Any] = {name: {"type": "null"} for name in ("b", "C", "a b", "a")}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    automaton = automaton_for(calls(("f", schema), max_calls=1), known, [EOS])
    (found,) = parts(known, noise(automaton, known, 0))
    assert isinstance(found, ToolCall) and list(found.arguments) == ["a", "a b", "b", "C"]


@pytest.mark.parametrize("required", [[], ["n9"], ["n0", "n29"]])
def test_many_optional_properties(required: list[str]) -> None:
    known = tokenizer()
    schema = {"type": "object", "properties": {f"n{i}": {"enum": ["a", "b"]} for i in range(30)},
              "required": required}  # fmt: skip
    automaton = automaton_for(calls(("f", schema), max_calls=1), known, [EOS])
    written = sorted(f"n{i}" for i in range(30))
    for kept in (written, written[::7], ["n9"], []):
        arguments = ",".join(f"{name}:{QUOTE}b{QUOTE}" for name in kept)
        is_valid = set(required) <= set(kept)
        assert accepts(automaton, known, f"<|tool_call>call:f{{{arguments}}}<tool_call|>") == is_valid, kept
    assert not accepts(automaton, known, f"<|tool_call>call:f{{,n9:{QUOTE}b{QUOTE}}}<tool_call|>")


NOTHING = {"type": "object", "properties": {"a": False}, "required": ["a"]}


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"type": "object", "properties": {"a": {"not": {}}}}, "at properties/a: the keyword 'not'"),
        (NOTHING, "at properties/a: nothing satisfies"),
        ({"type": "string"}, "must be of an object"),
        ({"anyOf": [{"type": "object"}, {"type": "null"}]}, "must be of an object"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "array"}}}, "must be of an object"),
        ({"type": "object", "properties": {"a": {"const": "\x07"}}, "required": ["a"]}, "can't hold"),
        ({"type": "object", "properties": {"a": {"const": "\ud800"}}, "required": ["a"]}, "can't hold"),
    ],
)
def test_refused_parameters_name_the_function(parameters: Any, message: str) -> None:
    with pytest.raises(FunctionError, match=message) as caught:
        automaton_for(calls(("fine", {}), ("odd", parameters)), tokenizer(), [EOS])
    assert "'odd'" in str(caught.value) and caught.value.param == "function_calls"
    assert caught.value.index == 1
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value) and again.index == 1


def test_refused_names_and_formats() -> None:
    with pytest.raises(FunctionError, match="name can't be written") as caught:
        automaton_for(calls(("no spaces, please", {})), tokenizer(), [EOS])
    assert caught.value.is_about_name
    plain = Tokenizer(metadata() | {"general.architecture": "another"})
    with pytest.raises(OptionError, match=r"has no tool calls"):
        automaton_for(calls(("f", {})), plain, [EOS])
    with pytest.raises(OptionError, match=r"no token '<\|tool_call>'"):
        automaton_for(calls(("f", {})), tokenizer(**{"<|tool_call>": None}), [EOS])


def test_the_option_is_normalized() -> None:
    short = calls(("f", None))
    full = {"functions": [{"name": "f", "parameters": None}], "max_calls": None, "otherwise": None,
            "reasoning": False}  # fmt: skip
    assert json.loads(str(short.function_calls)) == full
    assert short == GenerationOptions(function_calls=json.dumps(full)) and hash(short) == hash(short)
    assert short.constraint == "function_calls" and short.is_structured and not short.may_reason


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{", "not valid JSON"),
        ([], "give an object"),
        ({}, "functions: give a list"),
        ({"functions": []}, "functions: give a list"),
        ({"functions": ["f"]}, r"functions\[0\]: give an object"),
        ({"functions": [{"name": ""}]}, r"functions\[0\].name"),
        ({"functions": [{"name": "f", "parameters": 3}]}, r"functions\[0\].parameters"),
        ({"functions": [{"name": "f", "strict": True}]}, "'strict' is unknown"),
        ({"functions": [{"name": "f"}], "max_calls": 2}, "max_calls: give 1"),
        ({"functions": [{"name": "f"}], "max_calls": True}, "max_calls: give 1"),
        ({"functions": [{"name": "f"}], "otherwise": "anything"}, "otherwise: give"),
        ({"functions": [{"name": "f"}], "reasoning": 1}, "reasoning: give"),
        ({"functions": [{"name": "f", "parameters": {"a": {1}}}]}, "can't be written as JSON"),
    ],
)
def test_invalid_options_say_where(given: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        GenerationOptions(function_calls=given)
    assert caught.value.param == "function_calls"


def test_with_other_constraints_or_a_stop_string_it_is_refused() -> None:
    for more in ({"json_schema": {}}, {"regex": "a"}, {"stop": "x"}):
        with pytest.raises(OptionError, match=r"exclude each other|can't be combined"):
            GenerationOptions(function_calls={"functions": [{"name": "f"}]}, **more)  # type: ignore[arg-type]
