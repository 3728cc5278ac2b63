"""Validate messages of a request before they reach a chat template."""

from __future__ import annotations

from typing import Any

from pydiffusion.chat.image_parts import ImagePartError, ImageRules, is_image, read_image_part

from .errors import invalid

MAX_IMAGES = 32  # of a request; each takes 8 MB until it is encoded, in more detail several times as much
_ROLES = ("system", "developer", "user", "assistant", "tool")


def check_messages(messages: Any, rules: ImageRules) -> list[dict[str, Any]]:
    """Validate messages. rules: which images they may name without sending them.

    Returns them with each part that is an image read, as an ImagePart. Raises ApiError naming the first
    invalid one.
    """
    if not isinstance(messages, list) or not messages:
        raise invalid("messages must be an array of at least one message", "messages")
    follows_calls = False
    for i, message in enumerate(messages):
        _check(message, f"messages[{i}]", follows_calls)
        if message["role"] != "tool":
            follows_calls = bool(message.get("tool_calls"))
    read = [_read_images(message, f"messages[{i}].content", rules) for i, message in enumerate(messages)]
    contents = (message.get("content") for message in read)
    images = [part for content in contents if isinstance(content, list) for part in content if is_image(part)]
    if sum(part.size for part in images) > MAX_IMAGES:
        raise invalid(
            f"messages have {len(images)} images, permitted are {MAX_IMAGES}, and of those with more detail"
            " fewer",
            "messages",
        )
    return read


def _read_images(message: dict[str, Any], where: str, rules: ImageRules) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list) or not any(map(is_image, content)):
        return message
    try:
        parts = [
            read_image_part(part, f"{where}[{i}]", rules) if is_image(part) else part
            for i, part in enumerate(content)
        ]
    except ImagePartError as error:
        raise invalid(str(error), error.where) from None
    return {**message, "content": parts}


def _check(message: Any, where: str, follows_calls: bool) -> None:
    """follows_calls: a tool's message answers a call of the turn before, even without that call's id."""
    if not isinstance(message, dict):
        raise invalid(f"{where} must be an object", where, "invalid_type")
    role = message.get("role")
    if role not in _ROLES:
        raise invalid(f"{where}.role is {role!r}; permitted are {', '.join(_ROLES)}"[:200], f"{where}.role")
    content = message.get("content")
    if isinstance(content, list):
        for i, part in enumerate(content):
            _check_part(part, f"{where}.content[{i}]")
    elif content is not None and not isinstance(content, str):
        raise invalid(f"{where}.content must be a string or an array of parts", f"{where}.content")
    # An assistant may have no content: it reasoned or called a tool. In other roles null is empty text, but a
    # missing field is more likely a misspelt name.
    if role != "assistant" and "content" not in message:
        raise invalid(f"{where}.content is missing", f"{where}.content")
    if message.get("images"):  # of Ollama's API
        raise invalid(
            f"{where}.images is not read: give images as parts of content, of type image_url",
            f"{where}.images",
        )
    if message.get("tool_calls") is not None:
        _check_calls(message["tool_calls"], f"{where}.tool_calls")
    call_id = message.get("tool_call_id")
    if role == "tool" and not isinstance(call_id, str) and not (call_id is None and follows_calls):
        what = "is missing, and no tool call is before this message"
        raise invalid(f"{where}.tool_call_id {what}", f"{where}.tool_call_id")


def _check_part(part: Any, where: str) -> None:
    if not isinstance(part, dict):
        raise invalid(f"{where} must be an object", where, "invalid_type")
    kind = part.get("type")
    if is_image(part):
        return
    if kind not in ("text", "refusal"):
        raise invalid(f"{where} is of type {kind!r}; this server reads text and images"[:200], where)
    if not isinstance(part.get(kind), str):
        raise invalid(f"{where} must have a {kind}, a string", where)


def _check_calls(calls: Any, where: str) -> None:
    if not isinstance(calls, list):
        raise invalid(f"{where} must be an array", where, "invalid_type")
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if (
            not isinstance(function, dict)
            or not isinstance(function.get("name"), str)
            or not isinstance(function.get("arguments"), (str, dict, type(None)))
        ):
            raise invalid(
                f"{where}[{i}] must have a function with a name, a string, and arguments that are JSON text,"
                " an object or absent",
                f"{where}[{i}]",
            )
