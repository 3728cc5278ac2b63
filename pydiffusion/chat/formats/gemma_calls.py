"""Parser of Gemma 4's tool calls: ``call:name{key:<|"|>text<|"|>,n:1,flags:[true,false],more:{...}}``.

Keys are bare, strings are enclosed in ``<|"|>``. Also accepts what models write by mistake: JSON, ordinary
quotes, parentheses and ``=`` instead of braces and colon, unquoted words.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

QUOTE = '<|"|>'
_MAX_DEPTH = 64
#: A function's name.
NAME = r"[\w.\-/]+(?::[\w.\-/]+)*"
_HEAD = re.compile(rf"\s*(?:call\s*:)?\s*({NAME})\s*(?=[{{(])")
_SPACE = re.compile(r"\s*")
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?")
_KEY = re.compile(r"[^\s:={}()\[\],\"']+")
_WORDS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
_CLOSING = {"{": "}", "(": ")", "[": "]"}


def parse_call(text: str) -> tuple[str, dict[str, Any]] | None:
    """Parse name and arguments of a call; None if the text is not a complete call."""
    if text.lstrip().startswith("{"):
        return _json_call(text)
    head = _HEAD.match(text)
    if head is None:
        return None
    reader = CallReader(text, head.end())
    try:
        arguments = reader.mapping(depth=0)
        reader.skip_space()
    except ValueError:
        return None
    return (head.group(1), arguments) if reader.at == len(text) else None


def _json_call(text: str) -> tuple[str, dict[str, Any]] | None:
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    name = call.get("name")
    return (name, arguments) if isinstance(name, str) and name and isinstance(arguments, dict) else None


class CallReader:
    """Recursive descent parser; raises ValueError at the first error."""

    def __init__(self, text: str, at: int) -> None:
        self._text = text
        self.at = at

    def skip_space(self) -> None:
        match = _SPACE.match(self._text, self.at)
        self.at = match.end() if match else self.at

    def mapping(self, depth: int) -> dict[str, Any]:
        """``{key:value,...}`` or ``(key=value, ...)``."""
        closing = self._open(depth)
        entries: dict[str, Any] = {}
        while not self._ends(closing, bool(entries)):
            key = self._key()
            self.skip_space()
            if self._peek() not in (":", "="):
                raise ValueError("a key without a value")
            self.at += 1
            entries[key] = self._value(depth + 1)
        return entries

    def _sequence(self, depth: int) -> list[Any]:
        closing = self._open(depth)
        entries: list[Any] = []
        while not self._ends(closing, bool(entries)):
            entries.append(self._value(depth + 1))
        return entries

    def _open(self, depth: int) -> str:
        if depth > _MAX_DEPTH:
            raise ValueError("nested too deeply")
        closing = _CLOSING[self._text[self.at]]
        self.at += 1
        return closing

    def _ends(self, closing: str, comma_due: bool) -> bool:
        """Consume the closing bracket and return True, or else the comma before the next entry."""
        self.skip_space()
        if comma_due and self._peek() == ",":
            self.at += 1
            self.skip_space()
        elif comma_due and self._peek() != closing:
            raise ValueError("missing comma between entries")
        if self._peek() != closing:
            return False
        self.at += 1
        return True

    def _key(self) -> str:
        if self._peek() in ('"', "'") or self._text.startswith(QUOTE, self.at):
            return self._string()
        match = _KEY.match(self._text, self.at)
        if match is None:
            raise ValueError("no key")
        self.at = match.end()
        return match.group()

    def _value(self, depth: int) -> Any:
        self.skip_space()
        first = self._peek()
        if first == "{":
            return self.mapping(depth)
        if first == "[":
            return self._sequence(depth)
        if first in ('"', "'") or self._text.startswith(QUOTE, self.at):
            return self._string()
        return self._bare()

    def _string(self) -> str:
        if self._text.startswith(QUOTE, self.at):
            return self._up_to(QUOTE)
        if self._peek() == '"':
            try:
                value, self.at = json.JSONDecoder(strict=False).raw_decode(self._text, self.at)
                return value
            except ValueError:
                pass
        return self._up_to(self._peek())

    def _up_to(self, quote: str) -> str:
        start = self.at + len(quote)
        end = self._text.find(quote, start)
        if end < 0:
            raise ValueError("unterminated string")
        self.at = end + len(quote)
        return self._text[start:end]

    def _bare(self) -> Any:
        end = self.at
        while end < len(self._text) and self._text[end] not in ",}])":
            end += 1
        word = self._text[self.at : end].strip()
        if not word or end == len(self._text) or QUOTE in word:
            raise ValueError("no value")
        self.at = end
        return word_value(word)

    def _peek(self) -> str:
        return self._text[self.at : self.at + 1]


def word_value(word: str) -> Any:
    """The value of a word without quotes: a constant, a number or text."""
    if word in _WORDS:
        return _WORDS[word]
    if _NUMBER.fullmatch(word):
        try:
            number = json.loads(word)
        except ValueError:  # more digits than Python parses
            return word
        return number if math.isfinite(number) else word
    return word
