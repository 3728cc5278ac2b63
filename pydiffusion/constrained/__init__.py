"""Constrained decoding: text that is guaranteed to match a JSON schema, a regular expression or a grammar,
and tool calls whose arguments are guaranteed to match schemas.

``schema``, ``regex`` and ``calls`` reduce the constraint to one plain regular expression, which ``byte_dfa``
compiles to a DFA over UTF-8 bytes; ``grammar`` parses llama.cpp's GBNF, which ``grammar_dfa`` compiles to
such a DFA. ``token_automaton`` lifts it to the tokens of a vocabulary, and ``guide`` finds the most likely
accepted canvas at every denoising step.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pydiffusion._util.warn import warn_caller
from pydiffusion.errors import OptionError, PyDiffusionWarning

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
    if options.json_schema is not None:
        return _compiled(options.json_schema, LONGEST_IN_STATES).unenforced
    if options.function_calls is None:
        return ()
    permitted = json.loads(options.function_calls)  # type: ignore[arg-type]  # GenerationOptions converts it
    schemas = [(each["parameters"], f"in {each['name']}") for each in permitted["functions"]]
    schemas.append((permitted["otherwise"], "in the answer"))
    return tuple(
        f"{what} {where}"
        for schema, where in schemas
        if isinstance(schema, Mapping)
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
    markers: tuple[str, ...] = ()
    expression: str | Grammar
    if options.function_calls is not None:
        calls = CallGrammar(json.loads(options.function_calls), tokenizer)
        expression, markers = calls.expression, calls.markers
    else:
        expression = expression_of(options)
    unenforced = unenforced_by(options)
    if unenforced:
        warn_caller(f"{name}: not enforced: {'; '.join(unenforced)}", PyDiffusionWarning)
    try:
        try:
            return Automaton(expression, tokenizer, ends, markers)
        except TooLarge:
            if options.json_schema is None:
                raise
            shorter = _compiled(options.json_schema, SHORTEST_COUNTED).piece.text
            return Automaton(shorter, tokenizer, ends, markers)
    except ValueError as error:
        raise OptionError(name, f"{name}: {error}") from None
