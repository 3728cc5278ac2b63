"""Merge JSON schemas that all have to hold (``allOf``, keywords beside ``$ref``) to one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from functools import reduce
from typing import Any

Schema = Mapping[str, Any]


def merge(schemas: Sequence[Schema]) -> dict[str, Any]:
    """One schema for several without ``$ref`` and ``allOf``; may have ``allOf`` again, of fewer keywords.

    Raises ValueError for keywords that can't be merged.
    """
    return reduce(_two, (dict(schema) for schema in schemas))


def _two(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    merged: dict[str, Any] = {**a, **b}
    if any("properties" in each or "additionalProperties" in each for each in (a, b)):
        merged |= _properties(a, b)
    for name in a.keys() & b.keys():
        if name in ("properties", "additionalProperties") or a[name] == b[name]:
            continue
        rule = _RULES.get(name)
        if rule is not None:
            merged[name] = rule(a[name], b[name])
        elif name in ("anyOf", "oneOf"):
            merged[name] = a[name]
            merged["allOf"] = [*merged.get("allOf", ()), {name: b[name]}]
        else:
            raise ValueError(f"{name!r} in several schemas of 'allOf' is not supported")
    return merged


def _properties(a: Schema, b: Schema) -> dict[str, Any]:
    """A property that only one of them names has to satisfy the other's ``additionalProperties``."""
    named: dict[str, Any] = {}
    for name in (*a.get("properties", {}), *b.get("properties", {})):
        parts = [
            each.get("properties", {}).get(name, each.get("additionalProperties", True)) for each in (a, b)
        ]
        named[name] = _both(*parts)
    more = _both(*(each.get("additionalProperties", True) for each in (a, b)))
    return {"properties": named, "additionalProperties": more}


def _both(a: Any, b: Any) -> Any:
    if a is False or b is False:
        return False
    if a in (True, {}) or a == b:
        return b
    return a if b in (True, {}) else {"allOf": [a, b]}


def _types(a: Any, b: Any) -> list[str]:
    """Types of both; an integer is a number."""
    first, second = ([each] if isinstance(each, str) else list(each) for each in (a, b))
    found = [kind for kind in first if kind in second]
    for one, other in ((first, second), (second, first)):
        if "number" in one and "integer" in other and "integer" not in found:
            found.append("integer")
    if not found:
        raise ValueError(f"the types {a!r} and {b!r} exclude each other")
    return found


def _values(a: Sequence[Any], b: Sequence[Any]) -> list[Any]:
    texts = {json.dumps(value, sort_keys=True) for value in b}
    return [value for value in a if json.dumps(value, sort_keys=True) in texts]


def _least_common(a: float, b: float) -> float:
    x, y = Decimal(repr(a)), Decimal(repr(b))
    scale = Decimal(10) ** max(0, *(-int(each.as_tuple().exponent) for each in (x, y)))
    found = Decimal(math.lcm(int(x * scale), int(y * scale))) / scale
    return int(found) if found == found.to_integral_value() else float(found)


def _listed(a: Any, b: Any) -> tuple[Any, ...]:
    """Of strings: the patterns or formats that all have to hold."""
    return tuple(
        dict.fromkeys(each for part in (a, b) for each in ((part,) if isinstance(part, str) else part))
    )


_RULES: dict[str, Callable[[Any, Any], Any]] = {
    "type": _types,
    "enum": _values,
    "required": lambda a, b: list(dict.fromkeys((*a, *b))),
    "items": _both,
    "uniqueItems": lambda a, b: a or b,
    "unevaluatedProperties": _both,
    "nullable": lambda a, b: a and b,
    "pattern": _listed,
    "format": _listed,
    "multipleOf": _least_common,
    **dict.fromkeys(("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"), max),
    **dict.fromkeys(("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"), min),
}
