"""Random JSON schemas within the supported subset."""

from __future__ import annotations

import random
from typing import Any

_NAMES = ("name", "age", "größe", "a b", 'quo"te', "x", "y", "items")
_PATTERNS = ("^[a-z]{2,4}$", "^(yes|no)$", "ab?c", r"^\d{3}-\d{2}$", "^[^x]{1,3}$", '^"q"$', "[A-Z]$")
_FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "email")


def random_schema(rng: random.Random, depth: int = 2) -> Any:
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "any"]
    if depth:
        kinds += ["object", "object", "array", "anyOf", "types"] * 2
    return _MAKERS[rng.choice(kinds)](rng, depth)


def _string(rng: random.Random, depth: int) -> Any:
    schema: dict[str, Any] = {"type": "string"}
    choice = rng.random()
    if choice < 0.3:
        schema["pattern"] = rng.choice(_PATTERNS)
    elif choice < 0.5:
        schema["format"] = rng.choice(_FORMATS)
    elif choice < 0.8:
        schema["minLength"] = rng.randint(0, 3)
        schema["maxLength"] = schema["minLength"] + rng.randint(0, 6)
    return schema


def _numeric(rng: random.Random, kind: str) -> Any:
    schema: dict[str, Any] = {"type": kind}
    low: float = rng.randint(-1200, 1200) if rng.random() < 0.7 else rng.randint(-3, 3)
    if kind == "number" and rng.random() < 0.5:
        low = low / rng.choice([7, 8, 1000])
    if rng.random() < 0.6:
        schema[rng.choice(["minimum", "exclusiveMinimum"])] = low
    if rng.random() < 0.6:
        schema[rng.choice(["maximum", "exclusiveMaximum"])] = low + rng.choice([0.01, 2, 7, 100, 5000])
    return schema


def _object(rng: random.Random, depth: int) -> Any:
    names = rng.sample(_NAMES, rng.randint(0, 4))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: random_schema(rng, depth - 1) for name in names},
        "required": [name for name in names if rng.random() < 0.6],
    }
    if rng.random() < 0.5:
        schema["additionalProperties"] = False
    elif not names:
        schema["additionalProperties"] = random_schema(rng, depth - 1)
    return schema


def _array(rng: random.Random, depth: int) -> Any:
    if rng.random() < 0.2:
        return {
            "type": "array",
            "prefixItems": [random_schema(rng, depth - 1) for _ in range(2)],
            "minItems": 2,
        }
    schema: dict[str, Any] = {"type": "array", "items": random_schema(rng, depth - 1)}
    if rng.random() < 0.6:
        schema["minItems"] = rng.randint(0, 2)
        schema["maxItems"] = schema["minItems"] + rng.randint(0, 2)
    return schema


_VALUES = ("red", "gr\u00fcn", 3, -1.5, None, True, ["a", 1], {"k": "v"}, 'say "hi"\n')
_MAKERS = {
    "string": _string,
    "integer": lambda rng, depth: _numeric(rng, "integer"),
    "number": lambda rng, depth: _numeric(rng, "number"),
    "boolean": lambda rng, depth: {"type": "boolean"},
    "null": lambda rng, depth: {"type": "null"},
    "enum": lambda rng, depth: {"enum": rng.sample(_VALUES, 3)},
    "const": lambda rng, depth: {"const": rng.choice(_VALUES)},
    "any": lambda rng, depth: rng.choice([True, {}]),
    "object": _object,
    "array": _array,
    "anyOf": lambda rng, depth: {"anyOf": [random_schema(rng, depth - 1) for _ in range(2)]},
    "types": lambda rng, depth: {"type": rng.sample(["string", "integer", "null", "boolean"], 2)},
}
