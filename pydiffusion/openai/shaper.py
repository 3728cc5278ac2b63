"""Shape the events of a generation into OpenAI's objects: a whole response, or the chunks of a stream.

Shared by the library's functions (``responses``) and the server (``answers``), which differ in ``usage`` and
``diffusion``.
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydiffusion.chat.messages import call_object
from pydiffusion.chat.output_parser import Content, Part, Reasoning
from pydiffusion.events import CanvasEvent, DraftEvent, EndEvent

from .drafts import draft_fields
from .reports import Prefilled, Report

if TYPE_CHECKING:
    from pydiffusion.generation.infill import Layout
    from pydiffusion.tokenizer import Tokenizer

Json = dict[str, Any]

# EndEvent.reason -> OpenAI's finish_reason.
FINISH_REASONS = {
    "eos": "stop", "stop": "stop", "repetition": "stop", "length": "length", "context": "length",
}  # fmt: skip


class Choice(ABC):
    """One choice of a response: its counts so far, and its objects in response and chunks."""

    def __init__(self, index: int, n_prompt: int) -> None:
        """n_prompt: tokens of its prompt."""
        self.index = index
        self.n_prompt = n_prompt
        self.n_cached = 0  # prompt tokens that were in the cache
        self.n_tokens = 0
        self.canvas_steps: list[int] = []
        self.end: EndEvent | None = None

    @property
    def reasoning(self) -> str:
        """The reasoning so far."""
        return ""

    def take(self, report: Report) -> list[Json]:
        """Add a report; returns the choice objects that a stream sends for it."""
        if isinstance(report, Prefilled):
            self.n_cached = report.n_cached
            return self.opening()
        if isinstance(report, CanvasEvent):
            self.n_tokens += len(report.tokens)
            self.canvas_steps.append(report.steps)
            return self._pieces(report)
        if isinstance(report, EndEvent):
            self.end = report
            return [self._last(report.reason)]
        return []

    def opening(self) -> list[Json]:
        """The choice objects that a stream begins with."""
        return []

    @abstractmethod
    def whole(self) -> Json:
        """The finished choice of a response."""

    @abstractmethod
    def _pieces(self, canvas: CanvasEvent) -> list[Json]:
        """Add a canvas; returns the choice objects that a stream sends for it."""

    @abstractmethod
    def _last(self, reason: str) -> Json:
        """The choice object that ends a stream."""

    def _reason(self) -> str:
        """``EndEvent.reason`` of a finished choice."""
        assert self.end is not None
        return self.end.reason


class TextChoice(Choice):
    """Of a completion. head: text to prepend (echo)."""

    def __init__(self, index: int, n_prompt: int, head: str = "") -> None:
        super().__init__(index, n_prompt)
        self._head = head
        self._text = ""

    def opening(self) -> list[Json]:
        return [self._piece(self._head)] if self._head else []

    def whole(self) -> Json:
        return self._piece(self._head + self._text, FINISH_REASONS[self._reason()])

    def _pieces(self, canvas: CanvasEvent) -> list[Json]:
        self._text += canvas.text
        return [self._piece(canvas.text)] if canvas.text else []

    def _last(self, reason: str) -> Json:
        return self._piece("", FINISH_REASONS[reason])

    def _piece(self, text: str, finish_reason: str | None = None) -> Json:
        return {"index": self.index, "text": text, "logprobs": None, "finish_reason": finish_reason}


class FilledChoice(TextChoice):
    """Of a text with holes, which has no partial text: a stream sends it whole."""

    def __init__(
        self,
        index: int,
        n_prompt: int,
        layout: Layout,
        tokenizer: Tokenizer,
        head: str = "",
        *,
        suffixed: bool,
        stops: Sequence[str] = (),
    ) -> None:
        """suffixed: a completion before a suffix, of which the hole is sent; else the text and its holes.
        stops: strings before which such a hole ends.

        The text around the holes counts as prompt.
        """
        super().__init__(index, n_prompt + layout.n_fixed, head)
        self._layout = layout
        self._tokenizer = tokenizer
        self._suffixed = suffixed
        self._stops = stops
        self._tokens: list[int] = []

    def opening(self) -> list[Json]:
        return []

    def whole(self) -> Json:
        if self._suffixed:
            return self._piece(self._head + self._hole(), "stop")
        text, holes = self._layout.read(self._tokens, self._tokenizer)
        return self._piece(text, "stop") | {"holes": list(holes)}

    def _pieces(self, canvas: CanvasEvent) -> list[Json]:
        self._tokens += canvas.tokens.tolist()
        return []

    def _last(self, reason: str) -> Json:
        filled = self._layout.filled(self._tokens, self._tokenizer)
        self.n_tokens = sum(map(len, filled))
        if self._suffixed:
            (ids,), text = filled, self._hole()
            starts = (self._tokenizer.detokenize(ids[:n]).startswith(text) for n in range(len(ids)))
            self.n_tokens = next((n for n, holds in enumerate(starts) if holds), len(ids))
        return self.whole()

    def _hole(self) -> str:
        """The text before the suffix, up to the first stop string."""
        (ids,) = self._layout.filled(self._tokens, self._tokenizer)
        text = self._tokenizer.detokenize(ids)
        return text[: min((at for stop in self._stops if (at := text.find(stop)) >= 0), default=len(text))]


class ChatChoice(Choice):
    """Of a chat. more: further fields of the message.  is_named: it had to call a function chosen by name."""

    def __init__(
        self, index: int, n_prompt: int, more: Mapping[str, Any] | None = None, *, is_named: bool = False
    ) -> None:
        super().__init__(index, n_prompt)
        self._is_named = is_named
        self._message = ChatMessage()
        self._more = more or {}

    @property
    def reasoning(self) -> str:
        return self._message.reasoning

    def opening(self) -> list[Json]:
        return [self._delta({"role": "assistant", "content": ""})]

    def whole(self) -> Json:
        return {
            "index": self.index,
            "message": {**self._more, **self._message.as_dict()},
            "logprobs": None,
            "finish_reason": self._finish_reason(self._reason()),
        }

    def _pieces(self, canvas: CanvasEvent) -> list[Json]:
        return [self._delta(self._message.add(part)) for part in canvas.parts]

    def _last(self, reason: str) -> Json:
        return self._delta({}, self._finish_reason(reason))

    def _finish_reason(self, reason: str) -> str:
        """ "stop" after a call that was forced by name, as OpenAI's servers do; clients compare with it."""
        found = self._message.finish_reason(reason)
        return "stop" if self._is_named and found == "tool_calls" else found

    def _delta(self, delta: Json, finish_reason: str | None = None) -> Json:
        return {"index": self.index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


class ChatMessage:
    """Accumulates an assistant message; ``add`` returns the part as a stream delta."""

    def __init__(self) -> None:
        self._content = ""
        self.reasoning = ""
        self.tool_calls: list[Json] = []

    def add(self, part: Part) -> Json:
        if isinstance(part, Content):
            self._content += part.text
            return {"content": part.text}
        if isinstance(part, Reasoning):
            self.reasoning += part.text
            return {"reasoning_content": part.text}
        call = call_object(part)
        self.tool_calls.append(call)
        return {"tool_calls": [{"index": len(self.tool_calls) - 1, **call}]}

    def as_dict(self) -> Json:
        """The message; content is None if there are only tool calls."""
        content = None if self.tool_calls and not self._content.strip() else self._content
        message: Json = {"role": "assistant", "content": content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = self.tool_calls
        return message

    def finish_reason(self, reason: str) -> str:
        """OpenAI's finish_reason for an ``EndEvent.reason``."""
        finish_reason = FINISH_REASONS[reason]
        return "tool_calls" if self.tool_calls and finish_reason == "stop" else finish_reason


class Response(ABC):
    """A response with all its choices: ``chunks`` when streaming, else ``take`` and ``whole``."""

    def __init__(
        self,
        model: str,
        choices: Sequence[Choice],
        tokenizer: Tokenizer,
        *,
        chat: bool,
        n_per_prompt: int = 1,
        include_usage: bool = False,
    ) -> None:
        """model: name to report.  n_per_prompt: choices that share a prompt, one after the other.
        include_usage: a stream ends with the usage.
        """
        prefix, self._object, self._chunk_object = (
            ("chatcmpl", "chat.completion", "chat.completion.chunk")
            if chat
            else ("cmpl", "text_completion", "text_completion")
        )
        self._choices = choices
        self._tokenizer = tokenizer
        self._n_per_prompt = n_per_prompt
        self._include_usage = include_usage
        self._fields: Json = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def take(self, i_choice: int, report: Report) -> None:
        """Add a report of a response that is not streamed."""
        self._choices[i_choice].take(report)

    def whole(self) -> Json:
        """The complete response."""
        return self._fields | {
            "object": self._object,
            "choices": [choice.whole() for choice in self._choices],
            "usage": self._usage(),
            "diffusion": self._figures(),
        }

    def chunks(self, i_choice: int, report: Report) -> Iterator[Json]:
        """Add a report; yields its chunks."""
        if isinstance(report, DraftEvent):
            yield self._chunk() | {"diffusion": draft_fields(i_choice, report, self._tokenizer)}
        for piece in self._choices[i_choice].take(report):
            over = isinstance(report, EndEvent) and all(choice.end is not None for choice in self._choices)
            yield self._chunk(piece) | ({"diffusion": self._figures()} if over else {})

    def usage_chunk(self) -> Json | None:
        """The final usage chunk, if requested."""
        return self._chunk() | {"usage": self._usage()} if self._include_usage else None

    def _chunk(self, choice: Json | None = None) -> Json:
        choices = [] if choice is None else [choice]
        usage: Json = {"usage": None} if self._include_usage else {}
        return self._fields | {"object": self._chunk_object, "choices": choices} | usage

    def _usage(self) -> Json:
        n_prompt = sum(choice.n_prompt for choice in self._prompts())
        n_tokens = sum(choice.n_tokens for choice in self._choices)
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_tokens,
            "total_tokens": n_prompt + n_tokens,
        }

    def _prompts(self) -> Sequence[Choice]:
        """A choice of each prompt: the choices of one share its cache, so it counts once."""
        return self._choices[:: self._n_per_prompt]

    def _timings(self) -> dict[str, float]:
        """Seconds per phase, of all choices together."""
        timings: dict[str, float] = {}
        for choice in self._choices:
            for name, seconds in ({} if choice.end is None else choice.end.timings).items():
                timings[name] = timings.get(name, 0.0) + seconds
        return timings

    @abstractmethod
    def _figures(self) -> Json:
        """The ``diffusion`` field."""
