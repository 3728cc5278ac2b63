"""Tools of a chat request: which ones the model sees, and what it may or has to call.

Shared by the server's requests and ``create_chat_completion``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from pydiffusion.errors import FunctionError, OptionError
from pydiffusion.events import CanvasEvent, EndEvent, Event

from .reports import up_to_first_call

# Spellings of a choice by one word: OpenAI's and llama.cpp's; Mistral's and Anthropic's.
_WORD_TO_MODE = {"none": "none", "auto": "auto", "required": "required", "any": "required"}
_PERMITTED = (
    '\'auto\', \'none\', \'required\', {"type": "function", "function": {"name": ...}} or an object of type'
    " 'allowed_tools'"
)


@dataclass(frozen=True)
class ToolChoice:
    """A validated ``tool_choice``.

    mode: "none", "auto" or "required".  names: the functions that may be called.  is_named: one was chosen by
    its name.
    """

    mode: str
    names: tuple[str, ...]
    is_named: bool = False


@dataclass(frozen=True)
class ToolUse:
    """The consequences of a request's tools.

    shown: the tools that the template gets, None for none.
    constraint: options of GenerationOptions that constrain the answer, empty for none.
    is_named: the call is forced by the function's name.
    cuts_after_call: the answer ends after its first call, which the constraint does not see to.
    indices: of the tools that may be called, where the constraint says which.
    """

    shown: list[Any] | None = None
    constraint: dict[str, Any] = field(default_factory=dict)
    is_named: bool = False
    cuts_after_call: bool = False
    indices: tuple[int, ...] = ()

    @contextmanager
    def naming_tools(self) -> Iterator[None]:
        """Translate errors about ``function_calls`` to the request's field that they come from."""
        try:
            yield
        except FunctionError as error:
            where = f"tools[{self.indices[error.index]}].function"
            where += ".name" if error.is_about_name else ".parameters"
            raise OptionError(where, f"{where}, of {error.name!r}: {error.what}") from None
        except OptionError as error:
            if error.param != "function_calls":
                raise
            what = str(error).removeprefix("function_calls").lstrip(":, ")
            raise OptionError("tools", f"tools: {what}") from None


def tool_use(
    tools: Any,
    tool_choice: Any = None,
    *,
    parallel: bool | None = None,
    constraint: Mapping[str, Any] | None = None,
    thinking: bool | None = None,
) -> ToolUse:
    """Work out what a request's tools mean. Raises OptionError naming the invalid field.

    parallel: ``parallel_tool_calls``.  constraint: the option that constrains the answer.  thinking:
    ``enable_thinking``.
    """
    if not isinstance(parallel, (bool, type(None))):
        raise OptionError(
            "parallel_tool_calls", f"parallel_tool_calls is {parallel!r}; permitted are true and false"[:200]
        )
    only_one = parallel is False
    constraint = dict(constraint or {})
    checked = check_tools(tools)
    choice = read_tool_choice(tool_choice, checked)
    if choice.mode == "none" or not checked:
        return ToolUse(constraint=constraint)
    use = ToolUse(shown=checked, is_named=choice.is_named)
    functions = [(i, tool["function"]) for i, tool in enumerate(checked)]
    callable_ones = [(i, function) for i, function in functions if function["name"] in choice.names]
    is_strict = any(function.get("strict") for _, function in callable_ones)
    otherwise: Any = None
    if choice.mode == "auto":
        otherwise = _instead_of_calls(constraint)
        if otherwise == "text" and not is_strict and len(callable_ones) == len(functions):
            return replace(use, cuts_after_call=only_one)
    # Where a call is required, no other answer is left that a response_format could apply to.
    any_arguments = otherwise == "text"
    permitted = {
        "functions": [
            {"name": function["name"], "parameters": _parameters(function, any_arguments)}
            for _, function in callable_ones
        ],
        "max_calls": 1 if choice.is_named or only_one else None,
        "otherwise": otherwise,
        "reasoning": thinking is True or (otherwise == "text" and thinking is None),
    }
    indices = tuple(i for i, _ in callable_ones)
    return replace(use, constraint={"function_calls": permitted}, indices=indices)


def _parameters(function: Mapping[str, Any], any_arguments: bool) -> Any:
    """any_arguments: of a function that is not strict."""
    if any_arguments and not function.get("strict"):
        return None
    parameters = function.get("parameters")
    return {} if parameters is None else parameters


def _instead_of_calls(constraint: Mapping[str, Any]) -> Any:
    """The answers other than calls that are permitted."""
    if not constraint:
        return "text"
    if "json_schema" in constraint:
        schema = constraint["json_schema"]
        return json.loads(schema) if isinstance(schema, str) else schema
    name = next(iter(constraint))
    raise OptionError(name, f"{name} can't be combined with tools: give tool_choice 'none', or a JSON schema")


def read_tool_choice(choice: Any, tools: Sequence[Mapping[str, Any]] | None) -> ToolChoice:
    """Validate ``tool_choice``, in OpenAI's spellings and those of other servers. Raises OptionError."""
    every = tuple(tool["function"]["name"] for tool in tools or ())
    if choice is None:
        return ToolChoice("auto", every)
    mode, names, is_named = _read(choice)
    if mode == "required" and not every:
        raise OptionError("tool_choice", "tool_choice requires a call, but there are no tools")
    for name in names or ():
        if name not in every:
            raise OptionError(
                "tool_choice",
                f"tool_choice names {name!r}, which is not among the tools: {', '.join(every) or 'none'}"[
                    :300
                ],
            )
    return ToolChoice(mode, every if names is None else names, is_named)


def _read(choice: Any) -> tuple[str, tuple[str, ...] | None, bool]:
    """Mode, names if it has some, whether it forces a function by name."""
    kind = choice.get("type") if isinstance(choice, Mapping) else choice
    if isinstance(kind, str) and kind in _WORD_TO_MODE:
        return _WORD_TO_MODE[kind], None, False
    if isinstance(choice, Mapping):
        if kind in ("function", "tool"):  # the second is Anthropic's
            return "required", (_name(choice),), True
        if kind == "allowed_tools":
            return _allowed(choice)
    raise OptionError("tool_choice", f"tool_choice is {choice!r}; permitted is {_PERMITTED}"[:400])


def _name(tool: Any) -> str:
    """The name in ``{"type": "function", "function": {"name": ...}}``, or without the inner object."""
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise OptionError("tool_choice", f"tool_choice must name a function; it has {tool!r}"[:300])
    return name


def _allowed(choice: Mapping[str, Any]) -> tuple[str, tuple[str, ...], bool]:
    """``allowed_tools`` of OpenAI's two APIs; that for chats has an inner object."""
    given = choice.get("allowed_tools", choice)
    given = given if isinstance(given, Mapping) else {}
    mode, tools = given.get("mode"), given.get("tools")
    if (
        mode not in ("auto", "required")
        or not isinstance(tools, Sequence)
        or isinstance(tools, str)
        or not tools
    ):
        raise OptionError(
            "tool_choice", "tool_choice of type allowed_tools needs a mode, 'auto' or 'required', and tools"
        )
    return mode, tuple(dict.fromkeys(map(_name, tools))), False


def check_tools(tools: Any) -> list[Any] | None:
    """Validate tools; None if there are none. Raises OptionError naming the first invalid one."""
    if tools is None:
        return None
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        raise OptionError("tools", "tools must be an array")
    for i, tool in enumerate(tools):
        where = f"tools[{i}]"
        if not isinstance(tool, Mapping) or tool.get("type") != "function":
            raise OptionError(f"{where}.type", f"{where}.type must be 'function'")
        function = tool.get("function")
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise OptionError(f"{where}.function", f"{where}.function must have a name, a string")
        for name, kind in (("description", str), ("parameters", Mapping), ("strict", bool)):
            if function.get(name) is not None and not isinstance(function[name], kind):
                raise OptionError(f"{where}.function.{name}", f"{where}.function.{name} has the wrong type")
    return list(tools) or None


def cut_after_call(events: Iterator[Event], seed: int) -> Iterator[Event]:
    """End a generation after its first tool call. seed: the generation's."""
    for event in events:
        called = False
        if isinstance(event, CanvasEvent):
            event, called = up_to_first_call(event)
        yield event
        if called:
            yield EndEvent(reason="stop", timings={}, seed=seed)
            return
