"""Build OpenAI's response objects and stream chunks from the scheduler's reports."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydiffusion.events import CanvasEvent, DraftEvent, EndEvent

from .drafts import draft_fields
from .reports import Prefilled, Report
from .requests import InfillRequest, Request
from .responses import FINISH_REASONS, ChatMessage

if TYPE_CHECKING:
    from pydiffusion.tokenizer import Tokenizer

Json = dict[str, Any]


class _Choice:
    """State of one choice."""

    def __init__(self, n_prompt: int) -> None:
        self.n_prompt = n_prompt
        self.n_cached = 0
        self.n_tokens = 0
        self.canvas_steps: list[int] = []
        self.text = ""
        self.tokens: list[int] = []  # kept for infill only
        self.message = ChatMessage()
        self.end: EndEvent | None = None

    def take(self, report: Report) -> None:
        if isinstance(report, Prefilled):
            self.n_cached = report.n_cached
        elif isinstance(report, CanvasEvent):
            self.n_tokens += len(report.tokens)
            self.canvas_steps.append(report.steps)
            self.text += report.text
            self.tokens += report.tokens.tolist()
        elif isinstance(report, EndEvent):
            self.end = report


class Answer:
    """Response to a request with all its choices: ``chunks`` when streaming, else ``take`` and ``whole``."""

    def __init__(
        self,
        request: Request,
        model: str,
        tokenizer: Tokenizer,
        prompts: list[list[int]],
        heads: list[str] | None = None,
        *,
        chat: bool,
    ) -> None:
        """prompts: one per choice.  heads: text to prepend to each answer (echo)."""
        self._request = request
        self._tokenizer = tokenizer
        self._chat = chat
        self._choices = [_Choice(len(prompt)) for prompt in prompts]
        self._heads = heads or [""] * len(prompts)
        prefix = "chatcmpl" if chat else "cmpl"
        self._fields = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": None,
        }

    # Without streaming

    def take(self, i_choice: int, report: Report) -> None:
        """Add a report of a request that does not stream."""
        choice = self._choices[i_choice]
        choice.take(report)
        if isinstance(report, CanvasEvent):
            for part in report.parts:
                choice.message.add(part)

    def whole(self) -> Json:
        """The complete response."""
        return self._fields | {
            "object": "chat.completion" if self._chat else "text_completion",
            "choices": [self._whole_choice(i) for i in range(len(self._choices))],
            "usage": self._usage(),
            "diffusion": self._figures(),
        }

    def _whole_choice(self, i: int) -> Json:
        choice = self._choices[i]
        assert choice.end is not None
        if self._chat:
            message = {"refusal": None, **choice.message.as_dict()}
            reason = choice.message.finish_reason(choice.end.reason)
            return {"index": i, "message": message, "logprobs": None, "finish_reason": reason}
        if self._request.layout is not None:
            return self._filled(i)
        return self._piece(i, self._heads[i] + choice.text, FINISH_REASONS[choice.end.reason])

    def _filled(self, i: int) -> Json:
        """The filled text; for a completion with a suffix, the text before the suffix."""
        layout = self._request.layout
        assert layout is not None
        text, holes = layout.read(self._choices[i].tokens, self._tokenizer)
        if isinstance(self._request, InfillRequest):
            return self._piece(i, text, "stop") | {"holes": list(holes)}
        return self._piece(i, self._heads[i] + holes[0], "stop")

    # Streaming

    def chunks(self, i_choice: int, report: Report) -> Iterator[Json]:
        """Yield the chunks for a report."""
        choice = self._choices[i_choice]
        choice.take(report)
        if isinstance(report, Prefilled):
            if self._chat:
                yield self._chunk(self._part(i_choice, {"role": "assistant", "content": ""}))
            elif self._heads[i_choice] and self._request.layout is None:
                yield self._chunk(self._piece(i_choice, self._heads[i_choice]))
        elif isinstance(report, DraftEvent):
            yield self._chunk() | {"diffusion": draft_fields(i_choice, report, self._tokenizer)}
        elif isinstance(report, CanvasEvent) and self._chat:
            for part in report.parts:
                yield self._chunk(self._part(i_choice, choice.message.add(part)))
        elif isinstance(report, CanvasEvent) and report.text and self._request.layout is None:
            yield self._chunk(self._piece(i_choice, report.text))
        elif isinstance(report, EndEvent):
            if self._chat:
                last = self._part(i_choice, {}, choice.message.finish_reason(report.reason))
            elif self._request.layout is not None:  # infill has no partial text
                last = self._filled(i_choice)
            else:
                last = self._piece(i_choice, "", FINISH_REASONS[report.reason])
            done = all(choice.end is not None for choice in self._choices)
            yield self._chunk(last) | ({"diffusion": self._figures()} if done else {})

    def usage_chunk(self) -> Json | None:
        """The final usage chunk, if requested."""
        if not self._request.include_usage:
            return None
        return self._chunk() | {"usage": self._usage()}

    def _chunk(self, choice: Json | None = None) -> Json:
        fields = self._fields | {
            "object": "chat.completion.chunk" if self._chat else "text_completion",
            "choices": [] if choice is None else [choice],
        }
        return fields | ({"usage": None} if self._request.include_usage else {})

    @staticmethod
    def _part(i: int, delta: Json, finish_reason: str | None = None) -> Json:
        return {"index": i, "delta": delta, "logprobs": None, "finish_reason": finish_reason}

    @staticmethod
    def _piece(i: int, text: str, finish_reason: str | None = None) -> Json:
        return {"index": i, "text": text, "logprobs": None, "finish_reason": finish_reason}

    # Figures

    def _usage(self) -> Json:
        # Choices of one prompt share its cache, so it is counted once.
        n_choices = len(self._request.options)
        firsts = self._choices[::n_choices]
        n_prompt = sum(choice.n_prompt for choice in firsts)
        n_tokens = sum(choice.n_tokens for choice in self._choices)
        thoughts = [choice.message.reasoning for choice in self._choices]
        n_thought = sum(len(self._tokenizer.tokenize(text, add_bos=False)) for text in thoughts if text)
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_tokens,
            "total_tokens": n_prompt + n_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(choice.n_cached for choice in firsts)},
            "completion_tokens_details": {"reasoning_tokens": min(n_thought, n_tokens)},
        }

    def _figures(self) -> Json:
        ends = [choice.end for choice in self._choices if choice.end is not None]
        timings: dict[str, float] = {}
        for end in ends:
            for name, seconds in end.timings.items():
                timings[name] = timings.get(name, 0.0) + seconds
        return {
            "type": "summary",
            "steps": sum(sum(choice.canvas_steps) for choice in self._choices),
            "canvas_steps": [choice.canvas_steps for choice in self._choices],
            "seeds": [end.seed for end in ends],
            "finish_reasons": [end.reason for end in ends],
            "timings": timings,
            "ignored_parameters": self._request.ignored,
        }
