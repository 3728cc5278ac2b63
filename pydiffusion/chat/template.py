"""Chat template: renders messages to a prompt with the model file's jinja2 template."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from traceback import walk_tb
from typing import Any

import jinja2

from pydiffusion.errors import PyDiffusionError

from .messages import Message, normalize_messages, normalize_tools
from .template_sandbox import TemplateEnvironment, check_size, limited_work

_MAX_MESSAGE = 500
# Probe texts of parts, and a field that no template knows.
_PROBES, _UNKNOWN = ("first-part", "second-part"), "unknown-field"


class ChatTemplate:
    """A compiled chat template; thread-safe."""

    def __init__(self, source: str) -> None:
        """Compile the template. Raises PyDiffusionError with the line of a syntax error."""
        try:
            self._template = TemplateEnvironment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise PyDiffusionError(f"chat template, line {error.lineno}: {_brief(error.message)}") from None
        except (jinja2.TemplateError, RecursionError, ValueError, OverflowError) as error:
            raise PyDiffusionError(f"the chat template can't be compiled: {_brief(error)}") from None
        self._knows_parts_of: dict[str, bool] = {}  # by role

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        bos_token: str = "",
        eos_token: str = "",
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Render the prompt for messages, ``{"role": ..., "content": ...}``.

        variables: other template variables, such as ``enable_thinking``.
        Raises ValueError for malformed messages; PyDiffusionError, with the template's line, if the template
        fails or rejects them.
        """
        names = {
            "messages": self.prepare(messages),
            "add_generation_prompt": add_generation_prompt,
            "bos_token": bos_token,
            "eos_token": eos_token,
            "tools": normalize_tools(tools),
            "documents": None,  # defined in transformers too, where templates compare it with none
            **variables,
        }
        try:
            return self._text(names)
        except Exception as error:
            line = _template_line(error)
            where = "chat template" if line is None else f"chat template, line {line}"
            what = str(error) or type(error).__name__
            raise PyDiffusionError(f"{where}: {what}") from error

    def prepare(self, messages: Iterable[Any]) -> list[Message]:
        """Normalize messages for this template; idempotent.

        Content parts are kept, since templates differ in what they put between them, but are joined to one
        text if this template does not support parts. Raises ValueError for malformed messages.
        """
        prepared = normalize_messages(messages)
        for i, message in enumerate(prepared):
            parts = message["content"]
            if isinstance(parts, list) and not self._knows_parts(message["role"]):
                if any(part["type"] == "image" for part in parts):
                    where = f"messages[{i}], of role {message['role']!r}"
                    raise ValueError(f"{where}: the chat template has no place for an image in it")
                message["content"] = "".join(part["text"] for part in parts)
        return prepared

    def _knows_parts(self, role: str) -> bool:
        """Whether the template renders the texts of content parts, not the list's repr.

        Tested by rendering two parts, once per role: whether the source loops over content somewhere is not
        enough, since Gemma 4's first template did so for the user and not for the system. The probe has an
        unknown field, which only shows up if the whole list is printed.
        """
        known = self._knows_parts_of.get(role)
        if known is None:
            probe = [{"type": "text", "text": text, _UNKNOWN: _UNKNOWN} for text in _PROBES]
            names = {"messages": _conversation(role, probe), "add_generation_prompt": True, "tools": None}
            try:
                text = self._text({**names, "bos_token": "", "eos_token": ""})
            except Exception:  # any error: what the template can't render, it does not support
                text = ""
            known = all(probe in text for probe in _PROBES) and _UNKNOWN not in text
            self._knows_parts_of[role] = known
        return known

    def _text(self, names: dict[str, Any]) -> str:
        with limited_work():
            return self._joined(names)

    def _joined(self, names: dict[str, Any]) -> str:
        parts, size = [], 0
        for part in self._template.generate(names):
            size += len(part)
            check_size(size)
            parts.append(part)
        return "".join(parts)


def _conversation(role: str, content: Any) -> list[Message]:
    """A conversation valid for any template, with a message of this role and content."""
    message = {"role": role, "content": content}
    asked = {"role": "user", "content": "Hello"}
    if role == "user":
        return [message]
    if role == "system":
        return [message, asked]
    if role == "tool":
        function = {"name": "f", "arguments": {}}
        call = {"id": "123456789", "type": "function", "function": function}
        called = {"role": "assistant", "content": "", "tool_calls": [call]}
        return [asked, called, {**message, "name": "f", "tool_call_id": call["id"]}]
    return [asked, message, asked]


def _brief(message: object) -> str:
    """An error of the compiler on one line; it may quote a name of any length."""
    return " ".join(str(message).split())[:_MAX_MESSAGE]


def _template_line(error: BaseException) -> int | None:
    lines = [line for frame, line in walk_tb(error.__traceback__) if frame.f_code.co_filename == "<template>"]
    return lines[-1] if lines else None
