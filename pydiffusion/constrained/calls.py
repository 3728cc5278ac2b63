"""Tool calls as a regular expression: in a chat format's notation, with arguments that satisfy schemas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydiffusion.errors import FunctionError, OptionError

from .regex import Piece, literal
from .schema import LONGEST_IN_STATES, compile_schema
from .schema_parts import SchemaError, resolved
from .syntax import JSON, TEXT_CHARACTER, call_arguments, marker

if TYPE_CHECKING:
    from pydiffusion.tokenizer import Tokenizer

_OPTION = "function_calls"
# Keywords without one of which an object's schema has no properties that would be worth giving.
_SAYING_WHICH = (
    "required", "additionalProperties", "minProperties", "$ref", "anyOf", "oneOf", "allOf", "enum", "const",
)  # fmt: skip


class CallGrammar:
    """The answers that ``GenerationOptions.function_calls`` permits, in a tokenizer's chat format.

    ``expression`` and ``markers``: as ``Automaton`` takes them.
    """

    def __init__(
        self, permitted: Mapping[str, Any], tokenizer: Tokenizer, longest: int = LONGEST_IN_STATES
    ) -> None:
        """permitted: as GenerationOptions normalizes it.  longest: see ``compile_schema``.

        Raises OptionError where the format has no calls, FunctionError for a name that can't be written or a
        schema that is not supported.
        """
        self._format = tokenizer.chat_format
        self._longest = longest
        if self._format.call is None or self._format.call_syntax is None:
            raise OptionError(
                _OPTION, f"{_OPTION}: this model's chat format has no tool calls that could be guaranteed"
            )
        self._call_syntax, quote = self._format.call_syntax, self._format.quote
        if quote is not None and tokenizer.token_id(quote) is None:
            quote = None  # of a vocabulary without it; `parse_call` reads ordinary quotes too
        self._reasoning = self._format.reasoning or ()
        if not permitted["reasoning"] or None in map(tokenizer.token_id, self._reasoning):
            self._reasoning = ()
        names = (*self._format.call, quote, *self._reasoning)
        self.markers = tuple(dict.fromkeys(name for name in names if name is not None))
        self._quote = None if quote is None else self._marker(quote)
        self._values = JSON
        if self._format.quote is not None:
            bare_key = self._call_syntax.bare_key or "(?!)"
            self._values = call_arguments(self._quote, bare_key, self._call_syntax.sorts_keys)
        self.expression = self._answer(permitted)

    def _marker(self, name: str) -> Piece:
        return marker(self.markers.index(name))

    def _answer(self, permitted: Mapping[str, Any]) -> str:
        assert self._format.call is not None
        opening, closing = (self._marker(name).text for name in self._format.call)
        bodies = [self._body(i, function) for i, function in enumerate(permitted["functions"])]
        call = f"(?:{opening}(?:{'|'.join(bodies)}){closing})"
        only_one = permitted["max_calls"] == 1
        reasoning = [self._marker(name).text for name in self._reasoning]
        instead = permitted["otherwise"]
        if instead == "text":
            text = "|".join((TEXT_CHARACTER, *reasoning))
            return f"(?:{text})*{call}?" if only_one else f"(?:{text}|{call})*"
        calls = call if only_one else f"{call}+"
        if instead is not None:
            calls = f"(?:{calls}|{compile_schema(instead, JSON, self._longest).piece.text})"
        return f"(?:{f'{TEXT_CHARACTER}*'.join(reasoning)})?{calls}" if reasoning else calls

    def _body(self, index: int, function: Mapping[str, Any]) -> str:
        """A call without its markers."""
        name, syntax = function["name"], self._call_syntax
        before, after = (text.replace("{name}", name) for text in (syntax.before, syntax.after))
        if self._format.parse_call(before + "{}" + after) != (name, {}):
            what = "this name can't be written in a call; give letters, digits, _ and -"
            raise FunctionError(index, name, what, is_about_name=True)
        arguments = self._arguments(index, name, function["parameters"])
        return f"{literal(before).text}(?:{arguments}){literal(after).text}"

    def _arguments(self, index: int, name: str, schema: Any) -> str:
        if schema is None:  # any
            quote = "" if self._quote is None else f"|{self._quote.text}"
            return rf"\{{(?:{TEXT_CHARACTER}{quote})*\}}"
        if (
            schema.get("type", "object") == "object"
            and not schema.get("properties")
            and not any(keyword in schema for keyword in _SAYING_WHICH)
        ):
            return r"\{\}"
        try:
            if not _is_of_object(schema, schema):
                raise FunctionError(index, name, "the schema must be of an object: give it type 'object'")
            return compile_schema(schema, self._values, self._longest).piece.text
        except SchemaError as error:
            raise FunctionError(index, name, error.what) from None


def _is_of_object(schema: Any, root: Mapping[str, Any], depth: int = 0) -> bool:
    """Whether only objects satisfy a schema, as far as its keywords tell."""
    if not isinstance(schema, Mapping) or depth > 32:
        return False
    if "type" in schema:
        return schema["type"] in ("object", ["object"])
    for name in ("anyOf", "oneOf", "allOf"):
        if name in schema:
            return all(_is_of_object(each, root, depth + 1) for each in schema[name])
    if "$ref" in schema:
        return _is_of_object(resolved(root, schema["$ref"]), root, depth + 1)
    return "properties" in schema or "required" in schema
