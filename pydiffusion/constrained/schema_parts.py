"""Read the parts of a JSON schema, and the error that says where one is wrong."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydiffusion.errors import OptionError

from .byte_dfa import ByteDfa, byte_dfa
from .regex import Unsatisfiable, anywhere

_HIGHEST_BOUND = 2**31  # of repetitions, which Python's parser limits too


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
    return low, None if high is None else min(high, _HIGHEST_BOUND)


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


def _may_match(pattern: str, name: str) -> bool:
    """Whether an expression matches somewhere in a name; if in doubt, it does. Python's own search takes
    exponential time on some, and nothing else runs meanwhile.
    """
    return _name_machine(pattern).accepts(name.encode("utf-8", "replace"))


@functools.lru_cache(maxsize=64)
def _name_machine(pattern: str) -> ByteDfa:
    return byte_dfa(anywhere(pattern).text)


def matching(schema: Mapping[str, Any], name: str, each: Any) -> Any:
    """The schema of a named property, which has to satisfy that of a pattern too."""
    patterns = schema.get("patternProperties") or {}
    found = [other for pattern, other in patterns.items() if _may_match(pattern, name)]
    return {"allOf": [each, *found]} if found else each


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
