"""Normalize messages and tools to the form that chat templates expect.

Used by the library, the command line and the server alike. Idempotent.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Iterable, Mapping
from enum import Enum
from numbers import Number
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .output_parser import ToolCall

Message = dict[str, Any]
#: Types of content parts that are images: of transformers, of OpenAI's chats, of OpenAI's Responses.
IMAGE_TYPES = ("image", "image_url", "input_image")
_MAX_DEPTH = 64
NOT_LISTS = (bytes, bytearray, memoryview, set, frozenset)  # a set has no order
# Names that the renderer passes to the template itself.
_RENDERED = frozenset(("self", "messages", "tools", "bos_token", "eos_token", "add_generation_prompt"))

# Field names under which clients send reasoning back; templates know one or another.
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")


def plain(value: Any, where: str, depth: int = 0) -> Any:
    """Convert a value to plain dicts, lists, strings and numbers.

    Everything given to a template passes through here, so that sanitizing misses no string. Pydantic's
    models, such as the messages and calls of OpenAI's client, become dicts. Raises ValueError for anything
    else, and for values nested too deeply.
    """
    if isinstance(value, Enum):  # one that is a str too is printed by its name
        value = value.value
    if hasattr(value, "dtype") and getattr(value, "ndim", 1) == 0:
        value = value.item()  # a number of numpy, which a template can't write as JSON
    if value is None or isinstance(value, (str, Number)):
        return value
    if depth > _MAX_DEPTH:
        raise ValueError(f"{where} is nested too deeply")
    value = dumped(value)
    if isinstance(value, Mapping):
        return {plain(k, where, depth + 1): plain(v, where, depth + 1) for k, v in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, NOT_LISTS):
        return [plain(entry, where, depth + 1) for entry in value]
    raise ValueError(f"{where} holds a {type(value).__name__}; give text, numbers, dicts and lists")


def dumped(value: Any) -> Any:
    """The fields of a model of pydantic, which would be iterated over as pairs; anything else as it is."""
    dump = getattr(value, "model_dump", None)
    return dump(mode="json") if callable(dump) and not isinstance(value, type) else value


def answer_message(text: str, reasoning: str, calls: Iterable[ToolCall]) -> Message:
    """An assistant's message in OpenAI's format; content is None if there are only tool calls."""
    tool_calls = [call_object(call) for call in calls]
    message: Message = {"role": "assistant", "content": text if text.strip() or not tool_calls else None}
    if reasoning:
        message["reasoning_content"] = reasoning
    if tool_calls:
        message["tool_calls"] = tool_calls
    return message


def call_object(call: ToolCall) -> dict[str, Any]:
    """A tool call in OpenAI's format, with an id of its own and the arguments as JSON."""
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
    }


def normalize_messages(messages: Iterable[Any]) -> list[Message]:
    """Normalize messages: content is text or parts, nulls are dropped, tool call arguments are objects.

    Templates would print a null as None: content that is null or missing becomes empty text, any other null
    field is dropped. Raises ValueError naming the invalid message.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        kind = type(messages).__name__
        example = ', such as [{"role": "user", "content": "Hello"}]'
        raise ValueError(f"messages must be a list of dicts{example}; it is of type {kind}")
    normalized = [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    if not normalized:
        raise ValueError("messages is empty; give at least one message")
    _link_results(normalized)
    return normalized


def normalize_tools(tools: Iterable[Any] | None) -> list[Any] | None:
    """Normalize tools: drop null fields, except in schemas, where null is a value."""
    given: Any = plain(tools, "tools")
    if not isinstance(given, list):
        return given
    return [_with_function(tool, {}) if isinstance(tool, Mapping) else tool for tool in given]


def template_variables(given: Any) -> dict[str, Any]:
    """Validate ``chat_template_kwargs`` as keywords of ``chat_prompt``. Raises ValueError."""
    if not isinstance(given, Mapping):
        raise ValueError(f"chat_template_kwargs must be an object, not {type(given).__name__}")
    for name in given:
        if not isinstance(name, str) or not name.isidentifier() or name in _RENDERED:
            raise ValueError(f"chat_template_kwargs may not hold {name!r}"[:200])
    return dict(given)


def _message(message: Any, where: str) -> Message:
    given = dumped(message)
    if not isinstance(given, Mapping) or not isinstance(given.get("role"), str):
        raise ValueError(f"{where} must be a dict with a role, a string; it is {message!r}"[:200])
    said = _without_nulls(plain(given, where))
    if said.get("images"):  # of Ollama's API, which templates know nothing of
        raise ValueError(f"{where}.images is not read: give images as parts of content, of type image_url")
    said["content"] = _content(said.get("content"), where)
    if said["role"] == "developer":  # OpenAI's newer name, unknown to most templates
        said["role"] = "system"
    for name, normalized in (("tool_calls", _call), ("tool_responses", _response)):
        if isinstance(said.get(name), list):
            said[name] = [normalized(entry) for entry in said[name]]
    thoughts = [said[name] for name in _THOUGHTS if name in said]
    thought = next(filter(None, thoughts), thoughts[0] if thoughts else None)
    return said if thought is None else {"thinking": thought, **said, "reasoning_content": thought}


def _link_results(messages: list[Message]) -> None:
    """Give tool results without a ``tool_call_id`` that of the call that they answer, by which templates look
    up the function's name: Ollama's API has no ids.
    """
    calls: list[dict[str, Any]] = []  # of the last turn, without a result so far
    for i, message in enumerate(messages):
        if message["role"] != "tool":
            given = message.get("tool_calls")
            calls = [call for call in given if isinstance(call, dict)] if isinstance(given, list) else []
            continue
        if isinstance(message.get("tool_name"), str):  # Ollama's name of the field
            message.setdefault("name", message["tool_name"])
        answered = _answered_call(message, calls)
        if answered is not None:
            message["tool_call_id"] = answered.setdefault("id", f"call_{i}")
            calls = [call for call in calls if call is not answered]


def _answered_call(result: Message, calls: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The call with the result's id, else the first one of its name, else, if it has neither, the first."""
    if "tool_call_id" in result:
        return next((call for call in calls if call.get("id") == result["tool_call_id"]), None)
    if "name" not in result:
        return next(iter(calls), None)
    for call in calls:
        function = call.get("function")
        if isinstance(function, dict) and function.get("name") == result["name"]:
            return call
    return None


def _content(content: Any, where: str) -> str | list[dict[str, Any]]:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"{where} has a content of {type(content).__name__}; give a string or parts")
    return [_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)] or ""


def _part(part: Any, where: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind in IMAGE_TYPES:
        return {"type": "image"}  # its place in the prompt; image_parts takes the image itself
    if kind not in ("text", "refusal"):
        known = f"only 'text', {', '.join(map(repr, IMAGE_TYPES))} are supported"
        raise ValueError(f"{where} is of type {kind!r}; {known}"[:200])
    if not isinstance(part.get(kind), str):
        raise ValueError(f"{where} must have a {kind}, a string; it is {part!r}"[:200])
    # A refusal part of OpenAI's API; templates know text parts only.
    return _without_nulls(part) if kind == "text" else {"type": "text", "text": part["refusal"]}


def _call(call: Any) -> Any:
    """Normalize a tool call: OpenAI's API has arguments as JSON text or leaves them out."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return call
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):
            read = json.loads(arguments) if arguments.strip() else None
            arguments = read if read is None or isinstance(read, dict) else arguments
    return _with_function(call, {"arguments": {} if arguments is None else arguments})


def _response(response: Any) -> Any:
    """Normalize a tool result inside an assistant message, which is Google's notation."""
    if not isinstance(response, Mapping):
        return response
    result = response.get("response")
    return _without_nulls(response) | {"response": "" if result is None else result}


def _with_function(value: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    function = value.get("function")
    if not isinstance(function, Mapping):
        return dict(value)
    return _without_nulls(value) | {"function": _without_nulls(function) | fields}


def _without_nulls(value: Mapping[str, Any]) -> dict[str, Any]:
    return {name: field for name, field in value.items() if field is not None}
