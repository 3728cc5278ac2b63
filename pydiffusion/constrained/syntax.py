"""How the values of a schema are written: as JSON, or as the arguments in a chat format's calls."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from .byte_dfa import FIRST_MARKER, MAX_MARKERS
from .character_classes import Ranges, as_class, complement
from .regex import JSON_CHARACTER, Piece, in_json_string, in_text, literal, sequence

# Control characters other than tab, line feed and carriage return, surrogates, and the noncharacters that
# `output_parser` needs when it reads a constrained answer.
_NEVER_IN_TEXT = [(0, 8), (11, 12), (14, 31), (127, 159), (0xD800, 0xDFFF), (0xFDD0, 0xFDEF)]
TEXT_RANGES: Ranges = complement(_NEVER_IN_TEXT)
TEXT_CHARACTER = as_class(TEXT_RANGES)


def marker(index: int) -> Piece:
    """The marker token of this index in the list that ``Automaton`` gets."""
    assert index < MAX_MARKERS
    return Piece(chr(FIRST_MARKER + index))


@dataclass(frozen=True)
class Syntax:
    """A notation for JSON's values; numbers, true, false, null and brackets are the same in all.

    character: expression for one character within a string.  quote: what a string is enclosed in.
    in_string: reduces a schema's ``pattern`` to the inside of a string.
    value: writes a value of the schema (``enum``, ``const``); ``key``: a property's name.
    any_key: a property's name that the schema leaves open.
    sorts_keys: properties are in alphabetical order, not in the schema's.
    """

    colon: Piece
    comma: Piece
    character: str
    quote: Piece
    in_string: Callable[[str], Piece]
    value: Callable[[Any], Piece]
    key: Callable[[str], Piece]
    any_key: Piece
    sorts_keys: bool = False

    def string(self, inside: Piece) -> Piece:
        return sequence([self.quote, inside, self.quote])

    def characters(self, low: int, high: int | None) -> Piece:
        """A string of ``low`` to ``high`` characters."""
        return self.string(Piece(self.character).repeated(low, high))

    def order(self, names: Iterable[str]) -> list[str]:
        """Property names in the order in which they are written."""
        return sorted(names, key=lambda name: (name.lower(), name)) if self.sorts_keys else list(names)


def _json(value: Any) -> Piece:
    return literal(json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(", ", ": ")))


JSON = Syntax(
    colon=Piece(":[ ]?"),
    comma=Piece(",[ ]?"),
    character=JSON_CHARACTER,
    quote=Piece('"'),
    in_string=in_json_string,
    value=_json,
    key=_json,
    any_key=sequence([Piece('"'), Piece(JSON_CHARACTER).repeated(0, None), Piece('"')]),
)


def call_arguments(quote: Piece | None, bare_key: str, sorts_keys: bool) -> Syntax:
    """The notation of a chat format's calls: without spaces, keys without quotes, strings between markers.

    quote: the marker around strings, which have no escapes; None: strings are JSON's.
    bare_key: regular expression of the keys that need no quotes.
    """
    colon, comma = Piece(":"), Piece(",")

    def text(value: str) -> Piece:
        if quote is None:
            return _json(value)
        if not re.fullmatch(f"{TEXT_CHARACTER}*", value):
            raise ValueError(f"{value!r} has a character that a tool call can't hold"[:200])
        return sequence([quote, literal(value), quote])

    def key(name: str) -> Piece:
        return literal(name) if re.fullmatch(bare_key, name) else text(name)

    def separated(pieces: Iterable[Piece]) -> list[Piece]:
        return [each for piece in pieces for each in (comma, piece)][1:]

    def value(given: Any) -> Piece:
        if isinstance(given, str):
            return text(given)
        if isinstance(given, Mapping):
            pairs = (sequence([key(name), colon, value(given[name])]) for name in syntax.order(given))
            return sequence([Piece(r"\{"), *separated(pairs), Piece(r"\}")])
        if isinstance(given, Sequence):
            return sequence([Piece(r"\["), *separated(map(value, given)), Piece(r"\]")])
        return _json(given)

    syntax = Syntax(
        colon=colon,
        comma=comma,
        character=JSON.character if quote is None else TEXT_CHARACTER,
        quote=JSON.quote if quote is None else quote,
        in_string=JSON.in_string if quote is None else partial(in_text, permitted=TEXT_RANGES, behind=quote),
        value=value,
        key=key,
        any_key=Piece("[A-Za-z_][A-Za-z0-9_]*"),
        sorts_keys=sorts_keys,
    )
    return syntax
