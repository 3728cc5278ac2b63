"""Constrained decoding: text that is guaranteed to match a JSON schema, a regular expression or a grammar,
and tool calls whose arguments are guaranteed to match schemas.

``schema``, ``regex`` and ``calls`` reduce the constraint to one plain regular expression, which ``byte_dfa``
compiles to a DFA over UTF-8 bytes; ``grammar`` parses llama.cpp's GBNF, which ``grammar_dfa`` compiles to
such a DFA. ``token_automaton`` lifts it to the tokens of a vocabulary, and ``guide`` finds the most likely
accepted canvas at every denoising step.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from pydiffusion.errors import OptionError

from .byte_dfa import TooLarge
from .calls import CallGrammar
from .grammar import Grammar, parse_grammar
from .guide import Guide
from .regex import from_regex
from .schema import LONGEST_IN_STATES, SHORTEST_COUNTED, Compiled, compile_schema
from .token_automaton import Automaton

if TYPE_CHECKING:
    from pydiffusion.options import GenerationOptions
    from pydiffusion.tokenizer import Tokenizer

__all__ = ["Automaton", "Guide", "automaton_for", "expression_of", "unenforced_by"]


def expression_of(options: GenerationOptions) -> str | Grammar:
    """The options' constraint as one regular expression, or the grammar. Raises OptionError for what is not
    supported.
    """
    if options.grammar is not None:
        try:
            return parse_grammar(options.grammar)
        except ValueError as error:
            raise OptionError("grammar", f"grammar: {error}") from None
    if options.regex is not None:
        try:
            return from_regex(options.regex).text
        except ValueError as error:
            raise OptionError("regex", f"regex: {error}") from None
    return _compiled(options.json_schema, LONGEST_IN_STATES).piece.text


def unenforced_by(options: GenerationOptions) -> tuple[str, ...]:
    """The constraints of the options' schemas that the text may violate, each with its place; see
    ``compile_schema``. Raises OptionError as ``expression_of``.
    """
    if options.function_calls is not None:
        assert isinstance(options.function_calls, str)  # GenerationOptions converts it
        given = json.loads(options.function_calls)
        schemas = {f"{each['name']}: ": each["parameters"] for each in given["functions"]}
        schemas[""] = None if given["otherwise"] == "text" else given["otherwise"]
    else:
        schemas = {"": None if options.json_schema is None else json.loads(str(options.json_schema))}
    return tuple(
        f"{name}{what}"
        for name, schema in schemas.items()
        if schema is not None
        for what in _compiled(json.dumps(schema), LONGEST_IN_STATES).unenforced
    )


@lru_cache(maxsize=16)
def _compiled(schema: Any, longest: int) -> Compiled:
    assert isinstance(schema, str)  # GenerationOptions converts it
    return compile_schema(json.loads(schema), longest=longest)


def automaton_for(options: GenerationOptions, tokenizer: Tokenizer, ends: Collection[int]) -> Automaton:
    """Compile the options' constraint to an automaton that never emits a token of ``ends``.

    Raises OptionError as ``expression_of``, or if the automaton is too large.
    """
    name: str = options.constraint or "json_schema"
    make = partial(_automaton, options, tokenizer, ends)
    try:
        try:
            automaton = make(LONGEST_IN_STATES)
        except TooLarge:
            if name not in ("json_schema", "function_calls"):
                raise
            automaton = make(SHORTEST_COUNTED)
    except OptionError:
        raise
    except ValueError as error:
        raise OptionError(name, f"{name}: {error}") from None
    return automaton


def _automaton(
    options: GenerationOptions, tokenizer: Tokenizer, ends: Collection[int], longest: int
) -> Automaton:
    """longest: see ``compile_schema``."""
    if options.function_calls is not None:
        calls = CallGrammar(json.loads(str(options.function_calls)), tokenizer, longest)
        return Automaton(calls.expression, tokenizer, ends, calls.markers)
    if options.json_schema is not None:
        return Automaton(_compiled(options.json_schema, longest).piece.text, tokenizer, ends)
    return Automaton(expression_of(options), tokenizer, ends)
