"""Constrained output (``response_format``, ``regex``, ``grammar``) and infill layouts of a request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydiffusion.errors import OptionError
from pydiffusion.generation.infill import (
    DEFAULT_HOLE_TOKENS,
    Layout,
    hold_around,
    lay_out,
    lay_out_suffix,
    prompt_of,
)
from pydiffusion.options import ResolvedOptions

from .errors import field_of, from_exception, invalid
from .parameters import constraint_of, token_limit
from .tool_choice import ToolUse

if TYPE_CHECKING:
    from pydiffusion.model import DiffusionModel

# Fields that are options of GenerationOptions, beside ``response_format``.
CONSTRAINT_FIELDS = ("json_schema", "regex", "grammar")


def constraint_options(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The constraint of GenerationOptions, from ``response_format`` or a field of its name."""
    options: dict[str, Any] = {}
    if "response_format" in fields:
        try:
            options |= constraint_of(fields["response_format"])
        except OptionError as error:
            raise from_exception(error) from None
    for name in CONSTRAINT_FIELDS:
        if fields.get(name) not in (None, ""):  # clients of llama.cpp send an empty grammar for none
            if options:
                other = "response_format" if "response_format" in fields else next(iter(options))
                raise invalid(f"{other} and {name} exclude each other: give one", name)
            options[name] = fields[name]
    return options


def check_constraint(model: DiffusionModel, options: ResolvedOptions, n_prompt: int, use: ToolUse) -> None:
    """Compile the automaton, which the model caches. Raises ApiError if it is unsupported or too long."""
    if options.constraint is None:
        return
    try:
        with use.naming_tools():
            needed = int(model.automaton(options).tokens_left[0])
    except OptionError as error:
        raise from_exception(error) from None
    room = (model.n_ctx - n_prompt) // model.canvas_length * model.canvas_length
    if needed > min(options.max_tokens, room):
        raise invalid(
            f"The shortest answer that satisfies {field_of(options.constraint)} takes {needed} tokens, but"
            f" max_tokens and the context leave {min(options.max_tokens, room)}.",
            "max_tokens",
        )


def suffix_layout(model: DiffusionModel, fields: Mapping[str, Any]) -> Layout | None:
    """Layout of a completion with a ``suffix``, or None without one."""
    suffix = fields.get("suffix", "")
    if not isinstance(suffix, str):
        raise invalid("suffix must be a string", "suffix", "invalid_type")
    if not suffix:
        return None
    try:
        limit = token_limit(model, fields.get("max_tokens"), fields.get("max_completion_tokens"))
        return lay_out_suffix(model, suffix, limit, model.canvas_length)
    except OptionError as error:
        raise from_exception(error) from None
    except ValueError as error:
        raise invalid(str(error), "suffix") from None


def infill_layout(model: DiffusionModel, fields: Mapping[str, Any]) -> tuple[Layout, list[int]]:
    """Layout of a text with holes, and its prompt tokens."""
    for name in ("text", "instruction"):
        if not isinstance(fields.get(name, ""), str):
            raise invalid(f"{name} must be a string", name, "invalid_type")
    instruction = fields.get("instruction")
    hole_tokens = fields.get("hole_tokens", DEFAULT_HOLE_TOKENS)
    try:
        layout = lay_out(model, fields.get("text", ""), hole_tokens, whole=instruction is not None)
        return layout, prompt_of(model, layout, instruction)
    except OptionError as error:
        raise from_exception(error) from None
    except ValueError as error:
        raise invalid(str(error)[:300], "text") from None
    except Exception as error:  # usually from the chat template
        raise from_exception(error) from None


def held_options(
    model: DiffusionModel, layout: Layout, prompt: list[int], options: list[ResolvedOptions]
) -> list[ResolvedOptions]:
    """The options of every choice with the layout's canvases. Raises ApiError."""
    try:
        return [hold_around(layout, prompt, each, model.n_ctx) for each in options]
    except Exception as error:
        raise from_exception(error) from None
