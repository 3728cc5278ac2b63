"""Read the parts of a JSON schema, and the error that says where one is wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from pydiffusion.errors import OptionError

from .byte_dfa import ByteDfa, byte_dfa
from .regex import Unsatisfiable, all_of
from .syntax import JSON


class SchemaError(OptionError):
    """A schema that is unsupported or unsatisfiable; the message says where."""

    @property
    def what(self) -> str:
        """The message without the option's name."""
        return str(self).removeprefix("json_schema").lstrip(",: ")


def schema_error(where: str, what: str) -> SchemaError:
    return SchemaError("json_schema", f"json_schema{', at ' + where[1:] if where else ''}: {what}")


def resolved(root: Any, reference: Any, where: str = "") -> Any:
    """The schema that a ``$ref`` within another one refers to. Raises SchemaError."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        raise schema_error(
            where, f"the reference {reference!r} is not supported: only those within the schema"
        )
    target = root
    for part in reference[1:].split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(target, Mapping) and name in target:
            target = target[name]
        elif isinstance(target, list) and name.isdigit() and int(name) < len(target):
            target = target[int(name)]
        else:
            raise schema_error(where, f"the reference {reference!r} does not resolve")
    return target


def bounds(schema: Mapping[str, Any], low_name: str, high_name: str, where: str) -> tuple[int, int | None]:
    low, high = schema.get(low_name, 0), schema.get(high_name)
    for name, value in ((low_name, low), (high_name, high)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise schema_error(where, f"{name!r} must be an integer of at least 0")
    if high is not None and low > high:
        raise Unsatisfiable(f"{low_name!r} is above {high_name!r}: nothing satisfies it")
    return low, high


def strings(schema: Mapping[str, Any], name: str, where: str) -> tuple[str, ...]:
    """The keyword's value, or after merging values."""
    given = schema.get(name, ())
    values = (given,) if isinstance(given, str) else given
    if not isinstance(values, tuple) or not all(isinstance(value, str) for value in values):
        raise schema_error(where, f"{name!r} must be a string")
    return values


def with_exclusive_numbers(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Without ``exclusiveMinimum: true`` beside ``minimum``, as draft 4 and OpenAPI 3.0 have it."""
    numbers = dict(schema)
    for exclusive, inclusive in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if isinstance(schema.get(exclusive), bool) and inclusive in schema:
            del numbers[exclusive]
            if schema[exclusive]:
                numbers[exclusive] = numbers.pop(inclusive)
    return numbers


def with_dependent(
    schema: Mapping[str, Any], properties: Mapping[str, Any], required: Sequence[str]
) -> tuple[Mapping[str, Any], Sequence[str]]:
    """``dependentRequired``: the output is narrower, with both properties or without the one that needs the
    other.
    """
    dependent = schema.get("dependentRequired", {})
    needed = list(required)
    for name in needed:  # which grows
        needed += [other for other in dependent.get(name, ()) if other not in needed]
    left_out = {name for name, others in dependent.items() if set(others) - set(needed)} - set(needed)
    return {name: each for name, each in properties.items() if name not in left_out}, needed


def matching(schema: Mapping[str, Any], name: str, each: Any) -> Any:
    """The schema of a named property, which has to satisfy that of a pattern too."""
    patterns = schema.get("patternProperties") or {}
    found = [other for pattern, other in patterns.items() if _matches(pattern, name)]
    return {"allOf": [each, *found]} if found else each


def _matches(pattern: str, name: str) -> bool:
    """Whether a pattern of ``patternProperties`` matches a name. Raises ValueError if that is not known."""
    text = json.dumps(name, ensure_ascii=False).encode()
    if not _accepts(_matched_names(""), text):
        raise ValueError(f"the name {name!r} beside 'patternProperties' is not supported"[:200])
    return _accepts(_matched_names(pattern), text)


@lru_cache(maxsize=64)
def _matched_names(pattern: str) -> ByteDfa:
    """JSON strings that the pattern matches. Python's re may take forever for a hostile one."""
    machine = byte_dfa(JSON.string(all_of([JSON.in_string(pattern)], JSON.quote)).text)
    if machine.limits.any():
        raise ValueError(f"the pattern {pattern!r} in 'patternProperties' is too large"[:200])
    return machine


def _accepts(machine: ByteDfa, text: bytes) -> bool:
    state = 0
    for byte in text:
        state = int(machine.table[state, byte])
    return state < len(machine.accepting) and bool(machine.accepting[state])


def values_of(schema: Any) -> list[str] | None:
    if not isinstance(schema, Mapping):
        return None
    if "const" in schema:
        return [json.dumps(schema["const"], sort_keys=True)]
    if "enum" in schema:
        return [json.dumps(value, sort_keys=True) for value in schema["enum"]]
    return None


def is_of_type(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if isinstance(value, float) and kind == "integer":
        return value.is_integer()
    types: dict[Any, Any] = {
        "string": str, "integer": int, "number": (int, float), "object": dict, "array": list,
        "null": type(None),
    }  # fmt: skip
    return kind in types and isinstance(value, types[kind])
