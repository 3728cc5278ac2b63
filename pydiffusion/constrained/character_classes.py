"""Character classes as sorted ranges of code points."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from functools import cache
from typing import Any, TypeAlias

from .regex_parser import sre

Ranges: TypeAlias = list[tuple[int, int]]
_LAST = sys.maxunicode
_CATEGORY_TO_CLASS = {
    sre.CATEGORY_DIGIT: r"\d",
    sre.CATEGORY_NOT_DIGIT: r"\D",
    sre.CATEGORY_SPACE: r"\s",
    sre.CATEGORY_NOT_SPACE: r"\S",
    sre.CATEGORY_WORD: r"\w",
    sre.CATEGORY_NOT_WORD: r"\W",
}

_POSITIVE = (sre.CATEGORY_DIGIT, sre.CATEGORY_SPACE, sre.CATEGORY_WORD)
_NEGATIVE = (sre.CATEGORY_NOT_DIGIT, sre.CATEGORY_NOT_SPACE, sre.CATEGORY_NOT_WORD)
_CATEGORY_TO_OPPOSITE = dict(zip(_POSITIVE + _NEGATIVE, _NEGATIVE + _POSITIVE, strict=True))


def union(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Merge overlapping and adjacent ranges."""
    joined: Ranges = []
    for low, high in sorted(ranges):
        if joined and low <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(joined[-1][1], high))
        else:
            joined.append((low, high))
    return joined


def complement(ranges: Iterable[tuple[int, int]]) -> Ranges:
    rest: Ranges = []
    begin = 0
    for low, high in union(ranges):
        if low > begin:
            rest.append((begin, low - 1))
        begin = high + 1
    return [*rest, (begin, _LAST)] if begin <= _LAST else rest


def intersection(a: Iterable[tuple[int, int]], b: Iterable[tuple[int, int]]) -> Ranges:
    return complement([*complement(a), *complement(b)])


def ranges_of_class(entries: Any, wide: bool = False) -> Ranges:
    """Ranges of a class from Python's parser: what it means by every definition, or with ``wide`` by any.
    Raises ValueError for unsupported classes.
    """
    negated = entries[0][0] is sre.NEGATE
    ranges: Ranges = []
    for operation, value in entries[negated:]:
        if operation is sre.LITERAL:
            ranges.append((value, value))
        elif operation is sre.RANGE:
            ranges.append(tuple(value))
        elif operation is sre.CATEGORY:
            # What a negated class leaves out is wide where the class is to be narrow.
            ranges += _widest(value) if wide != negated else _category(value)
        else:
            raise ValueError("a regular expression with this class is not supported")
    if negated and not wide and any(operation is sre.CATEGORY for operation, _ in entries):
        return intersection(complement(ranges), [(0, 127)])  # beyond ASCII, definitions of classes differ
    return complement(ranges) if negated else union(ranges)


def _widest(category: Any) -> Ranges:
    return complement(_category(_CATEGORY_TO_OPPOSITE[category]))


@cache
def _category(category: Any) -> Ranges:
    """Ranges of a category, as Python's re finds them. JSON schema has ASCII digits, spaces
    and letters only, Python more: those beyond ASCII are in neither \\d nor \\D here, so that both
    definitions hold.
    """
    ascii_matches = re.compile(_CATEGORY_TO_CLASS[category], re.ASCII).match
    matches = re.compile(_CATEGORY_TO_CLASS[category]).match
    # Python has a few spaces below 128 that JSON schema doesn't have.
    below = [(c, c) for c in range(128) if ascii_matches(chr(c)) and matches(chr(c))]
    if category not in (sre.CATEGORY_NOT_DIGIT, sre.CATEGORY_NOT_SPACE):
        return union(below)
    beyond = "".join(map(chr, range(128, _LAST + 1)))
    runs = re.finditer(f"{_CATEGORY_TO_CLASS[category]}+", beyond)
    return union(below + [(128 + run.start(), 127 + run.end()) for run in runs])


def as_class(ranges: Ranges) -> str:
    """Write ranges as a class in Python's syntax."""
    return "[" + "".join(f"{_escape(low)}-{_escape(high)}" for low, high in ranges) + "]"


def _escape(code: int) -> str:
    return f"\\U{code:08x}"
