"""Number ranges as regular expressions over decimal digits.

A bound is the decimal that it is written as: 0.1 is one tenth. Bounded numbers have no exponent and at most
15 digits. Two decimals of so few digits never round to the same float, nor does the longer repr of a float
round to one of fewer digits: so a validator that compares floats agrees.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from decimal import Decimal
from typing import NamedTuple

from .regex import Unsatisfiable

# Maximum digits of a number, not counting a 0 before the point: all parsers read so many without loss.
_MAX_DIGITS = 15
_Number = int | float | None


class _Bound(NamedTuple):
    value: Decimal
    is_out: bool  # whether the bound itself is excluded


class _Rest(NamedTuple):
    """Remaining digits of a bound whose digits so far equal the number's."""

    digits: str  # after the point, without trailing zeros
    is_out: bool


def integer_between(
    minimum: _Number, maximum: _Number, exclusive_minimum: _Number, exclusive_maximum: _Number
) -> str:
    """Expression for the integers within the bounds. Raises ValueError if there are none."""
    low = _highest(
        None if minimum is None else math.ceil(minimum),
        None if exclusive_minimum is None else math.floor(exclusive_minimum) + 1,
    )
    high = _lowest(
        None if maximum is None else math.floor(maximum),
        None if exclusive_maximum is None else math.ceil(exclusive_maximum) - 1,
    )
    largest = 10**_MAX_DIGITS - 1
    low = -largest if low is None else max(low, -largest)
    high = largest if high is None else min(high, largest)
    if low > high:
        raise _nothing("integer")
    parts = []
    if high >= 0:
        parts.append(_digits_between(max(low, 0), high))
    if low < 0:
        parts.append("-(?:" + _digits_between(max(1, -high), -low) + ")")
    return "(?:" + "|".join(parts) + ")"


def number_between(
    minimum: _Number, maximum: _Number, exclusive_minimum: _Number, exclusive_maximum: _Number
) -> str:
    """Expression for the numbers within the bounds: up to 15 digits, no exponent, a minus only if numbers
    below 0 are allowed. Raises ValueError if there are none.
    """
    bounds = (minimum, maximum, exclusive_minimum, exclusive_maximum)
    if all(bound is None for bound in bounds):
        return r"-?(?:0|[1-9][0-9]{0,14})(?:\.[0-9]{1,15})?(?:[eE][+\-]?[0-9]{1,2})?"
    limit = _Bound(Decimal(10**_MAX_DIGITS), True)
    low = max([*_bounds(minimum, exclusive_minimum), limit._replace(value=-limit.value)])
    high = min(
        [*_bounds(maximum, exclusive_maximum), limit], key=lambda bound: (bound.value, not bound.is_out)
    )
    zero = _Bound(Decimal(0), False)
    parts = []
    if high.value >= 0:
        parts += _magnitudes(max(low, zero), high)
    if low.value < 0:
        inner = zero if high.value > 0 else _Bound(-high.value, high.is_out)
        outer = _Bound(-low.value, low.is_out)
        parts += ["-(?:" + part + ")" for part in _magnitudes(inner, outer)]
    if not parts:
        raise _nothing("number")
    return "(?:" + "|".join(parts) + ")"


def _nothing(kind: str) -> Unsatisfiable:
    what = f"no {kind} of up to {_MAX_DIGITS} digits is within the bounds"
    return Unsatisfiable(f"{what}: nothing satisfies it")


def _bounds(inclusive: _Number, exclusive: _Number) -> list[_Bound]:
    given = ((inclusive, False), (exclusive, True))
    return [_Bound(Decimal(repr(value)), is_out) for value, is_out in given if value is not None]


def _magnitudes(low: _Bound, high: _Bound) -> list[str]:
    """Expressions for the numbers from low >= 0 to high, without sign."""
    first, low_rest = _split(low)
    last, high_rest = _split(high)
    if first > last:
        return []
    spans: list[tuple[int, int, _Rest | None, _Rest | None]]
    if first == last:
        spans = [(first, last, low_rest, high_rest)]
    else:
        between = [(begin, end, None, None) for begin, end in _by_length(first + 1, last - 1)]
        spans = [(first, first, low_rest, None), *between, (last, last, None, high_rest)]
    parts = []
    for begin, end, from_low, to_high in spans:
        n_digits = len(str(begin)) if begin else 0
        fraction = _digits(r"\.", from_low, to_high, _MAX_DIGITS - n_digits)
        if fraction is not None:
            parts.append(_digits_between(begin, end) + fraction)
    return parts


def _split(bound: _Bound) -> tuple[int, _Rest]:
    """Split into the digits before and after the point."""
    whole, _, fraction = f"{bound.value:f}".partition(".")
    return int(whole), _Rest(fraction.rstrip("0"), bound.is_out)


def _digits(before: str, low: _Rest | None, high: _Rest | None, room: int) -> str | None:
    """Expression for nothing, or ``before`` and up to ``room`` digits that keep within the bounds. A bound of
    None: an earlier digit has decided. None if no digits do.
    """
    if low == ("", False):
        low = None  # no continuation could be below it
    if high == ("", True):
        return None
    some = _some_digits(low, high, room)
    if low is None:
        return "" if some is None else f"(?:{before}{some})?"
    return None if some is None else before + some


def _some_digits(low: _Rest | None, high: _Rest | None, room: int) -> str | None:
    """As ``_digits``, but 1 to ``room`` of them."""
    if room < 1:
        return None
    if low is None and high is None:
        return f"[0-9]{{1,{room}}}"
    first = int(low.digits[:1] or 0) if low else 0
    last = int(high.digits[:1] or 0) if high else 9
    bounds_to_digits: dict[tuple[_Rest | None, _Rest | None], str] = {}
    for digit in range(first, last + 1):
        next_low = _Rest(low.digits[1:], low.is_out) if low and digit == first else None
        next_high = _Rest(high.digits[1:], high.is_out) if high and digit == last else None
        found = bounds_to_digits.get((next_low, next_high), "")
        bounds_to_digits[next_low, next_high] = found + str(digit)
    parts = []
    for (next_low, next_high), digits in bounds_to_digits.items():
        rest = _digits("", next_low, next_high, room - 1)
        if rest is not None:
            parts.append(f"[{digits}]{rest}")
    return "(?:" + "|".join(parts) + ")" if parts else None


def _highest(*values: _Number) -> _Number:
    return max((value for value in values if value is not None), default=None)


def _lowest(*values: _Number) -> _Number:
    return min((value for value in values if value is not None), default=None)


def _by_length(low: int, high: int) -> Iterator[tuple[int, int]]:
    """Split the integers from low >= 0 to high into ranges of equal digit count; 0 is its own range."""
    while low <= high:
        end = min(high, 10 ** len(str(low)) - 1 if low else 0)
        yield low, end
        low = end + 1


def _digits_between(low: int, high: int) -> str:
    """Expression for the integers from low >= 0 to high, of equal digit count."""
    ranges = _by_length(low, high)
    return "(?:" + "|".join(part for a, b in ranges for part in _same_length(str(a), str(b))) + ")"


def _same_length(low: str, high: str) -> list[str]:
    if not low:
        return [""]
    if set(low) == {"0"} and set(high) == {"9"}:
        return ["[0-9]" + (f"{{{len(low)}}}" if len(low) > 1 else "")]
    if low[0] == high[0]:
        return [low[0] + rest for rest in _same_length(low[1:], high[1:])]
    tail = len(low) - 1
    parts = [low[0] + rest for rest in _same_length(low[1:], "9" * tail)]
    first, last = int(low[0]) + 1, int(high[0]) - 1
    if tail == 0:
        return [f"[{low[0]}-{high[0]}]"]
    if set(low[1:]) == {"0"}:
        parts, first = [], int(low[0])
    ends = [high[0] + rest for rest in _same_length("0" * tail, high[1:])]
    if set(high[1:]) == {"9"}:
        ends, last = [], int(high[0])
    middle = [f"[{first}-{last}][0-9]{{{tail}}}"] if first <= last else []
    return parts + middle + ends
