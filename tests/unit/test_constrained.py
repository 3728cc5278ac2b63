"""Constrained output: the automaton against Python's `re`, the search against brute force, schemas against
the jsonschema package.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.automata import accepts, write
from support.random_schemas import random_schema
from support.server_fakes import metadata

from pydiffusion import DiffusionModel, GenerationOptions
from pydiffusion.chat.formats.chat_format import PLAIN
from pydiffusion.constrained import Automaton, Guide, expression_of
from pydiffusion.constrained.byte_dfa import byte_dfa
from pydiffusion.constrained.regex import from_regex
from pydiffusion.tokenizer import Tokenizer

PATTERNS = (
    "", "a", "abc|a|", "(?:ab)*", "a{2,4}b?", "[^a]", "[a-z]+[0-9]{2}", r"\d+\.\d*", r"\w+@\w+", "é[ß-ü]?",
    "[^\u0080-\uffff]", "\U0001f600+", ".", r"\s\S", "(a|b(c|d){2})+", r"[^\d\s]", "a*?b", "x{0,3}y{2}",
    r"\W", "[\u0700-\u2fff]", "^ab$", "^a$|^b+$", r"\n\"\\",
)  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_automaton_matches_what_python_matches(pattern: str, data: st.DataObject) -> None:
    expression = from_regex(pattern).text
    machine = byte_dfa(expression)
    text = data.draw(
        st.one_of(
            st.from_regex(f"(?:{pattern})", fullmatch=True),
            st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
        )
    )
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    assert accepts(machine, text) == bool(re.fullmatch(expression, text))
    if accepts(machine, text):
        assert re.fullmatch(pattern, text), "the pattern may be narrowed, never widened"
    elif text.isascii() and text.isprintable():
        assert not re.fullmatch(pattern, text), "printable ASCII is never narrowed"


def test_characters_of_every_utf8_length() -> None:
    machine = byte_dfa(from_regex("[\u07ff-\u0800\u3456-\U00010001\U0010ffff]").text)
    for code in (0x7FE, 0x7FF, 0x800, 0x801, 0x3455, 0x3456, 0xD7FF, 0xE000, 0xFFFF, 0x10000, 0x10001,
                 0x10002, 0x10FFFE, 0x10FFFF):  # fmt: skip
        inside = code in (0x7FF, 0x800, 0x10FFFF) or 0x3456 <= code <= 0x10001
        assert accepts(machine, chr(code)) == inside, hex(code)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(a", "missing \\)"),
        ("b(?=a)", "with a look-around inside"),
        ("(?<=a)b", "with a look-around inside"),
        (r"(a)\1", "with a back-reference"),
        (r"\bx", "with an anchor inside"),
        ("(?i:a)", "with flags"),
        ("(a{300}){300}", "too large"),
        ("a^b", "with an anchor inside"),
        (r"[^\s\S]", "no character"),
    ],
)
def test_regexes_that_are_refused(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        byte_dfa(from_regex(pattern).text)


# The search


def small_tokenizer() -> Tokenizer:
    return Tokenizer(metadata())


class Small:
    """A vocabulary of a few tokens, as the automaton sees it."""

    def __init__(self, *tokens: str) -> None:
        self.tokens = tokens

    chat_format = PLAIN

    def piece(self, token: int) -> str | None:
        return self.tokens[token] or None

    def token_id(self, token: str) -> int | None:
        return None

    def tokenize(self, text: str, add_bos: bool = False) -> list[int]:
        return [self.tokens.index(c) for c in text if c in self.tokens] if len(text) > 0 else []


@pytest.mark.parametrize("pattern", ["a(ba)*", "(ab|b)+c", "a?b?c?", "[abc]{3}"])
@pytest.mark.parametrize("budget", [3, 4, 6, 9])
def test_the_chosen_canvas_is_the_best_permitted_one(pattern: str, budget: int) -> None:
    n_canvas, eos = 4, 0
    vocabulary = Small("", "a", "b", "c", "ab", "ba")
    automaton = Automaton(from_regex(pattern).text, vocabulary)  # type: ignore[arg-type]
    rng = np.random.default_rng(budget)
    for _ in range(6):
        guide = Guide(automaton, n_canvas, budget, [eos], len(vocabulary.tokens))
        logits = rng.normal(size=(n_canvas, len(vocabulary.tokens))).astype(np.float32)
        order = np.argsort(-logits, axis=1).astype(np.int32)[:, : guide.n_likeliest]
        path = guide.choose(order, np.take_along_axis(logits, order, 1), logits[:, guide.extra])
        scores = {
            canvas: sum(logits[i, token] for i, token in enumerate(canvas))
            for canvas in itertools.product(range(len(vocabulary.tokens)), repeat=n_canvas)
            if permitted(canvas, pattern, vocabulary, automaton, min(budget, n_canvas), budget)
        }
        assert tuple(path) in scores
        assert scores[tuple(path.tolist())] == pytest.approx(max(scores.values()))


def permitted(
    canvas: tuple[int, ...], pattern: str, vocabulary: Small, automaton: Automaton, n_text: int, budget: int
) -> bool:
    end = canvas.index(0) if 0 in canvas else len(canvas)
    if end < n_text:
        return bool(re.fullmatch(pattern, "".join(vocabulary.tokens[t] for t in canvas[:end])))
    text = "".join(vocabulary.tokens[t] for t in canvas[:n_text])
    if budget <= len(canvas):
        return bool(re.fullmatch(pattern, text))
    rest = ["".join(p) for n in range(budget - n_text + 1) for p in itertools.product("abc", repeat=n)]
    return any(re.fullmatch(pattern, text + more) for more in rest)


# Schemas


def test_random_schemas_and_random_distributions_give_valid_answers_only() -> None:
    answer_random_schemas(150)


@pytest.mark.slow
def test_many_random_schemas_and_random_distributions() -> None:
    answer_random_schemas(1000, first=1000)


def answer_random_schemas(n: int, first: int = 0) -> None:
    tokenizer = small_tokenizer()
    n_made = 0
    for seed in range(first, first + n):
        rng = random.Random(seed)
        schema = random_schema(rng)
        try:
            automaton = Automaton(expression_of(GenerationOptions(json_schema=schema)), tokenizer)
        except ValueError as error:
            assert "satisf" in str(error) or "too large" in str(error), (schema, error)
            continue
        n_canvas = rng.choice([8, 32])
        budget = int(automaton.tokens_left[0]) + rng.choice([0, 5, 60])
        text = write(automaton, tokenizer, n_canvas, budget, np.random.default_rng(seed))
        # This draft's format checker: the default one checks times as draft 3 does, without an offset.
        checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
        jsonschema.Draft202012Validator(schema, format_checker=checker).validate(json.loads(text))
        n_made += 1
    assert n_made > 0.8 * n


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength.*nothing satisfies"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "nothing satisfies"),
        ({"enum": []}, "enum"),
        ({"enum": ["a"], "type": "integer"}, "nothing satisfies"),
        (False, "nothing satisfies"),
        ({"properties": {"a": False}, "required": ["a"]}, "properties/a: nothing"),
        ({"required": ["a"], "properties": {}, "additionalProperties": False}, "'a' is required"),
        ({"not": {}}, "'not' is not supported"),
        ({"contains": {"const": 1}}, "'contains' is not supported"),
        ({"type": "array", "uniqueItems": True, "items": {"enum": [1, 1.0]}, "minItems": 2}, "1 values"),
        ({"type": "number", "multipleOf": 0}, "above 0"),
        ({"type": "integer", "multipleOf": 99991}, "remainders"),
        ({"type": "string", "maxlength": 3}, "'maxlength' is not known; is 'maxLength' meant"),
        ({"type": "string", "pattern": "b(?=a)"}, "not supported"),
        ({"type": "string", "pattern": "a{30000}"}, "too large"),
        ({"type": "string", "minLength": 10**9}, "too large"),
        ({"$ref": "#"}, "recursive"),
        ({"properties": {"next": {"$ref": "#"}}, "required": ["next"]}, "recursive"),
        ({"$ref": "http://other"}, "only those within"),
        ({"$ref": "#/nowhere"}, "does not resolve"),
        ({"type": "strin"}, "the type 'strin'"),
        ({"type": 3}, "type"),
        ({"anyOf": []}, "anyOf"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "overlap"),
        ({"allOf": [{"type": "string"}, {"type": "null"}]}, "exclude each other"),
        ({"allOf": [{"prefixItems": [{}]}, {"prefixItems": [{}, {}]}]}, "prefixItems.*allOf"),
        ({"properties": 3}, "properties"),
        ({"type": "integer", "minimum": "x"}, "minimum"),
        ({"pattern": 3}, "pattern"),
        ({"format": 3}, "'format' must be a string"),
        ({"type": "array", "items": [3]}, "items"),
    ],
)  # fmt: skip
def test_refused_schemas_say_where_and_why(schema: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Automaton(expression_of(GenerationOptions(json_schema=schema)), small_tokenizer())
    assert str(caught.value).startswith("json_schema")


SCARCE = {"type": "number", "minimum": 2, "maximum": 1}  # which nothing satisfies


@pytest.mark.parametrize(
    ("schema", "valid"),
    [
        ({"type": ["integer", "null"], "minimum": 0.1, "maximum": 0.9}, "null"),
        ({"type": ["integer", "number"], "minimum": 0.5, "maximum": 0.7}, "0.6"),
        ({"anyOf": [SCARCE, {"type": "boolean"}]}, "true"),
        ({"properties": {"a": SCARCE, "b": {"type": "null"}}, "additionalProperties": False}, '{"b": null}'),
        ({"type": "array", "items": SCARCE}, "[]"),
        ({"type": "array", "items": False}, "[]"),
        ({"type": "object", "additionalProperties": SCARCE}, "{}"),
    ],
)
def test_unsatisfiable_parts_are_left_out(schema: Any, valid: str) -> None:
    jsonschema.validate(json.loads(valid), schema)
    assert accepts(byte_dfa(expression_of(GenerationOptions(json_schema=schema))), valid)


TREE = {
    "$defs": {"node": {"type": "object", "properties": {
        "name": {"type": "string"}, "children": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
        "required": ["name"], "additionalProperties": False}},
    "$ref": "#/$defs/node",
}  # fmt: skip
CHAIN = {
    "type": "object",
    "properties": {"value": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
    "required": ["value", "next"],
}


def test_recursive_schemas_are_expanded() -> None:
    tree = byte_dfa(expression_of(GenerationOptions(json_schema=TREE)))
    assert accepts(tree, '{"name": "a"}')
    assert accepts(tree, '{"name": "a", "children": []}')
    nested = '{"name": "a", "children": [{"name": "b", "children": [{"name": "c"}]}, {"name": "d"}]}'
    assert accepts(tree, nested)
    assert not accepts(tree, '{"name": "a", "children": [{"children": []}]}')
    chain = byte_dfa(expression_of(GenerationOptions(json_schema=CHAIN)))
    text = "null"
    for i in range(7):
        text = f'{{"value": {i}, "next": {text}}}'
        assert accepts(chain, text)
    assert not accepts(chain, f'{{"value": 7, "next": {text}}}')  # valid, but too deep
    assert not accepts(chain, '{"value": 1, "next": {"value": 2}}')
    arrays = {"$defs": {"n": {"items": {"$ref": "#/$defs/n"}}}, "$ref": "#/$defs/n"}
    assert accepts(byte_dfa(expression_of(GenerationOptions(json_schema=arrays))), "[[], [[]]]")


@pytest.mark.parametrize("schema", [TREE, CHAIN])
def test_random_distributions_give_valid_texts_of_recursive_schemas(schema: Any) -> None:
    tokenizer = small_tokenizer()
    automaton = Automaton(expression_of(GenerationOptions(json_schema=schema)), tokenizer)
    for seed in range(20):
        text = write(automaton, tokenizer, 32, 40 + 20 * seed, np.random.default_rng(seed))
        jsonschema.validate(json.loads(text), schema)


def test_schemas_of_pydantic() -> None:
    """Models with references, optional fields and a union told apart by a constant."""
    schema = {
        "$defs": {
            "Cat": {"properties": {"kind": {"const": "cat"},
                                   "lives": {"type": "integer", "minimum": 0, "maximum": 9}},
                    "required": ["kind", "lives"], "title": "Cat", "type": "object"},
            "Dog": {"properties": {"kind": {"const": "dog"}, "good": {"default": True, "type": "boolean"}},
                    "required": ["kind"], "title": "Dog", "type": "object"},
        },
        "properties": {
            "pet": {"oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}]},
            "note": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None, "title": "Note"},
        },
        "required": ["pet"],
        "title": "Owner",
        "type": "object",
    }  # fmt: skip
    machine = byte_dfa(expression_of(GenerationOptions(json_schema=schema)))
    assert accepts(machine, '{"pet": {"kind": "cat", "lives": 9}, "note": null}')
    assert accepts(machine, '{"pet":{"kind":"dog"}}')
    assert not accepts(machine, '{"pet": {"kind": "cat", "good": true}}')
    assert not accepts(machine, '{"pet": {"kind": "cat", "lives": 10}}')


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    low=st.integers(-2000, 2000), width=st.integers(0, 3000), value=st.integers(-6000, 6000),
    out=st.booleans(),
)  # fmt: skip
def test_integers_within_bounds_and_no_others(low: int, width: int, value: int, out: bool) -> None:
    bounds = {"minimum": low, "exclusiveMaximum" if out else "maximum": low + width + out}
    machine = byte_dfa(expression_of(GenerationOptions(json_schema={"type": "integer", **bounds})))
    for number in (value, low, low - 1, low + width, low + width + 1):
        assert accepts(machine, str(number)) == (low <= number <= low + width), number


# With a model


@pytest.fixture(scope="module")
def model(gguf_file: Callable[..., Path]) -> DiffusionModel:
    from pydiffusion.convert import convert
    from pydiffusion.demo import checkpoint_path

    target = gguf_file("small").parent / "demo.gguf"
    convert(checkpoint_path(), target, "q8_0")
    return DiffusionModel(target, n_threads=1, n_ctx=512)


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "colours": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_a_schema_over_several_canvases_is_reproducible(model: DiffusionModel) -> None:
    long = {"type": "array", "items": SCHEMA, "minItems": 10, "maxItems": 10}
    answers = [
        model.generate("ten", json_schema=long, seed=seed, steps=4, max_tokens=440) for seed in (1, 1, 2)
    ]
    for answer in answers:
        jsonschema.validate(json.loads(answer.text), long)
        assert answer.finish_reason == "eos"
    assert answers[0].text == answers[1].text
    assert len(answers[0].canvas_steps) > 1


def test_a_regex_within_the_fewest_tokens(model: DiffusionModel) -> None:
    for n in (1, 3, 9):
        done = model.generate("x", regex=f"(ab|cd){{{n}}}", max_tokens=2 * n, seed=n, steps=4)
        assert re.fullmatch(f"(ab|cd){{{n}}}", done.text) and done.finish_reason == "eos"
    with pytest.raises(ValueError, match=r"takes .* tokens"):
        model.generate("x", regex="q{60}", max_tokens=20)


def test_end_tokens_that_are_text_do_not_cut_the_answer(model: DiffusionModel) -> None:
    """An end token that is visible text, of the options or of the file, would cut the text around it."""
    (letter,) = model.tokenize("a", add_bos=False)
    (quote,) = model.tokenize('"', add_bos=False)
    for seed in range(4):
        answer = model.generate("x", regex="(ba){4}", eos=[letter, 1], seed=seed, steps=3, max_tokens=64)
        assert answer.text == "babababa" and letter not in answer.tokens.tolist()
        schema = {"type": "string", "minLength": 2, "maxLength": 3}
        answer = model.generate("x", json_schema=schema, eos=[quote, 1], seed=seed, steps=3, max_tokens=64)
        jsonschema.validate(json.loads(answer.text), schema)


def test_a_constrained_chat_is_all_content(model: DiffusionModel) -> None:
    answer = model.create_chat_completion(
        messages=[{"role": "user", "content": "json"}], json_schema=SCHEMA, seed=1, max_tokens=96
    )
    message = answer["choices"][0]["message"]
    jsonschema.validate(json.loads(message["content"]), SCHEMA)
    assert set(message) == {"role", "content"} and answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("response_format", "schema"),
    [
        ({"type": "json_object", "schema": SCHEMA}, SCHEMA),
        ({"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}, SCHEMA),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_object", "schema": {}}, {"type": "object"}),  # as llama.cpp reads it
    ],
)
def test_a_chat_by_response_format(
    model: DiffusionModel, response_format: dict[str, Any], schema: dict[str, Any]
) -> None:
    answer = model.create_chat_completion(
        [{"role": "user", "content": "json"}], response_format=response_format, seed=1, max_tokens=96
    )
    jsonschema.validate(json.loads(answer["choices"][0]["message"]["content"]), schema)


def test_response_formats_that_are_refused(model: DiffusionModel) -> None:
    chat = model.create_chat_completion
    for response_format, message in (
        ({"type": "text", "schema": SCHEMA}, "response_format.schema is not permitted with type text"),
        ({"type": "json_object", "schema": 3}, "response_format.schema must be a JSON schema"),
        ({"schema": SCHEMA}, "response_format must be an object whose type is"),
    ):
        with pytest.raises(ValueError, match=message):
            chat([{"role": "user", "content": "x"}], response_format=response_format)
    with pytest.raises(ValueError, match="response_format and json_schema exclude each other"):
        chat([{"role": "user", "content": "x"}], response_format={"type": "json_object"}, json_schema=SCHEMA)


def test_the_smaller_of_a_chats_two_token_limits_applies(model: DiffusionModel) -> None:
    for limits in ((3, 50), (50, 3), (3, -1), (None, 3)):
        answer = model.create_chat_completion(
            [{"role": "user", "content": "json"}],
            max_tokens=limits[0],
            max_completion_tokens=limits[1],
            steps=2,
            eos=(),
        )
        assert answer["usage"]["completion_tokens"] == 3, limits
    with pytest.raises(ValueError, match="max_completion_tokens is 0"):
        model.create_chat_completion([{"role": "user", "content": "x"}], max_completion_tokens=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"json_schema": SCHEMA, "regex": "a"}, "exclude each other"),
        ({"json_schema": SCHEMA, "stop": "x"}, "stop can't be combined"),
        ({"regex": "a", "canvas": [1]}, "canvas can't be combined"),
        ({"json_schema": "{"}, "not valid JSON"),
        ({"json_schema": SimpleNamespace(model_json_schema=dict)}, r"\.model_json_schema\(\)"),
        ({"regex": r"a\bc"}, "an anchor inside"),
        ({"json_schema": 3}, "json_schema is 3"),
        ({"regex": ""}, "regex is ''"),
        ({"regex": "a", "eos": ()}, "needs an eos"),
    ],
)
def test_options_that_do_not_go_together(
    model: DiffusionModel, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate("x", **options)
