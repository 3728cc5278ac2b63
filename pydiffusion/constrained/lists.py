"""Expressions of comma-separated values, and of values that a schema leaves open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .number_ranges import number_between
from .regex import NOTHING, Piece, choice, sequence
from .syntax import Syntax


def separated(item: Piece, low: int, high: int | None, syntax: Syntax) -> Piece:
    """``low`` to ``high`` comma-separated items."""
    rest = sequence([syntax.comma, item])
    rest = rest.repeated(max(low - 1, 0), None if high is None else max(high - 1, 0))
    some = sequence([item, rest])
    return some if low else some.repeated(0, 1)


def members_of(members: Sequence[tuple[Piece, bool]], syntax: Syntax) -> Piece:
    """Comma-separated members in order; those that are not required may be left out."""
    first = next((i for i, (_, is_required) in enumerate(members) if is_required), None)
    if first is None:
        return _some([member for member, _ in members], syntax).repeated(0, 1)
    before = [sequence([member, syntax.comma]).repeated(0, 1) for member, _ in members[:first]]
    after = [
        sequence([syntax.comma, member]).repeated(int(is_required), 1)
        for member, is_required in members[first + 1 :]
    ]
    return sequence([*before, members[first][0], *after])


def _some(members: Sequence[Piece], syntax: Syntax) -> Piece:
    """At least one of the members, comma-separated and in order. In halves, which keeps it small: some of the
    first and any of the second, or some of the second.
    """
    if len(members) < 2:
        return members[0] if members else Piece("", 0)
    half = len(members) // 2
    rest = [sequence([syntax.comma, member]).repeated(0, 1) for member in members[half:]]
    found = choice([sequence([_some(members[:half], syntax), *rest]), _some(members[half:], syntax)])
    if found is NOTHING:
        return NOTHING
    return replace(found, weight=sum(member.weight for member in members))  # what recurs shares its states


def anything(depth: int, syntax: Syntax) -> Piece:
    scalar = choice(
        [
            syntax.characters(0, None),
            Piece(number_between(None, None, None, None), 40),
            Piece("true|false|null", 5),
        ]
    )
    if depth == 0:
        return scalar
    inner = anything(depth - 1, syntax)
    member = sequence([syntax.any_key, syntax.colon, inner])
    return choice(
        [
            scalar,
            sequence([Piece(r"\["), separated(inner, 0, None, syntax), Piece(r"\]")]),
            sequence([Piece(r"\{"), separated(member, 0, None, syntax), Piece(r"\}")]),
        ]
    )
