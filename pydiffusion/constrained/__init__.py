"""Text that is guaranteed to follow a JSON schema or a regular expression.

``schema`` and ``patterns`` turn these into one plain expression, ``machine`` into a machine over bytes,
``automaton`` tells what a model's tokens do to it, ``guide`` finds at every step the likeliest canvas that it
accepts.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import TYPE_CHECKING

from .guide import Guide
from .regex import from_regex
from .schema import schema_to_regex
from .token_automaton import Automaton

if TYPE_CHECKING:
    from pydiffusion.options import GenerationOptions
    from pydiffusion.tokenizer import Tokenizer

__all__ = ["Automaton", "Guide", "automaton_for", "expression_of"]


def expression_of(options: GenerationOptions) -> str:
    """What the options ask of the text, as one expression. Raises ValueError with what is not supported."""
    if options.regex is not None:
        try:
            return from_regex(options.regex).text
        except ValueError as error:
            raise ValueError(f"regex: {error}") from None
    assert isinstance(options.json_schema, str)  # GenerationOptions made it so
    return schema_to_regex(json.loads(options.json_schema)).text


def automaton_for(options: GenerationOptions, tokenizer: Tokenizer, ends: Collection[int]) -> Automaton:
    """The automaton of the options, whose texts hold no token of ``ends``.

    Raises ValueError as ``expression_of``, or where it is too large.
    """
    expression = expression_of(options)
    try:
        return Automaton(expression, tokenizer, ends)
    except ValueError as error:
        name = "json_schema" if options.regex is None else "regex"
        raise ValueError(f"{name}: {error}") from None
