"""Streaming: text of finished canvases, cut at stop strings even across canvas borders."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from pydiffusion.chat.output_parser import Content, OutputParser, Part, Shield
from pydiffusion.errors import OptionError
from pydiffusion.options import ResolvedOptions
from pydiffusion.tokenizer import TextStream, Tokenizer

from .token_ids import prompt_end

if TYPE_CHECKING:
    from pydiffusion.session import Session


class StopFilter:
    """Cuts streamed text at the first stop string; a possible prefix of one is held back."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""

    def feed(self, text: str, last: bool) -> tuple[str, bool]:
        """Return the text to emit, and whether a stop string was hit. ``last``: hold nothing back."""
        buffer = self._held + text
        cuts = [at for at in map(buffer.find, self._stop) if at >= 0]
        if cuts:
            self._held = ""
            return buffer[: min(cuts)], True
        n_held = 0 if last else self._n_possible_stop(buffer)
        text, self._held = buffer[: len(buffer) - n_held], buffer[len(buffer) - n_held :]
        return text, False

    def _n_possible_stop(self, text: str) -> int:
        """Length of the longest suffix of the text that is a prefix of a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for n in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-n:]) for stop in self._stop):
                return n
        return 0


class AnswerStream:
    """Converts the tokens of finished canvases into text that is final once emitted.

    Bytes of an incomplete character and a possible prefix of a stop string are held back for the next canvas.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._text = TextStream(tokenizer)
        self._filter = StopFilter(stop)
        self._ids: list[int] = []
        self._n_characters = 0
        self.parts: list[Part] = []  # plain text has none

    def feed(self, ids: Iterable[int], last: bool) -> tuple[str, int, bool]:
        """Add a canvas's tokens. ``last``: hold nothing back.

        Returns the text to emit, the number of these tokens that belong to the answer, and whether a stop
        string was hit.
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
    """As AnswerStream, for a chat with constrained output: all of it is content."""

    def feed(self, ids: Iterable[int], last: bool) -> tuple[str, int, bool]:
        text, n_tokens, stopped = super().feed(ids, last)
        self.parts = [Content(text)] if text else []
        return text, n_tokens, stopped


class ChatStream:
    """As AnswerStream, for a chat: separates reasoning, answer and tool calls. Stop strings cut the answer
    only.

    ``parts``: the parts completed by the last ``feed``.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str], in_thought: bool = False, *, shielded: bool = False
    ) -> None:
        """in_thought: the prompt left a reasoning block open (``ChatFormat.leaves_reasoning_open``).
        shielded: only marker tokens are markers, not characters that spell one.
        """
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._in_thought = in_thought
        self._shield = Shield(tokenizer.chat_format) if shielded else None
        self._markers = marker_ids(tokenizer)
        self._text = TextStream(tokenizer, keep_control=self._markers)
        self._parser = OutputParser(tokenizer.chat_format, in_thought)
        self._filter = StopFilter(stop)
        self._ids: list[int] = []
        self.parts: list[Part] = []

    def feed(self, ids: Iterable[int], last: bool) -> tuple[str, int, bool]:
        """As ``AnswerStream.feed``; the text is the answer's only."""
        n_before = len(self._ids)
        self._ids += map(int, ids)
        self.parts, stopped = self._feed(self._ids[n_before:], last)
        n_tokens = self._count_to_stop() if stopped else len(self._ids)
        text = "".join(part.text for part in self.parts if isinstance(part, Content))
        return text, max(0, n_tokens - n_before), stopped

    def _feed(self, ids: Iterable[int], last: bool) -> tuple[list[Part], bool]:
        found: list[Part] = []
        for part in self._parse(ids, last):
            content = part.text if isinstance(part, Content) else None
            # A stop string can't continue across a reasoning block or a tool call.
            text, stopped = self._filter.feed(content or "", last=content is None)
            if text:
                found.append(Content(text))
            if stopped:
                return found, True
            if content is None:
                found.append(part)
        if last and (rest := self._filter.feed("", last=True)[0]):
            found.append(Content(rest))
        return found, False

    def _parse(self, ids: Iterable[int], last: bool) -> list[Part]:
        if self._shield is None:
            return self._parser.feed(self._text.feed(ids, last=last), last=last)
        texts = []
        for token_id in ids:
            text = self._text.feed([token_id])
            texts.append(text if token_id in self._markers else self._shield.hide(text))
        texts.append(self._text.feed([], last=last))
        return [self._shield.show(part) for part in self._parser.feed("".join(texts), last=last)]

    def _count_to_stop(self) -> int:
        """Number of tokens up to the stop string, found by feeding them again one by one."""
        again = ChatStream(self._tokenizer, self._stop, self._in_thought)
        for i, token_id in enumerate(self._ids):
            if again._feed([token_id], last=False)[1]:
                return i + 1
        return len(self._ids)


def answer_stream(session: Session, options: ResolvedOptions, *, chat: bool) -> AnswerStream | ChatStream:
    """Stream for the answer to the session's tokens. chat: they are a chat prompt, whose answer has parts.

    Raises OptionError for constrained output inside a reasoning block.
    """
    tokenizer = session.model.tokenizer
    if not chat and options.function_calls is not None:
        raise OptionError("function_calls", "function_calls is for chats: use create_chat_completion")
    if not chat:
        return AnswerStream(tokenizer, options.stop)
    in_thought = leaves_reasoning_open(session)
    if options.constraint is not None:
        if in_thought and not options.may_reason:
            raise OptionError(
                options.constraint,
                "the prompt ends inside a reasoning block: constrained output can't contain reasoning",
            )
        if options.function_calls is not None:
            return ChatStream(tokenizer, (), in_thought, shielded=True)
        return ContentStream(tokenizer, ())
    return ChatStream(tokenizer, options.stop, in_thought)


def leaves_reasoning_open(session: Session) -> bool:
    """Whether the session's tokens end inside a reasoning block."""
    tokenizer = session.model.tokenizer
    end = tokenizer.detokenize(prompt_end(session.tokens), keep_control=True)
    return tokenizer.chat_format.leaves_reasoning_open(end)


def marker_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids of the markers that ``OutputParser`` needs: control tokens in some files, visible in others."""
    ids = map(tokenizer.token_id, tokenizer.chat_format.markers)
    return frozenset(token_id for token_id in ids if token_id is not None)


def count_tokens(tokenizer: Tokenizer, ids: Iterable[int], n_characters: int) -> int:
    """Number of leading tokens that produce ``n_characters`` of text."""
    stream, made, n_tokens = TextStream(tokenizer), 0, 0
    for token_id in ids:
        if made >= n_characters:
            break
        made += len(stream.feed([int(token_id)]))
        n_tokens += 1
    return n_tokens
