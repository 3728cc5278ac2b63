"""Prompt injection defence: markers spelled out in messages are tokenized as plain text.

A chat template concatenates messages and control tokens to one text, in which a user's ``<|turn>`` would look
like the template's own. So markers in the template's input are replaced by placeholders, and tokenized as
plain text where the placeholders come out. Text without markers is tokenized as usual.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from pydiffusion.tokenizer.markers import PLACEHOLDER_CLOSE, PLACEHOLDER_OPEN

if TYPE_CHECKING:
    from pydiffusion.tokenizer import Tokenizer

    from .messages import Message

_PLACEHOLDER = re.compile(r"(?:\ufdd0|\\ufdd0)(\d+)(?:\ufdd1|\\ufdd1)")
_OF_PLACEHOLDERS = re.compile(r"[\ufdd0\ufdd1]|fdd")
_ANSWERING = ("assistant", "model")  # roles; the second is Google's name


class Sanitizer:
    """Sanitizes one prompt: ``hide`` the template's input, then ``tokenize`` its output."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._markers = tokenizer.markers
        self._reasoning = tokenizer.chat_format.reasoning or ()
        self._hidden: dict[str, int] = {}  # marker -> number of its placeholder

    def hide(self, value: Any, *, but: Collection[str] = ()) -> Any:
        """Replace the markers in the value's strings, except those in ``but``; see ``messages.plain``."""
        if isinstance(value, str):
            return self._hide_text(value, but)
        if isinstance(value, Mapping):
            return {self.hide(k, but=but): self.hide(v, but=but) for k, v in value.items()}
        if isinstance(value, list):
            return [self.hide(entry, but=but) for entry in value]
        return value

    def _hide_text(self, text: str, but: Collection[str]) -> str:
        text = self._markers.pattern.sub(
            lambda found: found.group() if found.group() in but else self._placeholder(found.group()), text
        )
        # Templates trim and concatenate texts, such as content parts or consecutive answers: a marker split
        # between the end of one and the beginning of the next would come out whole.
        beginning = self._markers.beginning_at_end(text)
        if beginning:
            body = text.rstrip()
            text = body[: -len(beginning)] + self._placeholder(beginning) + text[len(body) :]
        return text

    def _placeholder(self, text: str) -> str:
        return f"{PLACEHOLDER_OPEN}{self._hidden.setdefault(text, len(self._hidden))}{PLACEHOLDER_CLOSE}"

    def render(self, render: Callable[[list[Message]], str], messages: list[Message]) -> str:
        """Render the messages with all markers hidden.

        Clients send reasoning back between its markers in the assistant's content, and a template that strips
        it needs to see them; but markers that it left in would become control tokens. So reasoning is
        stripped here, if the template renders the same text from messages that still have it. For a template
        that keeps reasoning, or strips it in another way, its markers are plain text.
        """
        cut = [self._without_thoughts(message) for message in messages]
        if cut != messages:
            text = render(self.hide(cut))
            if render([self._with_thoughts_shown(message) for message in messages]) == text:
                return text
        return render(self.hide(messages))

    def _with_thoughts_shown(self, message: Message) -> Message:
        hidden = self.hide(message)
        if message["role"] in _ANSWERING:
            hidden["content"] = self.hide(message["content"], but=self._reasoning)
        return hidden

    def _without_thoughts(self, message: Message) -> Message:
        """Strip the reasoning from an assistant's content, which is a text or parts with texts."""
        content = message["content"]
        if message["role"] not in _ANSWERING or not self._reasoning:
            return message
        if isinstance(content, str):
            return {**message, "content": _strip_blocks(content, *self._reasoning)}
        return {**message, "content": [self._part_without_thoughts(part) for part in content]}

    def _part_without_thoughts(self, part: dict[str, Any]) -> dict[str, Any]:
        return {**part, "text": _strip_blocks(part["text"], *self._reasoning)} if "text" in part else part

    def _reveal_if_harmless(self, found: re.Match[str], all_hidden: list[str]) -> str:
        """Reveal the prefix of a marker if its surroundings don't complete it; else keep it hidden."""
        number, length = int(found[1]), self._markers.longest
        hidden = all_hidden[number] if number < len(all_hidden) else ""
        before = found.string[max(0, found.start() - length) : found.start()]
        after = found.string[found.end() : found.end() + length]
        # It is not known yet what nearby placeholders become.
        if not self._markers.is_beginning(hidden) or _OF_PLACEHOLDERS.search(before + " " + after):
            return found[0]
        begin, end = len(before), len(before) + len(hidden)
        joined = self._markers.pattern.finditer(before + hidden + after)
        touches = any(match.start() < end and match.end() > begin for match in joined)
        return found[0] if touches else hidden

    def tokenize(self, text: str) -> list[int]:
        """Tokenize the rendered text; only the template's own markers become control tokens."""
        hidden = list(self._hidden)
        text = _PLACEHOLDER.sub(lambda found: self._reveal_if_harmless(found, hidden), text)
        ids: list[int] = []
        for i, part in enumerate(_PLACEHOLDER.split(text)):
            if i % 2 == 0:
                ids += self._tokenizer.tokenize(part, add_bos=False, parse_special=True)
                continue
            # In two halves, since a marker that the file types as visible would be parsed from plain text
            # too.
            marker = hidden[int(part)] if int(part) < len(hidden) else ""
            for half in (marker[:1], marker[1:]):
                ids += self._tokenizer.tokenize(half, add_bos=False)
        return ids


def _strip_blocks(text: str, opening: str, closing: str) -> str:
    """Strip reasoning as Gemma 4's templates do: for each closing marker, all back to its opening one."""
    return "".join(part.split(opening)[0] for part in text.split(closing))
