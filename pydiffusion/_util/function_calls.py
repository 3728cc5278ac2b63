"""Normalize ``GenerationOptions.function_calls``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydiffusion.errors import OptionError

_FIELDS = ("functions", "max_calls", "otherwise", "reasoning")
_FUNCTION_FIELDS = ("name", "parameters")


def normalized_calls(value: Any) -> dict[str, Any]:
    """The permitted calls with all fields set. Raises OptionError naming the invalid one."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise _refused("", f"it is not valid JSON: {error}") from None
    given = _object(value, "", _FIELDS)
    functions = given.get("functions")
    if not isinstance(functions, Sequence) or isinstance(functions, str) or not functions:
        raise _refused("functions", "give a list of at least one function")
    calls = {
        "functions": [_function(each, f"functions[{i}]") for i, each in enumerate(functions)],
        "max_calls": given.get("max_calls"),
        "otherwise": given.get("otherwise"),
        "reasoning": given.get("reasoning", False),
    }
    if calls["max_calls"] not in (None, 1) or isinstance(calls["max_calls"], bool):
        raise _refused("max_calls", "give 1, or null for any number")
    if calls["otherwise"] not in (None, "text") and not isinstance(calls["otherwise"], (Mapping, bool)):
        raise _refused("otherwise", 'give null, "text" or a JSON schema')
    if not isinstance(calls["reasoning"], bool):
        raise _refused("reasoning", "give true or false")
    return calls


def _function(value: Any, where: str) -> dict[str, Any]:
    given = _object(value, where, _FUNCTION_FIELDS)
    name, parameters = given.get("name"), given.get("parameters")
    if not isinstance(name, str) or not name:
        raise _refused(f"{where}.name", "give the function's name, a string")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise _refused(f"{where}.parameters", "give a JSON schema, an object, or null")
    return {"name": name, "parameters": parameters}


def _object(value: Any, where: str, fields: Sequence[str]) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _refused(where, f"give an object with {', '.join(fields)}, not {type(value).__name__}")
    for name in value:
        if name not in fields:
            raise _refused(where, f"{name!r} is unknown; known are {', '.join(fields)}")
    return value


def _refused(where: str, what: str) -> OptionError:
    return OptionError("function_calls", f"function_calls{'.' if where else ''}{where}: {what}"[:500])
