"""Constraints made to be hard are refused after a limited amount of work; small ones of their kind work."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from support.automata import accepts

from pydiffusion.constrained.byte_dfa import ByteDfa, byte_dfa
from pydiffusion.constrained.grammar import parse_grammar
from pydiffusion.constrained.grammar_dfa import grammar_dfa
from pydiffusion.constrained.regex import from_regex
from pydiffusion.constrained.schema import compile_schema
from pydiffusion.constrained.schema_parts import SchemaError


def machine_of_regex(pattern: str) -> ByteDfa:
    return byte_dfa(from_regex(pattern).text)


def machine_of_grammar(text: str) -> ByteDfa:
    return grammar_dfa(parse_grammar(text))


def machine_of_schema(schema: Any) -> ByteDfa:
    return byte_dfa(compile_schema(schema).piece.text)


def test_expressions_of_what_may_be_empty() -> None:
    with pytest.raises(ValueError, match="too large"):
        machine_of_regex("(?:a?b?c?){1990}")
    assert accepts(machine_of_regex("(?:a?b?c?){20}"), "aaa")


@pytest.mark.parametrize("rule", ['("a"? "b"?){%d}', '((("" | "a"){%d}){%d}){2}', '(((""){%d}){%d}){2}'])
def test_grammars_of_what_may_be_empty(rule: str) -> None:
    def text(n: int) -> str:
        return "root ::= " + rule.replace("%d", str(n))

    with pytest.raises(ValueError, match="too large"):
        machine_of_grammar(text(2500))
    assert accepts(machine_of_grammar(text(3)), "")


@pytest.mark.parametrize("leaf", [False, True])
def test_references_that_double(leaf: bool) -> None:
    n = 24
    definitions: dict[str, Any] = {str(n): leaf}
    for i in range(n):
        definitions[str(i)] = {"anyOf": [{"$ref": f"#/$defs/{i + 1}"}] * 2}
    with pytest.raises(SchemaError, match="too large"):
        compile_schema({"$ref": "#/$defs/0", "$defs": definitions})


def test_names_against_an_expression_that_backtracks() -> None:
    name = "a" * 60 + "!"
    schema = {
        "type": "object",
        "properties": {name: {"type": "integer"}, "aa": {"type": "integer"}},
        "required": [name, "aa"],
        "patternProperties": {"^(a+)+$": {"maximum": 5}},
    }
    machine = machine_of_schema(schema)
    assert accepts(machine, json.dumps({name: 7, "aa": 5}))
    assert not accepts(machine, json.dumps({name: 7, "aa": 6}))


@pytest.mark.parametrize(
    ("pattern", "is_bound"),
    [("x", True), ("^x", False), ("x$", False), ("ax|b", True), (r"^\\w+$", True), ("^[^x]*$", False)],
)
def test_names_against_expressions(pattern: str, is_bound: bool) -> None:
    """As with re.search: a part of the name is enough."""
    schema = {
        "type": "object",
        "properties": {"axb": {"type": "integer"}},
        "required": ["axb"],
        "patternProperties": {pattern.replace("\\\\", "\\"): {"maximum": 5}},
    }
    assert accepts(machine_of_schema(schema), '{"axb": 6}') is not is_bound


@pytest.mark.parametrize(
    ("schema", "what"),
    [
        ({"properties": {"a": {}}, "patternProperties": {"(": {}}}, "not a valid regular expression"),
        ({"allOf": [{"anyOf": [{"minLength": i}, {"maxLength": i}]} for i in range(200)]}, "too deeply"),
        ({"allOf": [{"type": "number", "multipleOf": each} for each in ("x", 3)]}, "not a valid JSON schema"),
        ({"oneOf": [{"type": "object", "required": [str(i)]} for i in range(600)]}, "'oneOf' of 600"),
        ({"enum": [math.nan]}, "not JSON compliant"),
    ],
    ids=["expression", "combinations", "multiple", "branches", "nan"],
)
def test_refused_with_a_reason(schema: Any, what: str) -> None:
    with pytest.raises(SchemaError, match=what):
        compile_schema(schema)


def test_a_limit_that_no_text_reaches() -> None:
    assert accepts(machine_of_schema({"type": "string", "maxLength": 10**30}), '"abc"')


def test_many_rules() -> None:
    chain = "\n".join(f"r{i} ::= r{i + 1}?" for i in range(3000))
    assert len(parse_grammar(f"root ::= r0\n{chain}\nr3000 ::= [a-z]").rules) == 3002
    with pytest.raises(ValueError, match="more than 5000 rules"):
        parse_grammar("root ::= [a]\n" + "\n".join(f"r{i} ::= [b]" for i in range(100_000)))
