"""Convert a JSON schema to one regular expression; schemas that can't be guaranteed are rejected.

The expression may allow less than the schema (only single spaces, properties in schema order, no unnamed
property), never more. Keywords that can't be enforced are rejected, or listed as unenforced.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import combinations
from typing import Any

from .byte_dfa import byte_dfa, restricted
from .formats import ANY_VALUE, FORMATS
from .keywords import COMBINING, TYPE_TO_KEYWORDS, constraints_of
from .lists import anything, members_of, separated
from .merging import merge
from .multiples import condition, multiple_table
from .number_ranges import integer_between, number_between
from .regex import NOTHING, Oversized, Piece, Unsatisfiable, all_of, choice, sequence
from .schema_parts import (
    SchemaError,
    bounds,
    is_of_type,
    matching,
    resolved,
    schema_error,
    strings,
    values_of,
    with_dependent,
    with_exclusive_numbers,
)
from .syntax import JSON, Syntax
from .unique_items import finite_values, unique_items

_FORMAT_WEIGHT = 80
# Nesting depth of values that the schema leaves open.
_OPEN_DEPTH = 1
_MAX_DEPTH = 32
_MAX_WITHIN_ITSELF = 6
_MAX_WEIGHT_WITHIN_ITSELF = 600
# Schemas that are visited, with those that references lead to, again and again. Others of the limits count
# what is written, and so not what nothing satisfies.
_MAX_VISITED = 20_000
_MAX_PAIRS = 60_000  # of the branches of a ``oneOf``, which are compared with each other
# Longer strings are counted beside the states; with a pattern or format, whose states multiply, shorter ones.
LONGEST_IN_STATES = 1000
_LONGEST_WITH_PATTERN = 64
SHORTEST_COUNTED = 16
# The limit of browsers, which those state who mean http and https (pydantic's HttpUrl), not any URI.
_LONGEST_WEB_ADDRESS = 2083
_LOWEST = -(10**15)


@dataclass(frozen=True)
class Compiled:
    """piece: the expression. unenforced: constraints that it doesn't guarantee, each with its place."""

    piece: Piece
    unenforced: tuple[str, ...]


def compile_schema(
    schema: Mapping[str, Any] | bool, syntax: Syntax = JSON, longest: int = LONGEST_IN_STATES
) -> Compiled:
    """Convert a schema. syntax: how values are written. Raises SchemaError.

    longest: maximum length of strings whose length takes states; fewer, where the result would be too large.
    """
    try:
        return _compile(schema, syntax, longest)
    except SchemaError as error:
        if not isinstance(error.__cause__, Oversized) or longest <= SHORTEST_COUNTED:
            raise
        return _compile(schema, syntax, SHORTEST_COUNTED)


def _compile(schema: Mapping[str, Any] | bool, syntax: Syntax, longest: int) -> Compiled:
    """A recursive schema is expanded as deep as ``_MAX_WITHIN_ITSELF`` and the size limit allow; deeper texts
    are valid but never generated.
    """
    found = NOTHING
    unenforced: tuple[str, ...] = ()
    for depth in range(_MAX_WITHIN_ITSELF + 1):
        compiler = _Compiler(schema, depth, syntax, longest)
        try:
            piece = compiler.value(schema, "", ("#",))
        except SchemaError:
            if found is NOTHING:
                raise
            break
        if piece is NOTHING and compiler.unsatisfied:
            raise compiler.unsatisfied[0]
        if not compiler.contains_itself:
            return Compiled(piece, tuple(compiler.unenforced))
        if found is not NOTHING and piece.weight > _MAX_WEIGHT_WITHIN_ITSELF:
            break
        found, unenforced = piece, tuple(compiler.unenforced)
    if found is NOTHING:
        raise schema_error("", "it is recursive, and no text of finite depth satisfies it")
    return Compiled(found, unenforced)


class _Compiler:
    def __init__(self, root: Any, depth: int, syntax: Syntax, longest: int) -> None:
        """depth: maximum depth of recursive references. longest: see ``compile_schema``."""
        self._root = root
        self._syntax = syntax
        self._depth = depth
        self._longest = longest
        self.unenforced: dict[str, None] = {}  # a set that keeps its order
        self._n_visited = 0
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
            self.unsatisfied.append(schema_error(where, str(error)))
            return NOTHING
        except ValueError as error:
            raise schema_error(where, str(error)) from error
        except RecursionError:
            raise schema_error(where, "it is nested too deeply") from None
        # a keyword whose value has the wrong type
        except (TypeError, AttributeError, ArithmeticError) as error:
            raise schema_error(where, f"it is not a valid JSON schema ({error})") from None

    def _value(self, schema: Any, where: str, refs: tuple[str, ...]) -> Piece:
        if where.count("/") > 2 * _MAX_DEPTH or len(refs) > _MAX_DEPTH:
            raise schema_error(where, "it is nested too deeply")
        self._n_visited += 1
        if self._n_visited > _MAX_VISITED:
            raise schema_error(
                "", f"it is too large: more than {_MAX_VISITED} schemas with those in references"
            )
        if schema is True or schema == {}:
            return anything(_OPEN_DEPTH, self._syntax)
        if schema is False:
            raise Unsatisfiable("nothing satisfies false")
        if not isinstance(schema, Mapping):
            raise schema_error(where, f"{schema!r} is not a schema")
        keywords = constraints_of(schema)
        if schema.get("nullable") is True:  # OpenAPI's
            plain = {name: value for name, value in schema.items() if name != "nullable"}
            return choice([self.value(plain, where, refs), Piece("null", 4)])
        combining = [name for name in COMBINING if name in keywords]
        if combining:
            return self._combined(combining[0], schema, keywords - {"nullable"}, where, refs)
        kinds = schema.get("type", None)
        if kinds is None:
            kinds = [kind for kind, names in TYPE_TO_KEYWORDS.items() if keywords & set(names)][:1]
            if not kinds:
                return anything(_OPEN_DEPTH, self._syntax)
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if not isinstance(kinds, Sequence) or not kinds:
            raise schema_error(where, f"the type {kinds!r} is invalid")
        pieces = []
        for kind in kinds:
            if kind not in self._type_to_rule:
                raise schema_error(where, f"the type {kind!r} is invalid")
            rule, typed = self._type_to_rule[kind], {**schema, "type": kind}
            pieces.append(self._or_nothing(where, functools.partial(rule, typed, where, refs)))
        return pieces[0] if len(pieces) == 1 else choice(pieces)

    def _combined(
        self, name: str, schema: Mapping[str, Any], keywords: set[str], where: str, refs: tuple[str, ...]
    ) -> Piece:
        given = schema[name]
        if name == "$ref" and keywords == {name}:
            self.contains_itself = self.contains_itself or given in refs
            if refs.count(given) > self._depth:
                return NOTHING
            return self.value(self._resolved(given, where), where, (*refs, given))
        is_list = isinstance(given, Sequence) and not isinstance(given, str) and len(given) > 0
        if name in ("anyOf", "oneOf", "allOf") and not is_list:
            raise schema_error(where, f"{name!r} must be an array of schemas")
        if "$ref" in keywords or ("allOf" in keywords and (len(keywords) > 1 or len(given) > 1)):
            parts, refs = self._parts(schema, where, refs)
            return NOTHING if parts is None else self.value(merge(parts), where, refs)
        if name in ("enum", "const"):
            return self._one_of_values(name, schema, keywords, where, refs)
        rest = {each: schema[each] for each in keywords - {name}}
        if name == "oneOf":
            self._check_disjoint([{"allOf": [rest, each]} for each in given], where, refs)
        if rest:
            given = [{"allOf": [rest, each]} for each in given]
        pieces = [self.value(each, f"{where}/{name}/{i}", refs) for i, each in enumerate(given)]
        return pieces[0] if len(pieces) == 1 else choice(pieces)

    def _parts(
        self, schema: Any, where: str, refs: tuple[str, ...]
    ) -> tuple[list[Mapping[str, Any]] | None, tuple[str, ...]]:
        """The schemas that all have to hold, without ``$ref`` and ``allOf``; None if none of the permitted
        depth does. And the references that led to them.
        """
        if schema is True:
            return [{}], refs
        if schema is False:
            raise Unsatisfiable("nothing satisfies false")
        if not isinstance(schema, Mapping) or len(refs) > _MAX_DEPTH:
            raise schema_error(where, f"{schema!r} is not a schema"[:200])
        keywords = constraints_of(schema)
        found: list[Mapping[str, Any]] = [
            {each: schema[each] for each in keywords - {"$ref", "allOf", "nullable"}}
        ]
        inner = list(schema.get("allOf", ()))
        if "$ref" in keywords:
            given = schema["$ref"]
            self.contains_itself = self.contains_itself or given in refs
            if refs.count(given) > self._depth:
                return None, refs
            refs = (*refs, given)
            inner.append(self._resolved(given, where))
        for each in inner:
            parts, refs = self._parts(each, where, refs)
            if parts is None:
                return None, refs
            found += parts
        return found, refs

    def _resolved(self, reference: Any, where: str) -> Any:
        return resolved(self._root, reference, where)

    def _one_of_values(
        self, name: str, schema: Mapping[str, Any], keywords: set[str], where: str, refs: tuple[str, ...]
    ) -> Piece:
        values = schema["enum"] if name == "enum" else [schema["const"]]
        if not isinstance(values, Sequence) or isinstance(values, str) or not values:
            raise schema_error(where, "'enum' must be an array of at least one value")
        kinds = schema.get("type")
        if kinds is not None:
            kinds = [kinds] if isinstance(kinds, str) else kinds
            values = [value for value in values if any(is_of_type(value, kind) for kind in kinds)]
            if not values:
                raise Unsatisfiable("none of the values is of the type: nothing satisfies it")
        pieces = [self._syntax.value(value) for value in values]
        others = keywords - {name, "type", "format"}
        if others:
            rest = self.value({each: schema[each] for each in others}, where, refs)
            if rest is not NOTHING:
                machine = byte_dfa(rest.text)
                within = (
                    restricted(byte_dfa(piece.text), machine.table, machine.accepting) for piece in pieces
                )
                pieces = [piece for piece, found in zip(pieces, within, strict=True) if found.accepting.any()]
            if rest is NOTHING or not pieces:
                raise Unsatisfiable(f"none of the values satisfies {sorted(others)[0]!r} too")
        return choice(pieces)

    def _check_disjoint(self, branches: Sequence[Any], where: str, refs: tuple[str, ...]) -> None:
        """``oneOf`` forbids texts that two branches allow: branches must differ by type or by a constant."""
        if math.comb(len(branches), 2) > _MAX_PAIRS:
            raise schema_error(
                where, f"'oneOf' of {len(branches)} schemas is too large: use 'anyOf', or 'enum'"
            )
        parts = [self._parts(branch, where, refs)[0] for branch in branches]
        for a, b in combinations([merge(each) for each in parts if each is not None], 2):
            if not self._are_disjoint(a, b):
                raise schema_error(where, "'oneOf' of schemas that may overlap is not supported: use 'anyOf'")

    def _are_disjoint(self, a: Any, b: Any) -> bool:
        if not isinstance(a, Mapping) or not isinstance(b, Mapping):
            return False
        values = [values_of(schema) for schema in (a, b)]
        if None not in values:
            return not set(values[0] or ()) & set(values[1] or ())
        if a.get("type") == b.get("type") == "object":
            shared = set(a.get("required", ())) & set(b.get("required", ()))
            pairs = [
                (values_of(a.get("properties", {}).get(name)), values_of(b.get("properties", {}).get(name)))
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
            raise schema_error(where, "'properties' must be an object and 'required' an array")
        more = schema.get("additionalProperties", schema.get("unevaluatedProperties", True))
        low, high = bounds(schema, "minProperties", "maxProperties", where)
        properties, required = with_dependent(schema, properties, required)
        if not properties and not required:
            if low > 1:  # keys might be equal
                raise schema_error(where, "'minProperties' of more than 1 is not supported")
            if (more is False and not schema.get("patternProperties")) or high == 0:
                if low:
                    raise Unsatisfiable("it must have a property and may have none: nothing satisfies it")
                return Piece(r"\{\}", 2)
            member = self._any_member(schema, more, where, refs)
            return sequence([Piece(r"\{"), separated(member, low, high, self._syntax), Piece(r"\}")])
        named = dict(properties)
        for name in required:
            if name not in named:
                if more is False:
                    raise Unsatisfiable(f"the property {name!r} is required but not allowed")
                named[name] = more
        if low > len(required) or (high is not None and high < len(named)):
            raise schema_error(
                where, "'minProperties' and 'maxProperties' beside 'properties' are not supported"
            )
        members = []
        for name in self._syntax.order(named):
            value = self.value(matching(schema, name, named[name]), f"{where}/properties/{name}", refs)
            member = sequence([self._syntax.key(name), self._syntax.colon, value])
            members.append((member, name in required))
        return sequence([Piece(r"\{"), members_of(members, self._syntax), Piece(r"\}")])

    def _any_member(self, schema: Mapping[str, Any], more: Any, where: str, refs: tuple[str, ...]) -> Piece:
        """A property that the schema doesn't name: one of a pattern, if there are patterns."""
        patterns = schema.get("patternProperties") or {}
        names = schema.get("propertyNames", True)
        if len(patterns) > 1 or (patterns and names is not True):
            raise schema_error(
                where, "'patternProperties' of several patterns, or with 'propertyNames', is not supported"
            )
        place = "additionalProperties"
        for pattern, each in patterns.items():
            names, more, place = {"pattern": pattern}, each, f"patternProperties/{pattern}"
        key = self._syntax.any_key
        if names not in (True, {}):
            key = self._key(names, where + "/propertyNames", refs)
        return sequence([key, self._syntax.colon, self.value(more, f"{where}/{place}", refs)])

    def _key(self, names: Any, where: str, refs: tuple[str, ...]) -> Piece:
        """A key that satisfies a schema."""
        values = self._finite_values(names, where)
        if values is not None:
            return choice([self._syntax.key(value) for value in values if isinstance(value, str)])
        if self._syntax is not JSON:
            raise schema_error(
                where, "names of properties that are not listed are not supported in tool calls"
            )
        return self.value({"allOf": [{"type": "string"}, names]}, where, refs)

    def _finite_values(self, schema: Any, where: str) -> list[Any] | None:
        """All values of a schema, if they are few and listed."""
        for _ in range(_MAX_DEPTH):
            if not isinstance(schema, Mapping):
                return None
            keywords = constraints_of(schema) - {"type"}
            if keywords == {"$ref"}:
                schema = self._resolved(schema["$ref"], where)
            elif keywords == {"allOf"} and len(schema["allOf"]) == 1:
                schema = schema["allOf"][0]
            else:
                is_listed = keywords in ({"enum"}, {"const"}, {"minimum", "maximum"}, set())
                return finite_values(schema) if is_listed else None
        return None

    def _array(self, schema: Mapping[str, Any], where: str, refs: tuple[str, ...]) -> Piece:
        low, high = bounds(schema, "minItems", "maxItems", where)
        items, of_heads = schema.get("items", True), "prefixItems"
        first = schema.get("prefixItems", [])
        if isinstance(items, Sequence) and not isinstance(items, str):  # as drafts before 2020 have it
            first, items, of_heads = items, True, "items"
        if schema.get("uniqueItems") and (high is None or high > 1):
            values = None if first else self._finite_values(items, f"{where}/items")
            if values is not None:
                pieces = [self._syntax.value(value) for value in values]
                inside = unique_items(pieces, self._syntax.comma, low, high)
                return sequence([Piece(r"\["), inside, Piece(r"\]")])
            self._leave("uniqueItems", where)
        heads = [self.value(each, f"{where}/{of_heads}/{i}", refs) for i, each in enumerate(first)]
        if heads:
            if low > len(heads) or (high is not None and high < len(heads)):
                raise schema_error(where, "'minItems' and 'maxItems' beside 'prefixItems' are not supported")
            inner = [piece for head in heads for piece in (self._syntax.comma, head)][1:]
            return sequence([Piece(r"\["), *inner, Piece(r"\]")])
        if high == 0:
            return Piece(r"\[\]", 2)
        item = self.value(items, f"{where}/items", refs)
        return sequence([Piece(r"\["), separated(item, low, high, self._syntax), Piece(r"\]")])

    def _string(self, schema: Mapping[str, Any], where: str, refs: tuple[str, ...]) -> Piece:
        low, high = bounds(schema, "minLength", "maxLength", where)
        conditions = [self._syntax.in_string(each) for each in strings(schema, "pattern", where)]
        for name in strings(schema, "format", where):
            if name == "uri" and high == _LONGEST_WEB_ADDRESS:
                name = "http-url"
            if name in FORMATS:
                conditions.append(Piece(FORMATS[name], _FORMAT_WEIGHT))
            elif name not in ANY_VALUE:
                self._leave(f"format {name!r}", where)
        if conditions and low == 0 and high is None:
            return self._syntax.string(all_of(conditions, self._syntax.quote))
        longest = min(self._longest, _LONGEST_WITH_PATTERN) if conditions else self._longest
        character = Piece(self._syntax.character)
        if high is not None and high > longest:
            conditions.append(character.counted(low, high))
        else:
            conditions.append(character.repeated(low, high))
        return self._syntax.string(all_of(conditions, self._syntax.quote))

    def _leave(self, what: str, where: str) -> None:
        """Note a constraint that is not enforced."""
        self.unenforced[f"{what}{' at ' + where[1:] if where else ''}"] = None

    def _number(self, schema: Mapping[str, Any], where: str, refs: tuple[str, ...]) -> Piece:
        schema = with_exclusive_numbers(schema)
        for name in TYPE_TO_KEYWORDS["number"]:
            bound = schema.get(name)
            is_number = (
                isinstance(bound, (int, float)) and not isinstance(bound, bool) and abs(bound) < math.inf
            )
            if name in schema and not is_number:
                raise schema_error(where, f"{name!r} must be a finite number")
        is_integer = schema["type"] == "integer"
        between = integer_between if is_integer else number_between
        low, multiple = schema.get("minimum"), schema.get("multipleOf", 1)
        is_multiple = multiple != 1 or ("multipleOf" in schema and not is_integer)
        if is_multiple and multiple <= 0:
            raise schema_error(where, "'multipleOf' must be above 0")
        if is_multiple and low is None:
            low = _LOWEST  # a number with a bound has no exponent
        factor = Decimal(repr(multiple))
        if is_multiple:
            multiple_table(factor)  # raises
        text = between(
            low, schema.get("maximum"), schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
        )
        return Piece(f"({condition(factor)}{text})" if is_multiple else text, 40)
