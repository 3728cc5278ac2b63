"""Grammars (GBNF): the automaton's language against a matcher of the tests' own, texts of the demo model,
errors with their place.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.automata import accepts, random_text, write
from support.gbnf_matcher import matches
from support.grammars import GRAMMARS, JSON
from support.server_fakes import metadata

from pydiffusion import DiffusionModel, GenerationOptions
from pydiffusion.constrained import Automaton, expression_of
from pydiffusion.constrained.byte_dfa import ByteDfa
from pydiffusion.constrained.grammar import parse_grammar
from pydiffusion.constrained.grammar_dfa import _compile, grammar_dfa
from pydiffusion.tokenizer import Tokenizer


@cache
def machine_of(text: str) -> ByteDfa:
    return grammar_dfa(parse_grammar(text))


@pytest.mark.parametrize("name", GRAMMARS)
def test_members_are_accepted_and_others_are_not(name: str) -> None:
    grammar, members, others = GRAMMARS[name]
    machine = machine_of(grammar)
    for text in members:
        assert matches(grammar, text), "the matcher of the tests"
        assert accepts(machine, text), text
    for text in others:
        assert not matches(grammar, text), "the matcher of the tests"
        assert not accepts(machine, text), text


@pytest.mark.parametrize("name", GRAMMARS)
def test_both_agree_on_texts_with_a_mistake(name: str) -> None:
    """Members with characters removed, doubled, replaced or swapped: some are members still."""
    grammar, members, _ = GRAMMARS[name]
    machine, rng = machine_of(grammar), random.Random(name)
    n_members = 0
    for _ in range(80):
        text = list(rng.choice(members) or "x")
        for _ in range(rng.randint(1, 2)):
            i, j = rng.randrange(len(text)), rng.randrange(len(text))
            text[i] = rng.choice(["", text[i] * 2, text[j], text[j] + text[i], "\n", "é"])
        mutant = "".join(text)
        assert accepts(machine, mutant) == matches(grammar, mutant), mutant
        n_members += accepts(machine, mutant)
    assert 0 < n_members < 80


@pytest.mark.parametrize("name", GRAMMARS)
def test_texts_of_the_automaton_are_members(name: str) -> None:
    grammar = GRAMMARS[name][0]
    machine, rng = machine_of(grammar), random.Random(1)
    for _ in range(6):
        text = random_text(machine, rng, 30)
        assert matches(grammar, text), text


@pytest.mark.parametrize("name", GRAMMARS)
def test_random_distributions_give_members(name: str) -> None:
    grammar, tokenizer = GRAMMARS[name][0], Tokenizer(metadata())
    automaton = Automaton(expression_of(GenerationOptions(grammar=grammar)), tokenizer)
    for seed in range(2):
        budget = int(automaton.tokens_left[0]) + 30 * seed
        text = write(automaton, tokenizer, 32, budget, np.random.default_rng(seed))
        assert matches(grammar, text), text


@pytest.mark.parametrize(
    ("grammar", "members", "others"),
    [
        (' root ::= "[" [0-9]+ ", \\"" [a-z]+ "\\"]" ', ('[8, "eight"]',), ("[8]",)),
        ('root ::= "a"{2,3} | "bc"{2} | [x]{2,}', ("aa", "aaa", "bcbc", "xxxx"), ("a", "aaaa", "bc", "x")),
        (r'root ::= "\x41\u00e9\U0001F600\"\\\[\]\t"', ('Aé\U0001f600"\\[]\t',), ("A",)),
        ("root ::= [a-c-] [^a-c]", ("-d", "bé", "a\n"), ("dd", "aa")),
        ("root ::= [\\]\\[^] .", ("]x", "^\n", "[\U0001f600"), ("ax", "]")),
        ('root ::= ( "a"\n  # in between\n | "b" )? "c"\n', ("ac", "bc", "c"), ("ab",)),
        ('root ::=\n  "a" |\n  "b"\n  | "c"\r\n', ("a", "b", "c"), ("ab",)),
        ('root ::= ""', ("",), ("a",)),
        ('root ::= "a" root "b" | ""', ("", "ab", "aaabbb"), ("aab", "abb")),
        ('root ::= "a" root | "b"', ("b", "a" * 60 + "b"), ("a",)),  # ends with itself: no limit of depth
        ('root ::= x\nx ::= "a" y | ""\ny ::= "b" x', ("", "ab" * 30), ("a", "aba")),
        ('root ::= "(" root ")" root | ""', ("", "()()()()()()()()", "(())()"), ("(", ")(")),
        ('root ::= x{0} "b"\nx ::= "a"', ("b",), ("ab",)),
        ('root ::= (("a"?)*)+ "b"*', ("", "aab"), ("ba",)),
        ('root ::= [^"]{0,40} "\\""', ('"', 'é' * 40 + '"'), ("x" * 41 + '"',)),
        ('root ::= yes|no\nyes::="yes"\nno ::= "no"', ("yes", "no"), ("yesno",)),
    ],
)  # fmt: skip
def test_what_the_format_has(grammar: str, members: tuple[str, ...], others: tuple[str, ...]) -> None:
    machine = machine_of(grammar)
    for text in (*members, *others):
        assert accepts(machine, text) == (text in members), text
        assert matches(grammar, text) == (text in members), text


def test_long_repetitions_are_counted_beside_the_states() -> None:
    """As clients convert a string with maxLength 2000, which llama.cpp itself refused for a while."""
    grammar = r"""
root ::= "{" space "\"text\"" space ":" space string "}" space
char ::= [^"\\\x7F\x00-\x1F] | [\\] (["\\bfnrt] | "u" [0-9a-fA-F]{4})
space ::= | " " | "\n"{1,2} [ \t]{0,20}
string ::= "\"" char{0,2000} "\"" space
"""
    machine = machine_of(grammar)
    assert machine.limits.max() == 2000 and len(machine.accepting) < 200
    assert accepts(machine, '{"text": "a\\n\\u00e9é"}') and not accepts(machine, '{"text": "a}')


def test_counted_repetitions_stay_within_their_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    grammar = 'root ::= "<" pair{2,40} ">" ("." [a-zé]{0,30} ";")+\npair ::= "ab" | "c" [0-9]{1,2}'
    exact = machine_of(grammar)
    assert not exact.limits.any()
    counted = _compile(parse_grammar(grammar), counts=True)
    assert set(counted.limits.tolist()) == {0, 38, 30} and len(counted.accepting) < len(exact.accepting) / 5
    monkeypatch.setattr("pydiffusion.constrained.token_automaton.grammar_dfa", lambda _: counted)
    automaton, tokenizer = Automaton(parse_grammar(grammar), Tokenizer(metadata())), Tokenizer(metadata())
    for seed in range(0, 12, 2):
        budget = int(automaton.tokens_left[0]) + 15 * seed
        text = write(automaton, tokenizer, 16, budget, np.random.default_rng(seed))
        assert matches(grammar, text) and accepts(exact, text), text


def test_recursion_is_expanded_to_a_depth() -> None:
    machine = machine_of(JSON)
    deep = [f'{{"a": {"[" * n}{"]" * n}}}' for n in (1, 2, 30)]
    assert [accepts(machine, text) for text in deep] == [True, True, False]
    assert all(matches(JSON, text) for text in deep), "the last one is in the language, and never generated"


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ("", "no rule 'root'"),
        ('start ::= "a"', "no rule 'root'.*start"),
        ('root ::= "a"\nroot ::= "b"', "line 2, column 1: .*defined twice"),
        ('root ::= "a" item\n', "line 1, column 14: the rule 'item' is not defined"),
        ('root = "a"', "line 1, column 6: expected '::='"),
        ('root ::= "a"\n\nroot2 ::= "b', "line 3, column 11: this string is not closed"),
        ('root ::= ("a"', "line 1, column 10: this parenthesis is not closed"),
        ('root ::= "a")', "line 1, column 13: expected the end of the rule 'root', not '\\)'"),
        ("root ::= [a-", "line 1, column 10: this class is not closed"),
        ("root ::= [z-a]", "line 1, column 11: this range ends before"),
        ("root ::= []", "line 1, column 10: no character"),
        ('root ::= "\\q"', "line 1, column 11: '\\\\q' is not an escape"),
        ('root ::= "\\x4"', "line 1, column 11: .*2 hexadecimal digits"),
        ('root ::= "\\uD800"', "D800 is not the number of a character"),
        ("root ::= *", "line 1, column 10: nothing precedes"),
        ('root ::= "a"{3,2}', "line 1, column 13: .*at least 3 and at most 2"),
        ('root ::= "a"{,2}', "line 1, column 14: expected a number"),
        ('root ::= "a"{99999}', "line 1, column 14: .*too many"),
        ("root ::= <[7]> <think>", "line 1, column 10: a reference to a token"),
        ("root ::= !<think>", "line 1, column 10: a reference to a token"),
        ('root ::= root "a" | "b"', "the rule 'root' is left-recursive.*repetition"),
        ('root ::= a\na ::= "x"? b\nb ::= a "y" | "z"', "the rule 'a' is left-recursive"),
        ('root ::= "a" root', "recursion has no end"),
        ('root ::= (("a" | "b"){9000} "c"){9000}', "too large"),
        ('{"type": "object"}', "line 1, column 1: expected the name of a rule, not '{'"),
        ("%llguidance {}\nstart: /a/", "line 1, column 1: expected the name of a rule"),
    ],
)  # fmt: skip
def test_errors_say_where_and_why(grammar: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        machine_of(grammar)


# With a model


@pytest.fixture(scope="module")
def model(gguf_file: Callable[..., Path]) -> DiffusionModel:
    from pydiffusion.convert import convert
    from pydiffusion.demo import checkpoint_path

    target = gguf_file("small").parent / "grammar.gguf"
    convert(checkpoint_path(), target, "q8_0")
    return DiffusionModel(target, n_threads=1, n_ctx=512)


@pytest.mark.parametrize("name", ["json", "list", "chess"])
def test_the_demo_model_writes_members(model: DiffusionModel, name: str) -> None:
    grammar = GRAMMARS[name][0]
    done = model.generate("json: Ada, 34", grammar=grammar, seed=2, steps=3, max_tokens=96)
    assert matches(grammar, done.text) and done.finish_reason == "eos"
    again = model.generate("json: Ada, 34", grammar=grammar, seed=2, steps=3, max_tokens=96)
    assert again.text == done.text


def test_a_chat_by_grammar(model: DiffusionModel) -> None:
    grammar = 'root ::= ("yes" | "no") ", " [a-z]{3,9}'
    messages = [{"role": "user", "content": "Is it?"}]
    own: dict[str, Any] = {"seed": 1, "steps": 3, "max_tokens": 24}
    for constraint in ({"grammar": grammar}, {"response_format": {"type": "grammar", "grammar": grammar}}):
        answer = model.create_chat_completion(messages, **own, **constraint)
        assert matches(grammar, answer["choices"][0]["message"]["content"])
    assert matches(grammar, model.create_completion("Is it?", grammar=grammar, **own)["choices"][0]["text"])
    with pytest.raises(ValueError, match="response_format and grammar exclude each other"):
        model.create_chat_completion(messages, response_format={"type": "json_object"}, grammar=grammar)
    with pytest.raises(ValueError, match="grammar: line 1, column 10: this string is not closed"):
        model.generate("x", grammar='root ::= "a')
