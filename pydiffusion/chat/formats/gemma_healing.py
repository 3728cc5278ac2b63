"""Reading of Gemma 4's calls that are not well-formed, where only one reading is possible.

Missing and doubled commas; brackets too few at the end or too many; a string whose first or last ``<|"|>`` is
missing; text or a code fence around a call; double brackets; arguments as JSON text.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from .gemma_calls import NAME, QUOTE, CallReader, word_value

_HEAD = re.compile(rf"call\s*:\s*({NAME})\s*[:=]?\s*(?=[{{(])")
_HEAD_WITHOUT_CALL = re.compile(rf"\s*({NAME})(?=[{{(])")
_NAME_ALONE = re.compile(rf"\s*call\s*:\s*({NAME})\s*")
_KEY = r"[^\W\d]\w*\s*[:=]"
#: The beginning of another entry.
_ENTRY = re.compile(rf",\s*{_KEY}")
_CONSTANT = r"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|true|false|null|True|False|None"
#: A constant that something follows of which it can't be a part.
_CONSTANT_ALONE = re.compile(rf"({_CONSTANT})\s*(?=[,;}}\])]|\Z)")
_CONSTANT_BEFORE_KEY = re.compile(rf"({_CONSTANT})\s+(?={_KEY})")
_WORDS_BEFORE_KEY = re.compile(rf"(.*\S)\s+{_KEY}\s*\Z", re.DOTALL)
_KEY_INSIDE = re.compile(rf"\s{_KEY}")
_SINGLE_QUOTED = re.compile(r"'((?:[^'\\]|\\.)*)'", re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r"}
_FENCE = re.compile(r"```\w*")
_CLOSERS = "}])"
#: Left over at the end of a call without meaning anything.
_LEFT_OVERS = re.compile(rf"(?:[\s{re.escape(_CLOSERS)},;\"'`]|{re.escape(QUOTE)})*")
_ARGUMENTS = ("arguments", "parameters", "args", "input")


class Healed(NamedTuple):
    """A call that was read; ``rest``: text around it."""

    name: str
    arguments: dict[str, Any]
    rest: str


def heal_call(text: str) -> Healed | None:
    """Read what is between the markers of a call and is not well-formed; None if it is ambiguous."""
    alone = _NAME_ALONE.fullmatch(text)
    if alone is not None:
        return Healed(alone[1], {}, "")
    head = _HEAD.search(text) or _HEAD_WITHOUT_CALL.match(text)
    at = head.end() if head is not None else text.find("{")
    if at < 0:
        return None
    reader = _LenientReader(text, at)
    try:
        found = reader.mapping(depth=0)
        call = (head[1], found) if head is not None else _of_object(found)
    except (ValueError, RecursionError):
        return None
    left_over = _LEFT_OVERS.match(text, reader.at)
    assert left_over is not None
    before, after = _FENCE.sub("", text[: at if head is None else head.start()]), text[left_over.end() :]
    rest = " ".join(filter(None, (before.strip(" \n[("), after.strip())))
    # More brackets or another call: then it is not clear what belongs to this one.
    if call is None or any(sign in rest for sign in ("{", "(", "[", QUOTE)) or "call:" in rest:
        return None
    return Healed(*call, rest)


def _of_object(call: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """A call written as an object with its name and its arguments."""
    inner = call.get("function")
    if isinstance(inner, dict):
        call = inner
    name = call.get("name", inner)
    given: Any = next((call[key] for key in _ARGUMENTS if key in call), {})
    if isinstance(given, str):  # JSON within JSON
        given = _LenientReader(given, given.index("{")).mapping(depth=0) if given.strip() else {}
    if not isinstance(name, str) or not re.fullmatch(NAME, name) or not isinstance(given, dict):
        return None
    return name, given


class _LenientReader(CallReader):
    """Reads on where CallReader gives up, as long as it is clear what was meant."""

    def __init__(self, text: str, at: int) -> None:
        super().__init__(text, at)
        self._expected: list[str] = []  # closing brackets, innermost last
        self._next_quote = -1  # position of the next QUOTE, once it is known

    def mapping(self, depth: int) -> dict[str, Any]:
        self.skip_space()
        doubled = re.match(r"[{(]\s*(?=[{(])", self._text[self.at :][:80])
        if doubled is None:
            return super().mapping(depth)
        closing = self._open(depth)
        self.skip_space()
        entries = self.mapping(depth + 1)
        if not self._ends(closing, True):
            raise ValueError("something beside the inner object")
        return entries

    def _open(self, depth: int) -> str:
        closing = super()._open(depth)
        self._expected.append(closing)
        return closing

    def _ends(self, closing: str, comma_due: bool) -> bool:
        """As for well-formed calls, but without the comma, and with brackets missing or too many."""
        while True:
            self.skip_space()
            sign = self._peek()
            if sign in ("", closing) or (sign in _CLOSERS and sign in self._expected[:-1]):
                self._expected.pop()
                self.at += sign == closing
                return True
            if sign not in (",", ";", *_CLOSERS):
                return False
            self.at += 1

    def _string(self) -> str:
        if self._text.startswith(QUOTE, self.at):
            return self._marked_string(self.at + len(QUOTE))
        single = _SINGLE_QUOTED.match(self._text, self.at)
        if single is None:
            return super()._string()
        self.at = single.end()
        return re.sub(r"\\(.)", lambda found: _ESCAPES.get(found[1], found[1]), single[1], flags=re.DOTALL)

    def _marked_string(self, start: int) -> str:
        end = self._text.find(QUOTE, start)
        if end >= 0:
            self.at = end + len(QUOTE)
            return self._text[start:end]
        value = self._text[start:].rstrip().removesuffix("".join(reversed(self._expected)))
        if value.rstrip().endswith(tuple(_CLOSERS)) or _ENTRY.search(value):
            raise ValueError("an unterminated string that may end in more than one place")
        self.at = start + len(value)
        return value

    def _bare(self) -> Any:
        constant = _CONSTANT_ALONE.match(self._text, self.at) or _CONSTANT_BEFORE_KEY.match(
            self._text, self.at
        )
        if constant is not None:
            self.at = constant.end()
            return word_value(constant[1])
        end = self._quote_ahead()
        ahead = self._text[self.at : len(self._text) if end < 0 else end]
        word = re.match(rf"[^,;{re.escape(_CLOSERS)}]*", ahead)
        assert word is not None
        if end < 0 or (word.end() < len(ahead.rstrip()) and not self._goes_on(ahead)):
            return self._words(word[0])
        if ahead.rstrip()[-1:] not in tuple(":=,[{("):  # a string without its first mark
            self.at = end + len(QUOTE)
            return ahead
        before_key = _WORDS_BEFORE_KEY.fullmatch(ahead)
        if before_key is None:
            raise ValueError("no value")
        return self._words(before_key[1])

    def _goes_on(self, ahead: str) -> bool:
        """Whether a comma or bracket ahead belongs to a string whose first mark is missing."""
        if ahead.rstrip()[-1:] in tuple(":=,[{("):
            return False
        if _ENTRY.search(ahead):
            raise ValueError("a string without its first mark may begin in more than one place")
        return True

    def _words(self, words: str) -> Any:
        if not words.strip() or _KEY_INSIDE.search(words):
            raise ValueError("no value, or no comma after it")
        self.at += len(words)
        return word_value(words.strip())

    def _quote_ahead(self) -> int:
        if self._next_quote < self.at:
            found = self._text.find(QUOTE, self.at)
            self._next_quote = len(self._text) if found < 0 else found
        return -1 if self._next_quote == len(self._text) else self._next_quote
