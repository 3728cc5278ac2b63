"""Arrays without equal items, of a finite number of values."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from .regex import Piece, Unsatisfiable, all_of, choice, sequence

# With more values, only their order in the schema is allowed: every order takes a state per subset.
_MAX_VALUES_IN_ANY_ORDER = 4
_MAX_INTEGERS = 24


def finite_values(schema: Any) -> list[Any] | None:
    """All values of a schema without ``$ref``, if it has few, none of them twice; else None."""
    if not isinstance(schema, dict):
        return None
    if "const" in schema or "enum" in schema:
        values = [schema["const"]] if "const" in schema else list(schema["enum"])
    elif schema.get("type") == "boolean":
        values = [True, False]
    elif schema.get("type") == "integer":
        low, high = schema.get("minimum"), schema.get("maximum")
        if not isinstance(low, int) or not isinstance(high, int) or not 0 <= high - low < _MAX_INTEGERS:
            return None
        values = list(range(low, high + 1))
    else:
        return None
    return list({_key(value): value for value in values}.values())


def _key(value: Any) -> str:
    """Equal for equal values: 1 and 1.0, but not 1 and true."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, sort_keys=True)


def unique_items(items: Sequence[Piece], comma: Piece, low: int, high: int | None) -> Piece:
    """Expression for ``low`` to ``high`` of these items between commas, none twice. Raises Unsatisfiable."""
    high = len(items) if high is None else min(high, len(items))
    if low > high:
        raise Unsatisfiable(f"there are {len(items)} values, and 'minItems' is {low}: nothing satisfies it")
    if len(items) <= _MAX_VALUES_IN_ANY_ORDER:
        some = _in_any_order(list(items), comma, low, high) if high else Piece("", 0)
        return some if low else some.repeated(0, 1)
    found = _in_this_order(items, comma)
    if low == 0 and high == len(items):
        return found
    one = choice(items)
    some = sequence([one, sequence([comma, one]).repeated(max(low - 1, 0), max(high - 1, 0))])
    return all_of([some.repeated(min(low, 1), min(high, 1)), found], Piece(r"\]"))


def _in_any_order(items: list[Piece], comma: Piece, low: int, high: int) -> Piece:
    """At least one of the items."""
    found = []
    for i, item in enumerate(items):
        others = items[:i] + items[i + 1 :]
        if high == 1 or not others:
            found.append(item)
            continue
        more = sequence([comma, _in_any_order(others, comma, low - 1, high - 1)])
        found.append(sequence([item, more if low > 1 else more.repeated(0, 1)]))
    return choice(found)


def _in_this_order(items: Sequence[Piece], comma: Piece) -> Piece:
    """Any of the items, in their order."""
    behind = Piece("", 0)  # what may follow after an item
    found = Piece("", 0)
    for item in reversed(items):
        found = choice([sequence([item, behind]), found])
        behind = sequence([sequence([comma, item]).repeated(0, 1), behind])
    return found
