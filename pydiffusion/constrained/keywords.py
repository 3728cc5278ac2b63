"""Keywords of JSON schema: which ones constrain, which ones are refused, what a slip was meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

TYPE_TO_KEYWORDS = {
    "object": ("properties", "required", "additionalProperties", "unevaluatedProperties", "minProperties",
               "maxProperties", "patternProperties", "propertyNames", "dependentRequired"),
    "array": ("items", "prefixItems", "minItems", "maxItems", "uniqueItems", "additionalItems"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "integer": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "boolean": (),
    "null": (),
}  # fmt: skip
COMBINING = ("$ref", "anyOf", "oneOf", "allOf", "enum", "const")
# Constraints that can't be guaranteed.
_REFUSED = frozenset(
    ("not", "if", "then", "else", "contains", "minContains", "maxContains", "dependentSchemas",
     "dependencies", "unevaluatedItems", "$dynamicRef", "$recursiveRef")
)  # fmt: skip
_SUPPORTED = frozenset(
    ("type", "nullable", *COMBINING, *(name for names in TYPE_TO_KEYWORDS.values() for name in names))
)
# Annotations whose names resemble those of constraints.
_ANNOTATIONS = frozenset(("title", "examples", "example", "default", "definitions", "$defs", "$id", "id"))


def constraints_of(schema: Mapping[str, Any]) -> set[str]:
    """The keywords that constrain; all others are annotations, as JSON schema has it.

    Raises ValueError for a constraint that is not supported, and for what must be a slip of one.
    """
    for name in schema:
        if name in _SUPPORTED or name in _ANNOTATIONS or name.startswith("x-"):
            continue
        if name in _REFUSED:
            raise ValueError(f"the keyword {name!r} is not supported")
        meant = _meant(name)
        if meant is not None:
            raise ValueError(f"the keyword {name!r} is not known; is {meant!r} meant?")
    return {name for name in schema if name in _SUPPORTED}


def _meant(name: str) -> str | None:
    plain = {_plain(keyword): keyword for keyword in (*sorted(_SUPPORTED), *sorted(_REFUSED))}
    close = difflib.get_close_matches(_plain(name), plain, n=1, cutoff=0.9)
    return plain[close[0]] if close else None


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")
