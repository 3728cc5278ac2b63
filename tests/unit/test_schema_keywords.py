"""Keywords of JSON schema against the jsonschema package and pydantic: what real programs send."""

from __future__ import annotations

import base64
import datetime
import enum
import ipaddress
import json
import random
import re
import uuid
import warnings
from decimal import Decimal
from typing import Annotated, Any, Literal, Optional, Union

import jsonschema
import numpy as np
import pydantic
import pytest
from support.automata import accepts, random_text, write
from support.server_fakes import ScriptedModel, metadata

from pydiffusion import GenerationOptions, PyDiffusionWarning
from pydiffusion.constrained import Automaton, automaton_for, expression_of, unenforced_by
from pydiffusion.constrained.byte_dfa import ByteDfa, byte_dfa
from pydiffusion.constrained.formats import FORMATS
from pydiffusion.constrained.multiples import condition
from pydiffusion.constrained.number_ranges import number_between
from pydiffusion.constrained.regex import JSON_CHARACTER, Piece, from_regex, in_json_string
from pydiffusion.tokenizer import Tokenizer

TOKENIZER = Tokenizer(metadata())


def machine_of(schema: Any) -> ByteDfa:
    return byte_dfa(expression_of(GenerationOptions(json_schema=schema)))


def texts_of(schema: Any, n: int = 4, more: int = 40) -> list[str]:
    """What the guide writes from noise, with little room and more."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyDiffusionWarning)
        automaton = automaton_for(GenerationOptions(json_schema=schema), TOKENIZER, [1])
    least = int(automaton.tokens_left[0])
    return [
        write(automaton, TOKENIZER, 32, least + more * seed, np.random.default_rng(seed)) for seed in range(n)
    ]


def check(text: str, schema: Any) -> None:
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    jsonschema.Draft202012Validator(schema, format_checker=checker).validate(json.loads(text))


def as_of_2020(schema: Any) -> Any:
    """Arrays of schemas in ``items`` are ``prefixItems`` since then."""
    return json.loads(json.dumps(schema).replace('"items": [', '"prefixItems": ['))


# Keywords, one at a time: schema, values that it must permit, values that it must not


@pytest.mark.parametrize(
    ("schema", "permitted", "refused"),
    [
        ({"enum": ["a", "b", "c"], "x-order": 1, "unit": "cm"}, ["a"], ["d"]),
        ({"type": "string", "nullable": True}, [None, "x"], [1]),
        ({"type": "string", "enum": ["a"], "nullable": True}, [None, "a"], ["b"]),
        ({"type": "string", "format": "binary", "title": "x", "example": "y"}, ["", "x"], [1]),
        ({"type": "integer", "format": "int32"}, [7], ["7"]),
        # arrays without equal items
        ({"items": {"enum": ["a", "b", "c"]}, "uniqueItems": True},
         [[], ["c"], ["b", "a"], ["c", "a", "b"]], [["a", "a"], ["a", "b", "a"], ["d"]]),
        ({"items": {"enum": [1, 2, 3]}, "uniqueItems": True, "minItems": 2, "maxItems": 2},
         [[3, 1], [1, 2]], [[1], [1, 1], [1, 2, 3]]),
        ({"items": {"enum": list("abcdef")}, "uniqueItems": True},
         [[], ["a", "f"], list("abcdef"), ["c"]], [["a", "a"], ["b", "b", "c"]]),
        ({"items": {"enum": list("abcdef")}, "uniqueItems": True, "minItems": 2, "maxItems": 3},
         [["a", "f"], ["b", "c", "e"]], [["a"], [], list("abcd"), ["a", "a"]]),
        ({"items": {"type": "boolean"}, "uniqueItems": True}, [[True, False], [False]], [[True, True]]),
        ({"items": {"$ref": "#/$defs/c"}, "uniqueItems": True, "$defs": {"c": {"enum": ["x", "y"]}}},
         [["y", "x"]], [["x", "x"]]),
        ({"items": {"type": "integer", "minimum": 1, "maximum": 3}, "uniqueItems": True, "minItems": 3},
         [[3, 1, 2]], [[1, 2], [1, 2, 2]]),
        # multiples
        ({"type": "integer", "multipleOf": 7}, [0, 7, -14, 700], [1, 8]),
        ({"type": "integer", "multipleOf": 5, "minimum": 12, "maximum": 23}, [15, 20], [10, 25, 16]),
        ({"type": "number", "multipleOf": 0.5}, [0, 0.5, -1.5, 2], [0.25, 1.1]),
        ({"type": "number", "multipleOf": 0.25, "exclusiveMinimum": 1, "maximum": 2}, [1.25, 2], [1, 1.3]),
        # strings with several limits
        ({"pattern": "^[a-z]+$", "minLength": 3, "maxLength": 5}, ["abc", "abcde"], ["ab", "abcdef", "AB3"]),
        ({"pattern": "^.*é$", "maxLength": 2}, ["é", "aé"], ["aaé", "a"]),
        ({"format": "date", "pattern": "^20"}, ["2024-02-03"], ["1999-01-01"]),
        ({"pattern": r"^(?=.*[A-Z])(?!.*\s).{4,8}$"}, ["abCd"], ["abcd", "A cd", "Abc"]),
        # zod's for an address, beside its format (codefuturist/email-mcp#72)
        ({"format": "email", "pattern": r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9]"
          r"[A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"}, ["a.b@c.de"], ["a..b@c.de", ".a@c.de", "a@c", "a@c.1"]),
        ({"pattern": r"\S"}, ["a", " b "], ["", "  "]),  # ggml-org/llama.cpp#26930
        ({"pattern": r"^[\x20-\x7E]+$", "minLength": 1, "maxLength": 8},  # vllm-project/vllm#45592
         ["a b", "12345678"], ["", "123456789", "é"]),
        ({"type": ["null", "string"], "enum": ["FOO", "BAR"]}, ["FOO"], [None]),  # php-sdk#298
        # drafts before 6, and OpenAPI 3.0
        ({"type": "integer", "minimum": 0, "exclusiveMinimum": True, "maximum": 3, "exclusiveMaximum": False},
         [1, 3], [0, 4]),
        # several schemas at once
        ({"allOf": [{"properties": {"a": {"type": "integer"}}, "required": ["a"]},
                    {"properties": {"b": {"type": "string"}}, "required": ["b"]}]},
         [{"a": 1, "b": "x"}], [{"a": 1}, {"b": "x"}, {"a": "1", "b": "x"}]),
        ({"allOf": [{"minimum": 3, "type": "number"}, {"maximum": 5, "type": "integer"}]},
         [3, 5], [2, 6, 3.5]),
        ({"allOf": [{"$ref": "#/$defs/base"}], "properties": {"b": {"const": 1}}, "required": ["b"],
          "$defs": {"base": {"type": "object", "properties": {"a": {"const": 2}}, "required": ["a"]}}},
         [{"b": 1, "a": 2}], [{"a": 2}, {"b": 1}]),
        ({"$ref": "#/$defs/s", "maxLength": 2, "description": "x", "$defs": {"s": {"pattern": "^a+$"}}},
         ["a", "aa"], ["aaa", "b"]),
        ({"type": "string", "anyOf": [{"const": "a"}, {"pattern": "^b+$"}], "maxLength": 2},
         ["a", "bb"], ["bbb", "c"]),
        ({"type": "object", "oneOf": [{"required": ["a"], "properties": {"a": {"const": 1}}},
                                      {"required": ["a"], "properties": {"a": {"const": 2}}}]},
         [{"a": 1}, {"a": 2}], [{"a": 3}, {}]),
        ({"enum": ["aa", "b", 3, "cccc"], "minLength": 2, "type": "string"}, ["aa", "cccc"], ["b", 3]),
        ({"allOf": [{"enum": [1, 2, 3]}, {"enum": [2, 3, 4]}]}, [2, 3], [1, 4]),
        # maps and other objects
        ({"type": "object", "propertyNames": {"enum": ["x", "y"]}, "additionalProperties": {"const": 1}},
         [{}, {"x": 1}, {"y": 1, "x": 1}], [{"z": 1}, {"x": 2}]),
        ({"type": "object", "propertyNames": {"pattern": "^[a-c]+$"}, "additionalProperties": {"const": 1}},
         [{"abc": 1}], [{"d": 1}]),
        ({"type": "object", "patternProperties": {"^n[0-9]$": {"const": None}},
          "additionalProperties": False},
         [{}, {"n1": None}], [{"n": None}, {"n1": 1}]),
        ({"properties": {"ab": {}, "cb": {"type": "integer"}}, "required": ["ab", "cb"],
          "patternProperties": {"^a": {"const": 1}, "b$": {"minimum": 1, "maximum": 3}}},
         [{"ab": 1, "cb": 3}], [{"ab": 2, "cb": 3}, {"ab": 1, "cb": 4}]),
        ({"type": "object", "patternProperties": {"^.{1,4}$": {"const": 1}},  # pydantic/pydantic#11404
          "additionalProperties": {"const": 1}}, [{"abcd": 1}], [{"abcd": 2}]),
        ({"properties": {"a": {"const": 1}, "b": {"const": 2}}, "dependentRequired": {"a": ["b"]},
          "required": ["a"]}, [{"a": 1, "b": 2}], [{"a": 1}]),
        ({"properties": {"a": {"const": 1}}, "unevaluatedProperties": False, "required": ["a"]},
         [{"a": 1}], [{}, {"a": 1, "b": 2}]),
        ({"type": "array", "items": [{"type": "integer"}, {"type": "null"}], "additionalItems": False},
         [[1, None]], [[None, 1]]),
    ],
)  # fmt: skip
def test_keywords(schema: Any, permitted: list[Any], refused: list[Any]) -> None:
    machine = machine_of(schema)
    for value in permitted:
        assert accepts(machine, json.dumps(value, ensure_ascii=False)), value
    for value in refused:
        assert not accepts(machine, json.dumps(value, ensure_ascii=False)), value
    # jsonschema knows neither OpenAPI's keywords nor those of old drafts.
    if "nullable" not in schema and not isinstance(schema.get("exclusiveMinimum"), bool):
        for text in texts_of(schema, 2):
            check(text, as_of_2020(schema))
    assert unenforced_by(GenerationOptions(json_schema=schema)) == ()


@pytest.mark.parametrize(
    ("schema", "unenforced"),
    [
        ({"type": "array", "items": {"type": "string"}, "uniqueItems": True}, ("uniqueItems",)),
        ({"properties": {"a": {"type": "string", "format": "colour"}}, "required": ["a"]},
         ("format 'colour' at properties/a",)),
        ({"properties": {"a": {"format": "regex"}, "b": {"uniqueItems": True}}},
         ("format 'regex' at properties/a", "uniqueItems at properties/b")),
    ],
)  # fmt: skip
def test_what_is_not_enforced_is_said(schema: Any, unenforced: tuple[str, ...]) -> None:
    options = GenerationOptions(json_schema=schema, eos=[1])
    assert unenforced_by(options) == unenforced
    model = ScriptedModel(lambda prompt, i: [])
    with pytest.warns(PyDiffusionWarning, match=re.escape("; ".join(unenforced))):
        model.automaton(options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.automaton(options)


def test_a_pattern_of_names_that_takes_backtracking_for_ever() -> None:
    """For Python's re, and so for jsonschema, it does."""
    name = "a" * 60 + "!"
    schema = {"properties": {name: {"const": 1}}, "required": [name]}
    machine = byte_dfa(str(expression_of(GenerationOptions(json_schema=schema))))
    hostile = schema | {"patternProperties": {"^(a+)+$": {"const": 2}}}
    same = byte_dfa(str(expression_of(GenerationOptions(json_schema=hostile))))
    assert np.array_equal(machine.table, same.table)


# Formats


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_valid_to_others(name: str) -> None:
    machine, rng = byte_dfa(FORMATS[name]), random.Random(name)
    of_url = pydantic.TypeAdapter(pydantic.AnyUrl)
    readers: dict[str, Any] = {
        "ipv6": ipaddress.IPv6Address, "ipv4": ipaddress.IPv4Address, "ipvanyaddress": ipaddress.ip_address,
        "byte": lambda text: base64.b64decode(text, validate=True), "base64url": base64.urlsafe_b64decode,
        "uri": of_url.validate_python, "url": of_url.validate_python, "iri": of_url.validate_python,
        "uuid4": lambda text: uuid.UUID(text).version == 4 or pytest.fail(text),
        "date-time": lambda text: datetime.datetime.fromisoformat(text.replace("Z", "+00:00")),
    }  # fmt: skip
    for _ in range(10):
        text = random_text(machine, rng, rng.randint(0, 40))
        assert re.fullmatch(FORMATS[name], text), "the automaton and Python's re"
        assert json.dumps(text) == f'"{text}"', "no escapes"
        check(json.dumps(text), {"type": "string", "format": name})
        readers.get(name, str)(text)


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        (
            "uri",
            ("https://example.com/a?b=c#d", "mailto:a@b.cc", "urn:isbn:0451450523", "http://1.2.3.4:80/"),
        ),
        ("ipv6", ("::", "::1", "2001:db8::8a2e:370:7334", "fe80::", "1:2:3:4:5:6:7:8")),
        ("duration", ("P3D", "PT1H30M", "P1Y2M3DT4H5M6S", "P2W")),
        ("hostname", ("localhost", "a-b.example.com")),
        ("json-pointer", ("", "/a/0/b~1c")),
        ("byte", ("", "aGk=", "aGVsbG8h")),
    ],
)
def test_formats_have_what_is_usual(name: str, texts: tuple[str, ...]) -> None:
    machine = machine_of({"type": "string", "format": name})
    assert all(accepts(machine, json.dumps(text)) for text in texts)
    for wrong in ("not a value of any of them", "P", "1:2", "http:/", "a~b", "-a", "aGk"):
        if name not in ("hostname",) or wrong == "-a":
            assert not accepts(machine, json.dumps(wrong)), wrong


# Multiples, look-aheads and lengths against Python


@pytest.mark.parametrize("multiple", ["3", "7", "60", "1000", "0.01", "0.5", "1.5", "97", "0.125"])
def test_multiples(multiple: str) -> None:
    step, rng = Decimal(multiple), random.Random(multiple)
    machine = byte_dfa("(" + condition(step) + number_between(-90000, 90000, None, None) + ")")
    n_within = 0
    for _ in range(300):
        value = rng.choice([step * rng.randint(-500, 500), Decimal(rng.randint(-(10**6), 10**6)) / 1000])
        text = f"{value:f}"
        if Decimal(text) == 0 and text.startswith("-"):
            continue
        is_within = value % step == 0 and abs(value) <= 90000
        assert accepts(machine, text) == is_within, text
        n_within += is_within
    assert 10 < n_within <= 300


@pytest.mark.parametrize(
    "pattern",
    [
        r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$",  # pydantic's Decimal
        r"^(?=.*[A-Z])(?=.*\d).{4,7}$", r"^(?!.*\s)[^x]+$", r"^(?!admin$|root$)[a-z]{3,6}$", r"^(?!.*//).+$",
        r"^(?!a/)[a-z/]+", r"^(?![\w.]).*$",
    ],
)  # fmt: skip
def test_look_aheads_at_the_beginning(pattern: str) -> None:
    plain, in_json = byte_dfa(from_regex(pattern).text), byte_dfa(f'"{in_json_string(pattern).text}"')
    rng = random.Random(pattern)
    for _ in range(15):
        assert re.fullmatch(pattern, random_text(plain, rng, 8)), "never wider than Python's"
        assert re.search(pattern, json.loads(random_text(in_json, rng, 8)))
    seen = set()
    for _ in range(200):
        text = "".join(rng.choice("aA1+-./ x") for _ in range(rng.randint(0, 7)))
        text = rng.choice(["admin", "root", "rooty", text, text, text])
        matches = bool(re.search(pattern, text))
        assert accepts(in_json, json.dumps(text)) == matches, text
        if pattern.endswith("$"):
            assert accepts(plain, text) == matches, text
        seen.add(matches)
    assert seen == {True, False}


@pytest.mark.parametrize("n", [2000, 2083, 10_000, 100_000])
def test_long_strings_are_counted_beside_the_states(n: int) -> None:
    schema = {
        "type": "object",
        "properties": {"text": {"type": "string", "maxLength": n}},
        "required": ["text"],
    }
    machine = machine_of(schema)
    assert len(machine.accepting) < 60 and machine.limits.max() == n
    for text in texts_of(schema, 3):
        check(text, schema)


@pytest.mark.parametrize(("low", "high"), [(0, 30), (4, 33)])
@pytest.mark.parametrize("around", ['"%s"', r'\["%s"(?:, "%s"){2}\]', r'(?:"%s"|null)'])
def test_counted_characters_stay_within_the_limit(around: str, low: int, high: int) -> None:
    """Texts so long that the limit holds them, over several canvases."""
    inside = Piece(JSON_CHARACTER).counted(low, high).text
    expression = around.replace("%s", inside.replace("%", "%%"))
    automaton = Automaton(expression, TOKENIZER)
    longest = 0
    for seed in (0, 3, 5, 7, 9):
        rng = np.random.default_rng(seed)
        text = write(automaton, TOKENIZER, 16, int(automaton.tokens_left[0]) + 20 * seed, rng)
        assert re.fullmatch(expression, text)
        values = json.loads(text)
        for value in values if isinstance(values, list) else [values or ""]:
            assert len(value) <= high
            longest = max(longest, len(value))
    assert longest > high - 8, "the limit was met"


def test_a_count_leaves_room_for_what_a_pattern_needs() -> None:
    schema = {"type": "string", "pattern": "^([a-z]{3}-)*[0-9]{5}$", "maxLength": 70}
    for text in texts_of(schema, 6, 15):
        check(text, schema)


def test_many_strings_that_are_too_large_together_are_counted() -> None:
    names = [f"field{i}" for i in range(20)]
    properties = {name: {"type": "string", "maxLength": 400} for name in names}
    schema = {"type": "object", "properties": properties, "required": names, "additionalProperties": False}
    for text in texts_of(schema, 2):
        check(text, schema)


# What programs send


class Colour(enum.Enum):
    RED = "red"
    GREEN = "green"
    BLUE = "blue"


class Node(pydantic.BaseModel):
    value: int
    children: list[Node] = []


class Cat(pydantic.BaseModel):
    kind: Literal["cat"]
    lives: int = pydantic.Field(ge=0, le=9, multiple_of=3)


class Dog(pydantic.BaseModel):
    kind: Literal["dog"]
    names: pydantic.conlist(str, min_length=1, max_length=2)  # type: ignore[valid-type]


class Everything(pydantic.BaseModel):
    """What pydantic 2 has of types, in one model."""

    site: pydantic.HttpUrl
    colours: set[Colour]
    tags: frozenset[Annotated[str, pydantic.StringConstraints(max_length=5)]] = pydantic.Field(max_length=2)
    note: Optional[str] = None  # noqa: UP045
    price: Decimal = pydantic.Field(ge=0, max_digits=6, decimal_places=2)
    plain_price: Decimal
    code: pydantic.constr(pattern=r"^[A-Z]{2}\d+$", min_length=4, max_length=6)  # type: ignore[valid-type]
    pair: tuple[int, str]
    born: datetime.date
    at: datetime.datetime
    takes: datetime.timedelta
    id: uuid.UUID
    address: ipaddress.IPv6Address
    either: Union[int, str, None]  # noqa: UP007
    counts: dict[Literal["a", "b"], pydantic.PositiveInt]
    by_code: dict[Annotated[str, pydantic.StringConstraints(pattern="^[a-z]{2}$")], bool]
    data: bytes
    encoded: pydantic.Base64Bytes
    secret: pydantic.SecretStr
    text: Annotated[str, pydantic.StringConstraints(max_length=10_000)] = pydantic.Field(examples=["x"])
    pet: Annotated[Cat | Dog, pydantic.Field(discriminator="kind")]
    tree: Node
    half: float = pydantic.Field(multiple_of=0.5, gt=0, lt=100)
    what: Literal["x", 3, None]


FIELDS = list(Everything.model_fields)


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.filterwarnings("ignore::pydiffusion.PyDiffusionWarning")
def test_every_field_of_a_pydantic_model(name: str) -> None:
    field = Everything.model_fields[name]
    model = pydantic.create_model("One", **{name: (Annotated[field.annotation, field], ...)})  # type: ignore
    schema = model.model_json_schema()
    for text in texts_of(schema, 2, 25):
        if schema["properties"][name].get("format") != "duration":
            check(text, schema)
        if not name.endswith("price"):  # whose schema has any string beside numbers
            model.model_validate_json(text)


@pytest.mark.filterwarnings("ignore::pydiffusion.PyDiffusionWarning")
def test_the_whole_pydantic_model() -> None:
    schema = Everything.model_json_schema()
    automaton = Automaton(expression_of(GenerationOptions(json_schema=schema)), TOKENIZER)
    budget = int(automaton.tokens_left[0]) + 60
    text = write(automaton, TOKENIZER, 64, budget, np.random.default_rng(3))
    check(text, schema)


ZOD = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "type": "object",
    "properties": {
        "email": {"type": "string", "format": "email", "minLength": 5, "maxLength": 40},
        "url": {"type": "string", "format": "uri"},
        "kind": {"type": "string", "enum": ["a", "b"]},
        "size": {"type": "number", "exclusiveMinimum": 0, "multipleOf": 0.25},
        "pair": {"type": "array", "minItems": 2, "maxItems": 2,
                 "items": [{"type": "string"}, {"type": "integer"}]},
        "both": {"allOf": [{"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]},
                           {"type": "object", "properties": {"y": {"type": "string"}}, "required": ["y"]}],
                 "unevaluatedProperties": False},
        "maybe": {"anyOf": [{"type": "string", "maxLength": 4}, {"type": "null"}], "description": "x"},
        "record": {"type": "object", "additionalProperties": {"type": "boolean"},
                   "propertyNames": {"minLength": 1, "maxLength": 4}},
        "set": {"type": "array", "uniqueItems": True, "items": {"type": "string", "enum": ["u", "v"]}},
        "self": {"anyOf": [{"$ref": "#/properties/both"}, {"type": "null"}], "default": None},
    },
    "required": ["email", "url", "kind", "size", "pair", "both", "maybe", "record", "set", "self"],
    "additionalProperties": False,
}  # fmt: skip


def test_what_zod_to_json_schema_writes() -> None:
    for text in texts_of(ZOD, 2, 60):
        check(text, as_of_2020(ZOD))


STRICT = {
    "type": "object",
    "properties": {
        "steps": {"type": "array", "items": {"$ref": "#/$defs/step"}},
        "answer": {"type": ["string", "null"], "description": "The answer."},
        "more": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
    },
    "$defs": {
        "step": {
            "type": "object",
            "properties": {"why": {"type": "string"}, "n": {"type": "integer", "minimum": 1, "maximum": 5}},
            "required": ["why", "n"],
            "additionalProperties": False,
        }
    },
    "required": ["steps", "answer", "more"],
    "additionalProperties": False,
}


def test_what_openai_permits_in_strict_mode() -> None:
    for text in texts_of(STRICT, 2, 60):
        check(text, STRICT)
