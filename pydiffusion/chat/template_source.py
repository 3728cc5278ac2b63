"""Where a chat template is from: a file, or a built-in one by its name; and whether it is out of date."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from pydiffusion._util.file_kinds import recognise
from pydiffusion.errors import PyDiffusionError

from .formats.registry import BUILT_IN_TEMPLATES
from .template import ChatTemplate

#: GGUF key of a file's template.
TEMPLATE_KEY = "tokenizer.chat_template"
#: Bytes of a template at most; the longest published ones have 20,000.
MAX_TEMPLATE_BYTES = 16 << 20
#: What an outdated template is, and what to do about it.
OUTDATED = "Google's of before 2026-07-09 or made from it, and loses track of turns when tools are called"
REPLACE_IT = (
    "choose the mended one: --chat-template diffusion-gemma (in Python chat_template=...); "
    "examples/edit_metadata.py puts it into the file"
)

# A macro of every template that Google published for Gemma 4 and DiffusionGemma.
_GOOGLE = re.compile(r"macro\s+format_parameters\s*\(\s*properties,\s*required\b")
_JSON = re.compile(r'\s*\{\s*"')
_CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": {}}}
_ROUND: list[dict[str, Any]] = [
    {"role": "user", "content": "Question"},
    {"role": "assistant", "content": "Remark", "tool_calls": [_CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "Result"},
    {"role": "assistant", "content": "Answer"},
    {"role": "user", "content": "Thanks"},
]
# Text behind the end of a turn before the next one begins.
_BETWEEN_TURNS = re.compile(r"<turn\|>\s*(?!<\|turn>)\S")


def find_template(given: str | os.PathLike[str]) -> str:
    """The source of a template: of a built-in one by its name, else of a file. Names take precedence.

    Raises PyDiffusionError if there is neither, if the file can't be read, is not UTF-8, does not compile, or
    is no template of messages.
    """
    text = os.fspath(given)
    if text in BUILT_IN_TEMPLATES:
        return BUILT_IN_TEMPLATES[text].read_text(encoding="utf-8")
    known = ", ".join(BUILT_IN_TEMPLATES)
    if "{{" in text or "{%" in text:
        raise PyDiffusionError(
            f"chat template {text[:40]!r}: give a file, or a name ({known}), not the text of a template"
        )
    path = Path(text)
    if not text or not path.exists():
        raise PyDiffusionError(
            f"chat template {text!r}: there is no such file, nor a built-in template of this name; built-in: "
            f"{known}"
        )
    source = read_template(path)
    if _JSON.match(source):
        raise PyDiffusionError(f"{path}: is JSON, not a template: save the text of its chat_template")
    if "messages" not in source:
        raise PyDiffusionError(f"{path}: is not a chat template, since it has no 'messages'")
    check_template(source, str(path))
    return source


def read_template(path: Path) -> str:
    """Read a template's file. Raises PyDiffusionError if it can't be read, is too large or not UTF-8."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TEMPLATE_BYTES + 1)
    except OSError as error:
        raise PyDiffusionError(f"{path}: can't be read: {error.strerror or error}") from error
    if len(data) > MAX_TEMPLATE_BYTES:
        raise PyDiffusionError(f"{path}: larger than {MAX_TEMPLATE_BYTES} bytes; this is not a chat template")
    found = recognise(data, len(data), "text")
    if found is not None:
        raise PyDiffusionError(f"{path}: not a chat template; it is {found}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PyDiffusionError(f"{path}: can't be read: it is not UTF-8 (byte {error.start})") from None


def check_template(source: str, where: str) -> None:
    """Raise PyDiffusionError, with the place and line, for a template that does not compile."""
    try:
        ChatTemplate(source)
    except PyDiffusionError as error:
        raise PyDiffusionError(f"{where}: {error}") from None


def is_outdated(source: str) -> bool:
    """Whether this is, or was made from, a template that Google published for Gemma 4 before 2026-07-09.

    Recognized by a macro that all of them have, and by what they do: text between two turns, or the result of
    a tool in a turn of its own. Copies that somebody mended do neither.
    """
    if not _GOOGLE.search(source):
        return False
    try:
        prompt = ChatTemplate(source).render(_ROUND)
    except PyDiffusionError:
        return False
    return "<|tool_response>" not in prompt or _BETWEEN_TURNS.search(prompt) is not None
