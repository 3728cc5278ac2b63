"""Text that arrives canvas by canvas, cut at stop strings wherever these lie."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pydiffusion.chat.output_parser import Content, OutputParser, Part
from pydiffusion.tokenizer import TextStream, Tokenizer
from pydiffusion.tokenizer.markers import MARKERS


class StopFilter:
    """Cuts text that arrives in parts at the first stop string; its possible beginning is held back."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""

    def feed(self, text: str, last: bool) -> tuple[str, bool]:
        """The text to give out, and whether a stop string ended it. After the ``last`` none is held back."""
        buffer = self._held + text
        cuts = [at for at in map(buffer.find, self._stop) if at >= 0]
        if cuts:
            self._held = ""
            return buffer[: min(cuts)], True
        n_held = 0 if last else self._n_possible_stop(buffer)
        text, self._held = buffer[: len(buffer) - n_held], buffer[len(buffer) - n_held :]
        return text, False

    def _n_possible_stop(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for n in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-n:]) for stop in self._stop):
                return n
        return 0


class AnswerStream:
    """Turns the tokens of finished canvases into text that, once given out, stays.

    Held back until the next canvas: bytes of an unfinished character, and the beginning of a possible stop
    string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._text = TextStream(tokenizer)
        self._filter = StopFilter(stop)
        self._ids: list[int] = []
        self._n_characters = 0
        self.parts: list[Part] = []  # there are none in plain text

    def feed(self, ids: Iterable[int], last: bool) -> tuple[str, int, bool]:
        """Take a canvas's tokens; after the ``last`` canvas nothing is held back.

        Returns the text to give out, how many of these tokens belong to the answer, and whether a stop
        string ended it.
        """
        n_before = len(self._ids)
        self._ids += map(int, ids)
        text, stopped = self._filter.feed(self._text.feed(self._ids[n_before:], last=last), last)
        self._n_characters += len(text)
        if stopped:
            n_tokens = count_tokens(self._tokenizer, self._ids, self._n_characters)
            return text, max(0, n_tokens - n_before), True
        return text, len(self._ids) - n_before, False


class ContentStream(AnswerStream):
    """As AnswerStream, for a chat whose answer has to be text of a given structure: all of it is content."""

    def feed(self, ids: Iterable[int], last: bool) -> tuple[str, int, bool]:
        text, n_tokens, stopped = super().feed(ids, last)
        self.parts = [Content(text)] if text else []
        return text, n_tokens, stopped


class ChatStream:
    """As AnswerStream, for a chat: thinking, answer and tool calls apart. Stop strings cut the answer only.

    ``parts`` are those that the last ``feed`` made clear.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], in_thought: bool = False) -> None:
        """in_thought: the prompt ended inside a thought (``output_parser.ends_in_thought``)."""
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._in_thought = in_thought
        self._text = TextStream(tokenizer, keep_control=marker_ids(tokenizer))
        self._parser = OutputParser(in_thought)
        self._filter = StopFilter(stop)
        self._ids: list[int] = []
        self.parts: list[Part] = []

    def feed(self, ids: Iterable[int], last: bool) -> tuple[str, int, bool]:
        """As ``AnswerStream.feed``; the text is the answer's alone."""
        n_before = len(self._ids)
        self._ids += map(int, ids)
        self.parts, stopped = self._feed(self._ids[n_before:], last)
        n_tokens = self._count_to_stop() if stopped else len(self._ids)
        text = "".join(part.text for part in self.parts if isinstance(part, Content))
        return text, max(0, n_tokens - n_before), stopped

    def _feed(self, ids: Iterable[int], last: bool) -> tuple[list[Part], bool]:
        found: list[Part] = []
        for part in self._parser.feed(self._text.feed(ids, last=last), last=last):
            is_content = isinstance(part, Content)
            # What begins a stop string at the end of a text can't go on behind a thought or a call.
            text, stopped = self._filter.feed(part.text if is_content else "", last=not is_content)
            if text:
                found.append(Content(text))
            if stopped:
                return found, True
            if not is_content:
                found.append(part)
        if last and (rest := self._filter.feed("", last=True)[0]):
            found.append(Content(rest))
        return found, False

    def _count_to_stop(self) -> int:
        """The tokens it takes to reach the stop string: fed again, one by one."""
        again = ChatStream(self._tokenizer, self._stop, self._in_thought)
        for i, token_id in enumerate(self._ids):
            if again._feed([token_id], last=False)[1]:
                return i + 1
        return len(self._ids)


def marker_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids of the markers that ``OutputParser`` reads: control tokens in some files, visible in others."""
    ids = map(tokenizer.token_id, MARKERS)
    return frozenset(token_id for token_id in ids if token_id is not None)


def count_tokens(tokenizer: Tokenizer, ids: Iterable[int], n_characters: int) -> int:
    """How many of the first tokens it takes to make so many characters of text."""
    stream, made, n_tokens = TextStream(tokenizer), 0, 0
    for token_id in ids:
        if made >= n_characters:
            break
        made += len(stream.feed([int(token_id)]))
        n_tokens += 1
    return n_tokens
