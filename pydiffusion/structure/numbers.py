"""Numbers between bounds as regular expressions over their decimal digits."""

from __future__ import annotations

import math

# Digits that a number without bounds may have: what every reader takes without loss.
_MAX_DIGITS = 15
_FRACTION = r"(?:\.[0-9]{1,6})"
_Number = int | float | None


def integer_between(
    minimum: _Number, maximum: _Number, exclusive_minimum: _Number, exclusive_maximum: _Number
) -> str:
    """Integers within the bounds. Raises ValueError where there are none."""
    low = _highest(
        None if minimum is None else math.ceil(minimum),
        None if exclusive_minimum is None else math.floor(exclusive_minimum) + 1,
    )
    high = _lowest(
        None if maximum is None else math.floor(maximum),
        None if exclusive_maximum is None else math.ceil(exclusive_maximum) - 1,
    )
    largest = 10**_MAX_DIGITS - 1
    low, high = -largest if low is None else low, largest if high is None else high
    if low > high:
        raise ValueError("no integer is within the bounds: nothing satisfies it")
    if max(abs(low), abs(high)) > largest:
        low, high = max(low, -largest), min(high, largest)
        if low > high:
            raise ValueError(f"bounds of more than {_MAX_DIGITS} digits are not supported")
    parts = []
    if high >= 0:
        parts.append(_digits_between(max(low, 0), high))
    if low < 0:
        parts.append("-(?:" + _digits_between(max(1, -high), -low) + ")")
    return "(?:" + "|".join(parts) + ")"


def number_between(
    minimum: _Number, maximum: _Number, exclusive_minimum: _Number, exclusive_maximum: _Number
) -> str:
    """Numbers within the bounds; between whole ones all of up to 6 decimals. Raises ValueError for none."""
    bounds = (minimum, maximum, exclusive_minimum, exclusive_maximum)
    if all(bound is None for bound in bounds):
        return r"-?(?:0|[1-9][0-9]{0,14})(?:\.[0-9]{1,15})?(?:[eE][+\-]?[0-9]{1,2})?"
    low = _highest(minimum, exclusive_minimum)
    high = _lowest(maximum, exclusive_maximum)
    low_is_out = exclusive_minimum is not None and low == exclusive_minimum
    high_is_out = exclusive_maximum is not None and high == exclusive_maximum
    parts = []
    if high is None or high >= 0:
        start = 0 if low is None or low < 0 else low
        parts += _magnitudes(start, high, low_is_out and start == low, high_is_out)
    if low is None or low < 0:
        start = 0 if high is None or high > 0 else -high
        end = None if low is None else -low
        inner_is_out = start == 0 and (high is not None and high == 0 and high_is_out)
        inner_is_out = inner_is_out or (start > 0 and high_is_out)
        parts += ["-(?:" + part + ")" for part in _magnitudes(start, end, inner_is_out, low_is_out)]
    if not parts:
        raise ValueError("no number of few digits is within the bounds: nothing is known to satisfy it")
    return "(?:" + "|".join(parts) + ")"


def _magnitudes(low: int | float, high: _Number, low_is_out: bool, high_is_out: bool) -> list[str]:
    """Of numbers from low >= 0 to high, without their signs."""
    first = math.ceil(low)
    last = 10**_MAX_DIGITS - 1 if high is None else min(math.floor(high), 10**_MAX_DIGITS - 1)
    parts = []
    if first < last:
        inner = first + 1 if low_is_out and first == low else first
        if inner != first:
            parts.append(rf"{first}\.[0-9]{{0,5}}[1-9]")
        if inner <= last - 1:
            parts.append(f"(?:{_digits_between(inner, last - 1)}){_FRACTION}?")
    alone_is_out = (high_is_out and last == high) or (low_is_out and last == low)
    if first <= last and not alone_is_out:
        parts.append(str(last))
    return parts


def _highest(*values: _Number) -> _Number:
    return max((value for value in values if value is not None), default=None)


def _lowest(*values: _Number) -> _Number:
    return min((value for value in values if value is not None), default=None)


def _digits_between(low: int, high: int) -> str:
    """Integers from low >= 0 to high, without leading zeros."""
    parts = []
    while low <= high:
        end = min(high, 10 ** len(str(low)) - 1)  # of as many digits
        parts += _same_length(str(low), str(end))
        low = end + 1
    return "(?:" + "|".join(parts) + ")"


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
