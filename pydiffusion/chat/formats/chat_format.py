"""Interface of the chat formats."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

# A function's name and its arguments by name.
Call: TypeAlias = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class CallSyntax:
    """How a call is written between its markers, so that one can be generated that satisfies a schema.

    before, after: the text around the arguments, with ``{name}`` for the function's name.
    bare_key: regular expression for the keys without quotes; None: all have quotes.
    sorts_keys: keys are in alphabetical order, as templates write those of earlier calls.
    Strings are between ``ChatFormat.quote`` and have no escapes; without a quote the arguments are JSON.
    """

    before: str
    after: str = ""
    bare_key: str | None = None
    sorts_keys: bool = False


@dataclass(frozen=True)
class ChatFormat:
    """Markers in the output of an architecture's models, and the parser of their tool calls.

    A marker is a token of its own in the vocabulary; a file may type it as a control token or as a visible
    one. A format without reasoning or calls leaves the default.

    reasoning: the markers around reasoning.
    channel_names: names after the opening one, each with a line break behind it: of reasoning, and of an
        answer that is in such a block too. A block may come without its name.
    reasoning_tags: text, not markers, that reasoning at the beginning of an output may be enclosed in
        instead.
    call: the markers around a tool call; ``parse_call``: parses what is between them, None for an incomplete
        call; ``call_syntax``: for constrained calls, which a format without it doesn't support.
    heal_call: parses what is between them where ``parse_call`` can't; returns the text around the call too.
    quote: the marker around strings in a call.
    ends: further markers that end reasoning, or a call that is not closed.
    visible_ends: markers that end an answer even in files that type them as visible tokens.
    other_markers: all that the output has besides.
    """

    reasoning: tuple[str, str] | None = None
    channel_names: tuple[str, str] | None = None
    reasoning_tags: tuple[str, str] | None = None
    call: tuple[str, str] | None = None
    parse_call: Callable[[str], Call | None] = lambda _: None
    call_syntax: CallSyntax | None = None
    heal_call: Callable[[str], tuple[str, dict[str, Any], str] | None] = lambda _: None
    quote: str | None = None
    ends: tuple[str, ...] = ()
    visible_ends: tuple[str, ...] = ()
    other_markers: tuple[str, ...] = ()

    @cached_property
    def markers(self) -> tuple[str, ...]:
        """All markers. Spelled out in a message they are plain text, in an answer they are not shown, and no
        constrained text contains them.
        """
        pairs = (*(self.reasoning or ()), *(self.call or ()))
        quote = () if self.quote is None else (self.quote,)
        return tuple(dict.fromkeys((*pairs, *quote, *self.ends, *self.visible_ends, *self.other_markers)))

    @cached_property
    def marker_pattern(self) -> re.Pattern[str]:
        """Finds any marker."""
        return any_of(self.markers)

    @cached_property
    def block_pattern(self) -> re.Pattern[str]:
        """Finds what a call ends before, or with: its closing marker, the opening of a block, the end of a
        turn.
        """
        return any_of((*reversed(self.call or ()), *(self.reasoning or ())[:1], *self.ends))

    def leaves_reasoning_open(self, prompt: str) -> bool:
        """Whether a rendered prompt ends inside reasoning, which some templates open for the model."""
        if self.reasoning is None:
            return False
        name = f"(?:{re.escape(self.channel_names[0])})?" if self.channel_names else ""
        return re.search(re.escape(self.reasoning[0]) + name + r"\n?\Z", prompt) is not None


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Pattern that finds any of these texts, the longest where several begin; nothing if there are none."""
    longest_first = sorted(set(texts), key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


#: Of an architecture without a format of its own: the output is the answer, whatever it says.
PLAIN = ChatFormat()
