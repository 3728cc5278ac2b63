"""Parameters that the library's functions and the server's requests share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydiffusion.errors import OptionError
from pydiffusion.generation.thinking_budget import can_think
from pydiffusion.options import CONSTRAINTS, at_temperature, integer_option

if TYPE_CHECKING:
    from pydiffusion.model import DiffusionModel

# JSON mode, which predates schemas: any object.
_JSON_OBJECT = {"type": "object"}
# response_format type -> other allowed fields.
_FORMAT_TO_FIELDS = {
    "text": (),
    "json_object": ("schema",),
    "json_schema": ("json_schema", "schema"),
    "grammar": ("grammar",),
}
# Without effect on what is guaranteed, wherever a client puts them.
_FORMAT_LABELS = ("type", "name", "description", "strict")


def token_limit(model: DiffusionModel, max_tokens: Any, max_completion_tokens: Any = None) -> int:
    """The smaller limit; without one (None or -1) the model's context. Raises OptionError for anything but an
    integer.
    """
    limits = []
    for name, value in (("max_tokens", max_tokens), ("max_completion_tokens", max_completion_tokens)):
        if value is None or value == -1:
            continue
        limits.append(integer_option(name, value))
    return min(limits, default=model.n_ctx_train)


def with_temperature(options: Mapping[str, Any], temperature: Any, model: DiffusionModel) -> dict[str, Any]:
    """Add the options that a caller's temperature means; None: none. Options that are given count instead.

    Raises OptionError for a temperature that is no number of at least 0.
    """
    if temperature is None:
        return dict(options)
    meant = at_temperature(temperature, model.metadata)
    if options.get("t_min") is not None or options.get("t_max") is not None:
        meant = {name: value for name, value in meant.items() if name not in ("t_min", "t_max")}
    return {**options, **{name: value for name, value in meant.items() if options.get(name) is None}}


def constraint_of(response_format: Any) -> dict[str, Any]:
    """The option of GenerationOptions that a ``response_format`` means, if any. Raises OptionError.

    Accepts OpenAI's ``{"type": "text"}``, ``{"type": "json_object"}`` and ``{"type": "json_schema",
    "json_schema": {"schema": ...}}``, the flat ``{"type": "json_schema", "schema": ...}`` of OpenAI's
    Responses and of others, llama.cpp's ``{"type": "json_object", "schema": ...}``, and ``{"type": "grammar",
    "grammar": ...}`` with GBNF, which other servers that know it take.
    """
    if hasattr(response_format, "model_json_schema"):
        raise OptionError(
            "response_format",
            "it is a model of pydantic: give json_schema=X.model_json_schema()",
        )
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if not isinstance(kind, str) or kind not in _FORMAT_TO_FIELDS:
        raise OptionError(
            "response_format",
            "response_format must be an object whose type is text, json_object, json_schema or grammar",
        )
    for name, value in response_format.items():
        if name not in _FORMAT_LABELS and name not in _FORMAT_TO_FIELDS[kind] and value is not None:
            known = " or ".join(f"{n} of type {k}" for k, names in _FORMAT_TO_FIELDS.items() for n in names)
            raise OptionError(
                "response_format",
                f"response_format.{name} is not permitted with type {kind}; known are {known}",
            )
    if kind == "text":
        return {}
    if kind == "grammar":
        return {"grammar": response_format.get("grammar", "")}
    if kind == "json_object":
        where, schema = "schema", response_format.get("schema")
        if schema is None or schema == {}:  # any object
            return {"json_schema": _JSON_OBJECT}
    elif response_format.get("schema") is not None:
        if response_format.get("json_schema") is not None:
            raise OptionError(
                "response_format", "response_format.schema and .json_schema exclude each other: give one"
            )
        where, schema = "schema", response_format["schema"]
    else:
        given = response_format.get("json_schema")
        where, schema = "json_schema.schema", given.get("schema") if isinstance(given, Mapping) else None
    if not isinstance(schema, (Mapping, bool)):
        raise OptionError("response_format", f"response_format.{where} must be a JSON schema, an object")
    return {"json_schema": schema}


def no_thinking(model: DiffusionModel, options: Mapping[str, Any]) -> dict[str, Any]:
    """Set the thinking budget to 0, unless the options set it or the model can't reason here."""
    constrained = any(options.get(name) is not None for name in CONSTRAINTS)
    if constrained or not can_think(model.tokenizer):
        return dict(options)
    return {"thinking_budget": 0, **options}
