"""Streaming parser of chat output: separates reasoning, answer and tool calls by a chat format's markers.

Input may arrive in pieces of any length: a possible prefix of a marker is held back until it is decided.
Tolerates what models that write a whole canvas at once produce: unterminated calls and reasoning, arguments
in quotes or parentheses, reasoning in tags instead of markers at the beginning.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

from .formats.chat_format import ChatFormat

# Of 32 code points that are not characters.
_FIRST_HIDDEN = 0xFDD0


@dataclass(frozen=True)
class Content:
    """Text of the answer."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """Reasoning text."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """A complete tool call: function name and arguments by name."""

    name: str
    arguments: dict[str, Any] = field(hash=False)


Part: TypeAlias = Content | Reasoning | ToolCall


class OutputParser:
    """Incremental parser; ``feed`` returns completed parts. Use one per answer."""

    def __init__(self, chat_format: ChatFormat, in_thought: bool = False) -> None:
        """in_thought: the prompt left a reasoning block open (``ChatFormat.leaves_reasoning_open``)."""
        self._format = chat_format
        nothing: tuple[str | None, str | None] = (None, None)
        self._opening, self._closing = chat_format.reasoning or nothing
        self._call, self._call_end = chat_format.call or nothing
        self._buffer = ""
        self._parts: list[Part] = []
        self._state = self._in_channel if in_thought else self._in_answer
        self._name_due = in_thought and chat_format.channel_names is not None
        self._kind: type[Content] | type[Reasoning] = Reasoning
        self._end = self._closing
        self._has_content = False
        self._has_reasoning = False
        self._after_block = False
        self._lead: str | None = ""  # leading whitespace, until text follows
        # trailing whitespace of the reasoning so far; None before its first text
        self._tail: str | None = None

    def feed(self, text: str, last: bool = False) -> list[Part]:
        """Parse more text. ``last``: hold nothing back."""
        self._buffer += text
        self._parts = []
        while self._state(last):
            pass
        if last:
            if self._lead and not self._after_block:
                self._parts.append(Content(self._lead))
            self._lead = None
        return _merged(self._parts)

    # States: each consumes from the buffer and returns whether to continue

    def _in_answer(self, last: bool) -> bool:
        if self._format.reasoning_tags and not self._has_content and not self._after_block:
            tag, end = self._format.reasoning_tags
            beginning = self._buffer.lstrip()
            if beginning.startswith(tag):
                self._buffer = beginning[len(tag) :]
                self._open_channel(end)
                return True
            if not last and tag.startswith(beginning):
                return False
        text, marker = self._take(last)
        self._content(text)
        if marker == self._opening:
            self._open_channel(self._closing)
        elif marker == self._call:
            self._state = self._in_call
        return marker != ""

    def _in_channel(self, last: bool) -> bool:
        if self._name_due and not self._take_name(last):
            return False
        text, marker = self._take(last, self._end)
        if self._kind is Content:
            self._content(text)
        else:
            self._reasoning(text)
        if marker == self._opening:
            self._open_channel(self._closing)
        elif marker in (self._end, self._call, *self._format.ends):
            self._close_block(self._in_call if marker == self._call else self._in_answer)
        return marker != ""

    def _in_call(self, last: bool) -> bool:
        """Wait for the end of the call. If another block begins first, a complete call ends there."""
        for end in self._format.block_pattern.finditer(self._buffer):
            body = self._buffer[: end.start()]
            call = self._format.parse_call(body)
            closed = end.group() == self._call_end
            if not closed and call is None:
                continue  # a marker inside an argument
            self._buffer = self._buffer[end.end() if closed else end.start() :]
            self._finish_call(body, call, closed)
            return True
        if last:
            body, self._buffer = self._buffer, ""
            self._finish_call(body, self._format.parse_call(body), False)
        return False

    # Helpers of the states

    def _take(self, last: bool, also: str | None = None) -> tuple[str, str]:
        """Consume text up to the next marker, and the marker; without one, text that can't begin a marker."""
        markers = self._format.markers
        found = self._format.marker_pattern.search(self._buffer)
        if also is not None and also not in markers:
            markers = (*markers, also)
            at = self._buffer.find(also)
            if at >= 0 and (found is None or at < found.start()):
                text, self._buffer = self._buffer[:at], self._buffer[at + len(also) :]
                return text, also
        if found is not None:
            text, self._buffer = self._buffer[: found.start()], self._buffer[found.end() :]
            return text, found.group()
        cut = len(self._buffer) - (0 if last else _n_possible_marker(self._buffer, markers))
        text, self._buffer = self._buffer[:cut], self._buffer[cut:]
        return text, ""

    def _take_name(self, last: bool) -> bool:
        """Consume the channel name; False while it is undecided."""
        assert self._format.channel_names is not None  # or no name is due
        after_name = ("\n", *(marker[0] for marker in self._format.markers))
        for name in self._format.channel_names:
            rest = self._buffer[len(name) :]
            if self._buffer.startswith(name) and (rest.startswith(after_name) or (last and not rest)):
                self._kind = Content if name == self._format.channel_names[1] else Reasoning
                self._buffer = rest.removeprefix("\n")
                break
            if not last and name.startswith(self._buffer[: len(name)]) and not rest:
                return False
        self._name_due = False
        return True

    def _open_channel(self, end: str | None) -> None:
        self._close_block(self._in_channel)
        self._end = end
        self._name_due = end == self._closing and self._format.channel_names is not None

    def _close_block(self, state: Any) -> None:
        self._kind = Reasoning
        self._tail = None
        self._after_block = True
        if self._lead is None:
            self._lead = ""
        self._state = state

    def _finish_call(self, body: str, call: tuple[str, dict[str, Any]] | None, closed: bool) -> None:
        """closed: by its marker, so that nothing of it is missing."""
        self._close_block(self._in_answer)
        healed = self._format.heal_call(body) if call is None and closed else None
        if call is not None:
            self._parts.append(ToolCall(*call))
        elif healed is not None:
            name, arguments, rest = healed
            self._parts.append(ToolCall(name, arguments))
            self._content(rest)
        else:  # no output is lost
            if self._format.quote is not None:
                body = body.replace(self._format.quote, '"')
            self._content(self._format.marker_pattern.sub("", body))

    def _content(self, text: str) -> None:
        if self._lead is not None:
            self._lead += text
            if not self._lead.strip():
                return
            text = self._lead.lstrip() if self._after_block and not self._has_content else self._lead
            self._lead = None
        if text:
            self._has_content = True
            self._parts.append(Content(text))

    def _reasoning(self, text: str) -> None:
        if self._tail is None:
            text = text.lstrip()
            if not text:
                return
            self._tail = "\n\n" if self._has_reasoning else ""
        text = self._tail + text
        body = text.rstrip()
        self._tail = text[len(body) :]
        if body:
            self._has_reasoning = True
            self._parts.append(Reasoning(body))


class Shield:
    """Keeps text apart from markers where these are known by their tokens, as in constrained calls, whose
    strings may spell a marker out.
    """

    def __init__(self, chat_format: ChatFormat) -> None:
        first = sorted({marker[0] for marker in chat_format.markers})
        self._hidden = {ord(character): _FIRST_HIDDEN + i for i, character in enumerate(first)}
        self._shown = {hidden: shown for shown, hidden in self._hidden.items()}

    def hide(self, text: str) -> str:
        """Replace what markers begin with, by noncharacters that no constrained text has."""
        return text.translate(self._hidden)

    def show(self, part: Part) -> Part:
        """Undo ``hide`` in a parsed part."""
        if isinstance(part, ToolCall):
            return ToolCall(self._value(part.name), self._value(part.arguments))
        return type(part)(part.text.translate(self._shown))

    def _value(self, value: Any) -> Any:
        if isinstance(value, str):
            return value.translate(self._shown)
        if isinstance(value, dict):
            return {self._value(key): self._value(each) for key, each in value.items()}
        return [self._value(each) for each in value] if isinstance(value, list) else value


def _n_possible_marker(text: str, markers: tuple[str, ...]) -> int:
    """Length of the longest suffix of the text that is a prefix of a marker."""
    for n in range(min(max(map(len, markers), default=0) - 1, len(text)), 0, -1):
        if any(marker.startswith(text[-n:]) for marker in markers):
            return n
    return 0


def _merged(parts: list[Part]) -> list[Part]:
    """Merge adjacent texts of the same kind."""
    merged: list[Part] = []
    for part in parts:
        before = merged[-1] if merged else None
        if isinstance(part, Content) and isinstance(before, Content):
            merged[-1] = Content(before.text + part.text)
        elif isinstance(part, Reasoning) and isinstance(before, Reasoning):
            merged[-1] = Reasoning(before.text + part.text)
        else:
            merged.append(part)
    return merged
