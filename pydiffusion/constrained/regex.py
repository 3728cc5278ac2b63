"""Reduce Python regular expressions to what ``byte_dfa`` compiles: for whole texts, or inside JSON strings.

The result may match less than the original (``\\d`` is 0 to 9), never more. It is itself a Python expression
with the same meaning under ``re.fullmatch``, which is how it is tested.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from types import MappingProxyType
from typing import Any

from .character_classes import Ranges, as_class, complement, intersection, ranges_of_class
from .regex_parser import sre, sre_parser

# Limit on the characters of an expression with bounded repetitions expanded: the DFA has several states for
# each.
MAX_WEIGHT = 6000
_LINE_FEED = [(10, 10)]
_LINE_ENDS = [*_LINE_FEED, (13, 13), (0x2028, 0x2029)]
# Of what is refused.
_NAMES = {
    sre.AT: "an anchor inside (^, $, \\b)",
    sre.ASSERT: "a look-around inside",
    sre.ASSERT_NOT: "a look-around inside",
    sre.GROUPREF: "a back-reference",
}
_SURROGATES = [(0xD800, 0xDFFF)]
# Characters that need no escape in a JSON string, and all that a JSON string may contain.
_JSON_PLAIN = complement([(0, 31), (34, 34), (92, 92), (127, 159), *_SURROGATES])
JSON_CHARACTER = rf'(?:{as_class(_JSON_PLAIN)}|\\["\\/bfnrt])'
# Escapes of characters that are written without one, but that a string may hold.
_JSON_OTHER_ESCAPES = {"/": r"\\/", "\b": r"\\b", "\f": r"\\f"}
_JSON_ESCAPES = {'"': r"\\\"", "\\": r"\\\\", "\n": r"\\n", "\t": r"\\t", "\r": r"\\r"}


def parse(pattern: str) -> Any:
    """Parse an expression with Python's parser. Raises ValueError for an invalid one."""
    try:
        return sre_parser.parse(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{pattern!r} is not a valid regular expression: {error}"[:300]) from None


@dataclass(frozen=True)
class Piece:
    """A regular expression, and the number of characters of its bounded part."""

    text: str
    weight: int = 1

    def repeated(self, low: int, high: int | None) -> Piece:
        """Repeat this piece ``low`` to ``high`` times; None for unbounded."""
        if self is NOTHING:
            return NOTHING if low else Piece("", 0)
        weight = _checked(self.weight * max(low + 1 if high is None else high, 1))
        return Piece(f"(?:{self.text}){{{low},{'' if high is None else high}}}", weight)

    def counted(self, low: int, high: int) -> Piece:
        """Repeat a character ``low`` to ``high`` times, as ``repeated``; the upper limit takes no states. For
        texts that can end after any character; see ``counting``.
        """
        return Piece(f"(?:{self.text}){{{low},{high}}}?", _checked(self.weight * (low + 1)))


class Oversized(ValueError):
    """An expression is too large to be compiled."""


class Unsatisfiable(ValueError):
    """No text satisfies the constraint."""


#: Matches nothing; used in pieces, never in a final expression.
NOTHING = Piece("(?!)", 0)


def sequence(pieces: Sequence[Piece]) -> Piece:
    if any(piece is NOTHING for piece in pieces):
        return NOTHING
    return Piece("".join(f"(?:{p.text})" for p in pieces), _checked(sum(p.weight for p in pieces)))


def choice(pieces: Sequence[Piece]) -> Piece:
    pieces = [piece for piece in pieces if piece is not NOTHING]
    if not pieces:
        return NOTHING
    return Piece("(?:" + "|".join(p.text for p in pieces) + ")", _checked(sum(p.weight for p in pieces)))


def all_of(pieces: Sequence[Piece], behind: Piece) -> Piece:
    """Expression for texts that all of the pieces match. behind: a character that follows in every one."""
    if any(piece is NOTHING for piece in pieces):
        return NOTHING
    *conditions, last = pieces
    if not conditions:
        return last
    looking = "".join(f"(?=(?:{piece.text}){behind.text})" for piece in conditions)
    return Piece(f"({looking}(?:{last.text}))", _checked(sum(piece.weight for piece in pieces)))


def literal(text: str) -> Piece:
    if any(0xD800 <= ord(character) <= 0xDFFF for character in text):  # in an expression they mean markers
        raise ValueError(f"{text!r} has a lone surrogate, which can't be written"[:200])
    return Piece("".join(map(re.escape, text)), _checked(len(text)))


def _checked(weight: int) -> int:
    if weight > MAX_WEIGHT:
        raise Oversized(f"it is too large: {weight} characters in all; the limit is {MAX_WEIGHT}")
    return weight


def from_regex(pattern: str) -> Piece:
    """Reduce an expression that has to match the whole text. Raises ValueError for unsupported syntax."""
    permitted = complement(_SURROGATES)
    rewriter = _Rewriter(permitted, as_class(permitted), behind=r"\Z")
    return rewriter.anchored(list(parse(pattern)), open_start=False, open_end=False)


def in_json_string(pattern: str) -> Piece:
    """Reduce a schema's ``pattern``: the contents of JSON strings in whose value it matches somewhere."""
    rewriter = _Rewriter(_JSON_PLAIN, JSON_CHARACTER, '"', _JSON_ESCAPES, _JSON_OTHER_ESCAPES)
    return rewriter.anchored(list(parse(pattern)), open_start=True, open_end=True)


def anywhere(pattern: str) -> Piece:
    """Reduce an expression to texts in which it matches somewhere; of what is not exact, to more of them.

    Raises ValueError for unsupported syntax.
    """
    permitted = complement(_SURROGATES)
    rewriter = _Rewriter(permitted, as_class(permitted), behind=r"\Z", wide=True)
    return rewriter.anchored(list(parse(pattern)), open_start=True, open_end=True)


def in_text(pattern: str, permitted: Ranges, behind: Piece) -> Piece:
    """As ``in_json_string``, for strings of these characters that are written without escapes. behind: what
    follows a string.
    """
    rewriter = _Rewriter(permitted, as_class(permitted), behind.text)
    return rewriter.anchored(list(parse(pattern)), open_start=True, open_end=True)


def _looks_ahead(item: Any) -> bool:
    operation, value = item
    return operation in (sre.ASSERT, sre.ASSERT_NOT) and bool(value[0] == 1)


def _is_in(code: int, ranges: Ranges) -> bool:
    return any(low <= code <= high for low, high in ranges)


class _Rewriter:
    def __init__(
        self,
        permitted: Ranges,
        character: str,
        behind: str,
        escapes: Mapping[str, str] = MappingProxyType({}),
        other_escapes: Mapping[str, str] = MappingProxyType({}),
        wide: bool = False,
    ) -> None:
        """permitted: characters that stand for themselves.  character: expression for any one.
        behind: what follows the text.
        escapes: those that are written otherwise.  other_escapes: those that may be.
        wide: reduce to more than the original matches, not to less; for what must not match.
        """
        self._permitted = permitted
        self._character = character
        self._behind = behind
        self._escapes = escapes
        self._other_escapes = other_escapes
        self._wide = wide
        self._operation_to_rule: dict[Any, Callable[[Any], Piece]] = {
            sre.LITERAL: self._literal,
            sre.NOT_LITERAL: lambda code: self._class(complement([(code, code)])),
            sre.ANY: lambda _: self._class(complement(_LINE_FEED if wide else _LINE_ENDS)),
            sre.IN: lambda entries: self._class(ranges_of_class(entries, wide)),
            sre.BRANCH: lambda value: choice([self._sequence(branch) for branch in value[1]]),
            sre.SUBPATTERN: self._group,
            sre.MAX_REPEAT: self._repeat,
            sre.MIN_REPEAT: self._repeat,
        }

    def anchored(self, items: list[Any], open_start: bool, open_end: bool) -> Piece:
        """Strip the anchors. An end without an anchor may be preceded or followed by anything."""
        if items and items[0] in ((sre.AT, sre.AT_BEGINNING), (sre.AT, sre.AT_BEGINNING_STRING)):
            items, open_start = items[1:], False
        if items and items[-1] in ((sre.AT, sre.AT_END), (sre.AT, sre.AT_END_STRING)):
            # To Python, $ is also before a line feed at the end.
            line_feed = [(sre.MAX_REPEAT, (0, 1, [(sre.LITERAL, 10)]))] * self._wide
            items, open_end = items[:-1] + line_feed, False
        if len(items) == 1 and items[0][0] is sre.BRANCH:
            return choice([self.anchored(list(b), open_start, open_end) for b in items[0][1][1]])
        if items and _looks_ahead(items[0]) and not open_start:
            return self._after_look(items, open_end)
        anything = Piece(self._character).repeated(0, None)
        before, after = [anything] * open_start, [anything] * open_end
        return sequence([*before, self._sequence(items), *after])

    def _after_look(self, items: list[Any], open_end: bool) -> Piece:
        """Items of which the first ones are look-aheads, at the beginning of the text."""
        looks = list(takewhile(_looks_ahead, items))
        rest = self.anchored(items[len(looks) :], open_start=False, open_end=open_end)
        text, weight = "", rest.weight
        for operation, (_, content) in looks:
            is_not = operation is sre.ASSERT_NOT
            found = self._looking(is_not).anchored(list(content), open_start=False, open_end=True)
            if found is not NOTHING:
                text += f"(?{'!' if is_not else '='}(?:{found.text}){self._behind})"
                weight += found.weight
            elif not is_not:
                return NOTHING
        return rest if rest is NOTHING else Piece(f"({text}(?:{rest.text}))", _checked(weight))

    def _looking(self, is_not: bool) -> _Rewriter:
        if is_not == self._wide:
            return self
        others = (self._behind, self._escapes, self._other_escapes)
        return _Rewriter(self._permitted, self._character, *others, wide=is_not)

    def _sequence(self, items: Any) -> Piece:
        return sequence([self._item(operation, value) for operation, value in items])

    def _item(self, operation: Any, value: Any) -> Piece:
        rule = self._operation_to_rule.get(operation)
        if rule is None:
            name = _NAMES.get(operation, str(operation).lower())
            raise ValueError(f"a regular expression with {name} is not supported")
        return rule(value)

    def _literal(self, code: int) -> Piece:
        character = chr(code)
        if character in self._escapes and not self._wide:
            return Piece(self._escapes[character])
        return self._class([(code, code)])

    def _class(self, ranges: list[tuple[int, int]]) -> Piece:
        permitted = intersection(ranges, self._permitted)
        if self._wide:
            escapes = {**self._escapes, **self._other_escapes}
            within = [text for character, text in escapes.items() if _is_in(ord(character), ranges)]
            return choice([*([Piece(as_class(permitted))] if permitted else []), *map(Piece, within)])
        if not permitted:
            raise ValueError("a regular expression has a class of which no character can be written")
        return Piece(as_class(permitted))

    def _group(self, value: Any) -> Piece:
        _, added, removed, items = value
        if added or removed:
            raise ValueError("a regular expression with flags is not supported")
        return self._sequence(items)

    def _repeat(self, value: Any) -> Piece:
        low, high, items = value
        return self._sequence(items).repeated(low, None if high is sre.MAXREPEAT else high)
