"""Convert a JSON schema to one regular expression; schemas that can't be guaranteed are rejected.

The expression may allow less than the schema (only single spaces, properties in schema order, no unnamed
property), never more. Keywords that can't be enforced are rejected.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

from pydiffusion.errors import OptionError

from .number_ranges import integer_between, number_between
from .regex import NOTHING, Piece, Unsatisfiable, choice, sequence
from .syntax import JSON, Syntax

# Annotations, which don't affect validity.
_ANNOTATIONS = frozenset(
    ("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$schema", "$id",
     "$comment", "$defs", "definitions", "$anchor", "contentMediaType", "contentEncoding")
)  # fmt: skip
_TYPE_TO_KEYWORDS = {
    "object": ("properties", "required", "additionalProperties", "minProperties", "maxProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems", "uniqueItems"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "integer": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "boolean": (),
    "null": (),
}
_KNOWN = frozenset(k for keywords in _TYPE_TO_KEYWORDS.values() for k in keywords)
_COMBINING = ("$ref", "anyOf", "oneOf", "allOf", "enum", "const")
_DAY = (
    "(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_DATE = "[12][0-9]{3}-" + _DAY
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+\-](?:0[0-9]|1[0-2]):[03]0)"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "ipv4": rf"{_BYTE}(?:\.{_BYTE}){{3}}",
    "email": r"[a-z0-9]+(?:[._\-][a-z0-9]+)*@[a-z0-9]+(?:-[a-z0-9]+)*(?:\.[a-z0-9]+(?:-[a-z0-9]+)*)+",
}
_FORMAT_WEIGHT = 80
# Nesting depth of values that the schema leaves open.
_OPEN_DEPTH = 1
_MAX_DEPTH = 32
_MAX_WITHIN_ITSELF = 6
_MAX_WEIGHT_WITHIN_ITSELF = 600
_OPEN_ITEMS: int | None = None


class SchemaError(OptionError):
    """A schema that is unsupported or unsatisfiable; the message says where."""

    @property
    def what(self) -> str:
        """The message without the option's name."""
        return str(self).removeprefix("json_schema").lstrip(",: ")


def schema_to_regex(schema: Mapping[str, Any] | bool, syntax: Syntax = JSON) -> Piece:
    """Convert a schema. syntax: how values are written. Raises SchemaError.

    A recursive schema is expanded as deep as ``_MAX_WITHIN_ITSELF`` and the size limit allow; deeper texts
    are valid but never generated.
    """
    found = NOTHING
    for depth in range(_MAX_WITHIN_ITSELF + 1):
        compiler = _Compiler(schema, depth, syntax)
        try:
            piece = compiler.value(schema, "", ("#",))
        except SchemaError:
            if found is NOTHING:
                raise
            break
        if piece is NOTHING and compiler.unsatisfied:
            raise compiler.unsatisfied[0]
        if not compiler.contains_itself:
            return piece
        if found is not NOTHING and piece.weight > _MAX_WEIGHT_WITHIN_ITSELF:
            break
        found = piece
    if found is NOTHING:
        raise _error("", "it is recursive, and no text of finite depth satisfies it")
    return found


class _Compiler:
    def __init__(self, root: Any, depth: int, syntax: Syntax) -> None:
        """depth: maximum depth of recursive references."""
        self._root = root
        self._syntax = syntax
        self._depth = depth
        self.contains_itself = False
        self.unsatisfied: list[SchemaError] = []  # what was left out because nothing satisfies it
        self._type_to_rule: dict[str, Callable[[Mapping[str, Any], str, tuple[str, ...]], Piece]] = {
            "object": self._object,
            "array": self._array,
            "string": self._string,
            "integer": self._number,
            "number": self._number,
            "boolean": lambda *_: Piece("(?:true|false)", 5),
            "null": lambda *_: Piece("null", 4),
        }

    def value(self, schema: Any, where: str, refs: tuple[str, ...]) -> Piece:
        """refs: the references that led here, to detect recursion."""
        return self._or_nothing(where, lambda: self._value(schema, where, refs))

    def _or_nothing(self, where: str, make: Callable[[], Piece]) -> Piece:
        """Alternatives without the unsatisfiable ones, if there are others."""
        try:
            return make()
        except SchemaError:
            raise
        except Unsatisfiable as error:
            self.unsatisfied.append(_error(where, str(error)))
            return NOTHING
        except ValueError as error:
            raise _error(where, str(error)) from None
        # a keyword whose value has the wrong type
        except (TypeError, AttributeError, OverflowError) as error:
            raise _error(where, f"it is not a valid JSON schema ({error})") from None

    def _value(self, schema: Any, where: str, refs: tuple[str, ...]) -> Piece:
        if where.count("/") > 2 * _MAX_DEPTH or len(refs) > _MAX_DEPTH:
            raise _error(where, "it is nested too deeply")
        if schema is True or schema == {}:
            return _anything(_OPEN_DEPTH, self._syntax)
        if schema is False:
            raise Unsatisfiable("nothing satisfies false")
        if not isinstance(schema, Mapping):
            raise _error(where, f"{schema!r} is not a schema")
        keywords = {name for name in schema if name not in _ANNOTATIONS}
        combining = [name for name in _COMBINING if name in keywords]
        for name in sorted(keywords - {"type", *combining} - _KNOWN):
            raise _error(where, f"the keyword {name!r} is not supported")
        if combining:
            return self._combined(combining[0], schema, keywords, where, refs)
        kinds = schema.get("type", None)
        if kinds is None:
            kinds = [kind for kind, names in _TYPE_TO_KEYWORDS.items() if keywords & set(names)][:1]
            if not kinds:
                return _anything(_OPEN_DEPTH, self._syntax)
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if not isinstance(kinds, Sequence) or not kinds:
            raise _error(where, f"the type {kinds!r} is invalid")
        pieces = []
        for kind in kinds:
            if kind not in self._type_to_rule:
                raise _error(where, f"the type {kind!r} is invalid")
            rule, typed = self._type_to_rule[kind], {**schema, "type": kind}
            pieces.append(self._or_nothing(where, functools.partial(rule, typed, where, refs)))
        return pieces[0] if len(pieces) == 1 else choice(pieces)

    def _combined(
        self, name: str, schema: Mapping[str, Any], keywords: set[str], where: str, refs: tuple[str, ...]
    ) -> Piece:
        given = schema[name]
        if name in ("enum", "const"):
            return self._one_of_values(given if name == "enum" else [given], schema, keywords - {name}, where)
        if keywords != {name}:
            other = sorted(keywords - {name})[0]
            raise _error(where, f"{name!r} beside {other!r} is not supported")
        if name == "$ref":
            self.contains_itself = self.contains_itself or given in refs
            if refs.count(given) > self._depth:
                return NOTHING
            return self.value(self._resolved(given, where), where, (*refs, given))
        if not isinstance(given, Sequence) or isinstance(given, str) or not given:
            raise _error(where, f"{name!r} must be an array of schemas")
        if name == "allOf" and len(given) > 1:
            raise _error(where, "'allOf' of several schemas is not supported")
        if name == "oneOf":
            self._check_disjoint(given, where)
        pieces = [self.value(each, f"{where}/{name}/{i}", refs) for i, each in enumerate(given)]
        return pieces[0] if len(pieces) == 1 else choice(pieces)

    def _resolved(self, reference: Any, where: str) -> Any:
        return resolved(self._root, reference, where)

    def _one_of_values(self, values: Any, schema: Mapping[str, Any], others: set[str], where: str) -> Piece:
        if not isinstance(values, Sequence) or isinstance(values, str) or not values:
            raise _error(where, "'enum' must be an array of at least one value")
        if others - {"type"}:
            raise _error(where, f"values beside {sorted(others - {'type'})[0]!r} are not supported")
        kinds = schema.get("type")
        if kinds is not None:
            kinds = [kinds] if isinstance(kinds, str) else kinds
            values = [value for value in values if any(_is_of_type(value, kind) for kind in kinds)]
            if not values:
                raise Unsatisfiable("none of the values is of the type: nothing satisfies it")
        return choice([self._syntax.value(value) for value in values])

    def _check_disjoint(self, branches: Sequence[Any], where: str) -> None:
        """``oneOf`` forbids texts that two branches allow: branches must differ by type or by a constant."""
        resolved = [
            self._resolved(b["$ref"], where) if isinstance(b, Mapping) and set(b) == {"$ref"} else b
            for b in branches
        ]
        for a, b in combinations(resolved, 2):
            if not self._are_disjoint(a, b):
                raise _error(where, "'oneOf' of schemas that may overlap is not supported: use 'anyOf'")

    def _are_disjoint(self, a: Any, b: Any) -> bool:
        if not isinstance(a, Mapping) or not isinstance(b, Mapping):
            return False
        values = [_values_of(schema) for schema in (a, b)]
        if None not in values:
            return not set(values[0] or ()) & set(values[1] or ())
        if a.get("type") == b.get("type") == "object":
            shared = set(a.get("required", ())) & set(b.get("required", ()))
            pairs = [
                (_values_of(a.get("properties", {}).get(name)), _values_of(b.get("properties", {}).get(name)))
                for name in shared
            ]
            return any(x and y and not set(x) & set(y) for x, y in pairs)
        kinds = [schema.get("type") for schema in (a, b)]
        if not all(isinstance(kind, str) for kind in kinds):
            return False
        return len({"number" if kind == "integer" else kind for kind in kinds}) == 2

    # Types

    def _object(self, schema: Mapping[str, Any], where: str, refs: tuple[str, ...]) -> Piece:
        properties = schema.get("properties", {})
        required = schema.get("required", [])
        if not isinstance(properties, Mapping) or not isinstance(required, Sequence):
            raise _error(where, "'properties' must be an object and 'required' an array")
        more = schema.get("additionalProperties", True)
        low, high = _bounds(schema, "minProperties", "maxProperties", where)
        if not properties and not required:
            if low > 1:  # keys might be equal
                raise _error(where, "'minProperties' of more than 1 is not supported")
            if more is False or high == 0:
                if low:
                    raise Unsatisfiable("it must have a property and may have none: nothing satisfies it")
                return Piece(r"\{\}", 2)
            member = sequence(
                [
                    self._syntax.any_key,
                    self._syntax.colon,
                    self.value(more, where + "/additionalProperties", refs),
                ]
            )
            return sequence([Piece(r"\{"), _separated(member, low, high, self._syntax), Piece(r"\}")])
        named = dict(properties)
        for name in required:
            if name not in named:
                if more is False:
                    raise Unsatisfiable(f"the property {name!r} is required but not allowed")
                named[name] = more
        if low > len(required) or (high is not None and high < len(named)):
            raise _error(where, "'minProperties' and 'maxProperties' beside 'properties' are not supported")
        members = []
        for name in self._syntax.order(named):
            value = self.value(named[name], f"{where}/properties/{name}", refs)
            member = sequence([self._syntax.key(name), self._syntax.colon, value])
            members.append((member, name in required))
        return sequence([Piece(r"\{"), _members(members, self._syntax), Piece(r"\}")])

    def _array(self, schema: Mapping[str, Any], where: str, refs: tuple[str, ...]) -> Piece:
        low, high = _bounds(schema, "minItems", "maxItems", where)
        first = schema.get("prefixItems", [])
        if schema.get("uniqueItems") and (high is None or high > 1):
            raise _error(where, "'uniqueItems' is not supported")
        items = schema.get("items", True)
        heads = [self.value(each, f"{where}/prefixItems/{i}", refs) for i, each in enumerate(first)]
        if heads:
            if low > len(heads) or (high is not None and high < len(heads)):
                raise _error(where, "'minItems' and 'maxItems' beside 'prefixItems' are not supported")
            inner = [piece for head in heads for piece in (self._syntax.comma, head)][1:]
            return sequence([Piece(r"\["), *inner, Piece(r"\]")])
        if high == 0:
            return Piece(r"\[\]", 2)
        item = self.value(items, f"{where}/items", refs)
        return sequence([Piece(r"\["), _separated(item, low, high, self._syntax), Piece(r"\]")])

    def _string(self, schema: Mapping[str, Any], where: str, refs: tuple[str, ...]) -> Piece:
        low, high = _bounds(schema, "minLength", "maxLength", where)
        kinds = [name for name in ("pattern", "format") if name in schema]
        if kinds and (len(kinds) == 2 or "minLength" in schema or "maxLength" in schema):
            raise _error(where, f"{kinds[0]!r} beside other limits of a string is not supported")
        if "format" in schema:
            if schema["format"] not in _FORMATS:
                raise _error(where, f"the format {schema['format']!r} is not supported")
            return self._syntax.string(Piece(_FORMATS[schema["format"]], _FORMAT_WEIGHT))
        if "pattern" in schema:
            if not isinstance(schema["pattern"], str):
                raise _error(where, "'pattern' must be a string")
            return self._syntax.string(self._syntax.in_string(schema["pattern"]))
        return self._syntax.characters(low, high)

    def _number(self, schema: Mapping[str, Any], where: str, refs: tuple[str, ...]) -> Piece:
        for name in _TYPE_TO_KEYWORDS["number"]:
            bound = schema.get(name)
            is_number = (
                isinstance(bound, (int, float)) and not isinstance(bound, bool) and abs(bound) < math.inf
            )
            if name in schema and not is_number:
                raise _error(where, f"{name!r} must be a finite number")
        is_integer = schema["type"] == "integer"
        if schema.get("multipleOf", 1) != 1 or ("multipleOf" in schema and not is_integer):
            raise _error(where, "'multipleOf' is not supported")
        between = integer_between if is_integer else number_between
        return Piece(
            between(
                schema.get("minimum"), schema.get("maximum"),
                schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum"),
            ),
            40,
        )  # fmt: skip


def resolved(root: Any, reference: Any, where: str = "") -> Any:
    """The schema that a ``$ref`` within another one refers to. Raises SchemaError."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        raise _error(where, f"the reference {reference!r} is not supported: only those within the schema")
    target = root
    for part in reference[1:].split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(target, Mapping) and name in target:
            target = target[name]
        elif isinstance(target, list) and name.isdigit() and int(name) < len(target):
            target = target[int(name)]
        else:
            raise _error(where, f"the reference {reference!r} does not resolve")
    return target


def _error(where: str, what: str) -> SchemaError:
    return SchemaError("json_schema", f"json_schema{', at ' + where[1:] if where else ''}: {what}")


def _bounds(schema: Mapping[str, Any], low_name: str, high_name: str, where: str) -> tuple[int, int | None]:
    low, high = schema.get(low_name, 0), schema.get(high_name)
    for name, value in ((low_name, low), (high_name, high)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise _error(where, f"{name!r} must be an integer of at least 0")
    if high is not None and low > high:
        raise Unsatisfiable(f"{low_name!r} is above {high_name!r}: nothing satisfies it")
    return low, high


def _values_of(schema: Any) -> list[str] | None:
    if not isinstance(schema, Mapping):
        return None
    if "const" in schema:
        return [json.dumps(schema["const"], sort_keys=True)]
    if "enum" in schema:
        return [json.dumps(value, sort_keys=True) for value in schema["enum"]]
    return None


def _is_of_type(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if isinstance(value, float) and kind == "integer":
        return value.is_integer()
    types: dict[Any, Any] = {
        "string": str, "integer": int, "number": (int, float), "object": dict, "array": list,
        "null": type(None),
    }  # fmt: skip
    return kind in types and isinstance(value, types[kind])


def _separated(item: Piece, low: int, high: int | None, syntax: Syntax) -> Piece:
    """``low`` to ``high`` comma-separated items."""
    rest = sequence([syntax.comma, item])
    rest = rest.repeated(max(low - 1, 0), None if high is None else max(high - 1, 0))
    some = sequence([item, rest])
    return some if low else some.repeated(0, 1)


def _members(members: Sequence[tuple[Piece, bool]], syntax: Syntax) -> Piece:
    """Comma-separated members in order; those that are not required may be left out."""
    behind = Piece("", 0)  # what may follow after a member
    at_first = Piece("", 0)  # and without one
    for member, is_required in reversed(members):
        with_comma = sequence([syntax.comma, member])
        here = sequence([member, behind])
        at_first = here if is_required else choice([here, at_first])
        behind = sequence([with_comma if is_required else with_comma.repeated(0, 1), behind])
    return at_first


def _anything(depth: int, syntax: Syntax) -> Piece:
    scalar = choice(
        [
            syntax.characters(0, None),
            Piece(number_between(None, None, None, None), 40),
            Piece("true|false|null", 5),
        ]
    )
    if depth == 0:
        return scalar
    inner = _anything(depth - 1, syntax)
    member = sequence([syntax.any_key, syntax.colon, inner])
    return choice(
        [
            scalar,
            sequence([Piece(r"\["), _separated(inner, 0, _OPEN_ITEMS, syntax), Piece(r"\]")]),
            sequence([Piece(r"\{"), _separated(member, 0, _OPEN_ITEMS, syntax), Piece(r"\}")]),
        ]
    )
