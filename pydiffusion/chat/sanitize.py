"""Keeps what people write from steering the model: markers spelled out in messages stay characters.

A chat template joins messages and control tokens to one text, in which ``<|turn>`` of a user looks like the
template's own. So each marker in what goes into the template is replaced by a placeholder, and encoded as
plain characters where the placeholder comes out. Texts without markers are encoded as they always were.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from pydiffusion.tokenizer.markers import CHANNEL, CHANNEL_END, PLACEHOLDER_CLOSE, PLACEHOLDER_OPEN

if TYPE_CHECKING:
    from pydiffusion.tokenizer import Tokenizer

    from .messages import Message

_PLACEHOLDER = re.compile(r"(?:\ufdd0|\\ufdd0)(\d+)(?:\ufdd1|\\ufdd1)")
_OF_PLACEHOLDERS = re.compile(r"[\ufdd0\ufdd1]|fdd")
_ANSWERING = ("assistant", "model")  # roles; the second is Google's own word


class Neutralizer:
    """For one prompt: ``hide`` what goes into the template, then ``tokenize`` what comes out of it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._markers = tokenizer.markers
        self._hidden: dict[str, int] = {}  # to the number of the placeholder

    def hide(self, value: Any, *, but: Collection[str] = ()) -> Any:
        """The value (plain as of ``messages.plain``) with no markers in its strings but those in ``but``."""
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
        # Templates trim texts and join them, such as parts of content, or answers that follow each other: a
        # marker's beginning at the end of one and its rest in the next would come out as the marker.
        beginning = self._markers.beginning_at_end(text)
        if beginning:
            body = text.rstrip()
            text = body[: -len(beginning)] + self._placeholder(beginning) + text[len(body) :]
        return text

    def _placeholder(self, text: str) -> str:
        return f"{PLACEHOLDER_OPEN}{self._hidden.setdefault(text, len(self._hidden))}{PLACEHOLDER_CLOSE}"

    def render(self, render: Callable[[list[Message]], str], messages: list[Message]) -> str:
        """What the template makes of the messages; ``render`` renders them, with all markers hidden.

        Clients send an assistant's thought back between its markers in the content, and a template that cuts
        it out has to see these. But what it leaves in could then steer the model. So thoughts are cut out
        here, provided that the template makes the same text of the messages that still have them. A template
        that leaves thoughts in, or cuts in another way, gets them as characters.
        """
        cut = [_change_answer(message, _without_thoughts) for message in messages]
        if cut != messages:
            text = render(self.hide(cut))
            if render([self._with_thoughts_shown(message) for message in messages]) == text:
                return text
        return render(self.hide(messages))

    def _with_thoughts_shown(self, message: Message) -> Message:
        hidden = self.hide(message)
        if message["role"] in _ANSWERING:
            hidden["content"] = self.hide(message["content"], but=(CHANNEL, CHANNEL_END))
        return hidden

    def _shown_where_harmless(self, found: re.Match[str], all_hidden: list[str]) -> str:
        """The beginning of a marker that what surrounds it makes no marker of; all else stays hidden."""
        number, length = int(found[1]), self._markers.longest
        hidden = all_hidden[number] if number < len(all_hidden) else ""
        before = found.string[max(0, found.start() - length) : found.start()]
        after = found.string[found.end() : found.end() + length]
        # What other placeholders nearby become is not known yet.
        if not self._markers.is_beginning(hidden) or _OF_PLACEHOLDERS.search(before + " " + after):
            return found[0]
        begin, end = len(before), len(before) + len(hidden)
        joined = self._markers.pattern.finditer(before + hidden + after)
        touches = any(match.start() < end and match.end() > begin for match in joined)
        return found[0] if touches else hidden

    def tokenize(self, text: str) -> list[int]:
        """Token ids; only the template's own markers become what they stand for."""
        hidden = list(self._hidden)
        text = _PLACEHOLDER.sub(lambda found: self._shown_where_harmless(found, hidden), text)
        ids: list[int] = []
        for i, part in enumerate(_PLACEHOLDER.split(text)):
            if i % 2 == 0:
                ids += self._tokenizer.tokenize(part, add_bos=False, parse_special=True)
                continue
            # In two halves, for a file may type a marker as visible, and then it is recognised everywhere.
            marker = hidden[int(part)] if int(part) < len(hidden) else ""
            for half in (marker[:1], marker[1:]):
                ids += self._tokenizer.tokenize(half, add_bos=False)
        return ids


def _change_answer(message: Message, change: Callable[[str], str]) -> Message:
    """The message with every text of its content changed, if it is an assistant's."""
    content = message["content"]
    if message["role"] not in _ANSWERING:
        return message
    if isinstance(content, str):
        return {**message, "content": change(content)}
    return {**message, "content": [{**part, "text": change(part["text"])} for part in content]}


def _without_thoughts(text: str) -> str:
    """As Gemma 4's templates cut: up to each end of a channel, all from its beginning on."""
    return "".join(part.split(CHANNEL)[0] for part in text.split(CHANNEL_END))
