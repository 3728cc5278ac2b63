"""Events of a running generation, and its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np

from .chat.messages import Message, answer_message
from .chat.output_parser import Content, Part, Reasoning, ToolCall

__all__ = [
    "CanvasEvent",
    "ChatCompletion",
    "Completion",
    "Content",
    "DraftEvent",
    "EndEvent",
    "Event",
    "Part",
    "Reasoning",
    "ToolCall",
]


@dataclass(frozen=True, eq=False)
class DraftEvent:
    """One denoising step of the current canvas.

    step: counts down from ``steps`` to 1.
    tokens: the draft, the most likely token at each position, int32 (canvas_length,).
    entropy: entropy of each position's distribution in nats, float32 (canvas_length,).
    accepted: the positions accepted by this step, bool (canvas_length,).
    canvas_index: index of the canvas, from 0.  steps: maximum number of steps per canvas.
    """

    step: int
    tokens: np.ndarray
    entropy: np.ndarray
    accepted: np.ndarray
    canvas_index: int
    steps: int
    _to_text: Callable[[np.ndarray], str] = field(repr=False)

    @cached_property
    def text(self) -> str:
        """The draft up to its first eos, without control tokens; decoded on first use."""
        return self._to_text(self.tokens)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the text instead of the tokenizer that decodes it."""
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        return _unpickled_draft, (own | {"_to_text": _Decoded(self.text)},)


@dataclass(frozen=True)
class _Decoded:
    """The text of an unpickled draft, decoded before."""

    text: str

    def __call__(self, tokens: np.ndarray) -> str:
        return self.text


def _unpickled_draft(own: dict[str, Any]) -> DraftEvent:
    return DraftEvent(**own)


@dataclass(frozen=True, eq=False)
class CanvasEvent:
    """A canvas is finished.

    tokens: truncated at the first eos, at max_tokens and at a stop string, int32 (n,).
    text: the text that this canvas adds. Bytes of an incomplete character and a possible prefix of a stop
        string are held back for the next event, so that the concatenated texts are the text of the
        completion.
    steps: number of denoising steps.  canvas_index: index of the canvas, from 0.
    parts: with ``Session.generate_chat``, reasoning, answer and tool calls separately; ``text`` is the
        answer's.
    """

    tokens: np.ndarray
    text: str
    steps: int
    canvas_index: int
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True, eq=False)
class EndEvent:
    """The generation is over.

    reason: "eos", "stop" (a stop string), "length" (max_tokens), "context" (the context is full) or
        "repetition" (``stop_on_repetition``).
    timings: seconds per phase: "prompt" (encoded since the last generation), "encode" (finished canvases),
        "denoise", "total".
    seed: reproduces this generation.
    """

    reason: str
    timings: dict[str, float]
    seed: int


Event: TypeAlias = DraftEvent | CanvasEvent | EndEvent


@dataclass(frozen=True, eq=False)
class Completion:
    """Result of a generation.

    text, tokens: without eos and stop string; int32 (n,).
    steps: denoising steps of all canvases; ``canvas_steps``: per canvas.
    finish_reason: as ``EndEvent.reason``.  n_prompt: prompt tokens, including bos.
    timings: as ``EndEvent.timings``.  seed: reproduces this generation.
    """

    text: str
    tokens: np.ndarray
    steps: int
    timings: dict[str, float]
    finish_reason: str
    seed: int
    n_prompt: int
    canvas_steps: tuple[int, ...]

    @property
    def tokens_per_step(self) -> float:
        """Tokens per denoising step."""
        return len(self.tokens) / self.steps if self.steps else 0.0


@dataclass(frozen=True, eq=False)
class ChatCompletion(Completion):
    """Result of a chat: the answer, with reasoning and tool calls apart.

    text: the answer's text only.  tokens: of all that was generated, reasoning, calls and their markers
        included.
    reasoning: the reasoning, empty if there is none.  tool_calls: in order, arguments as a dict.
    n_cached: prompt tokens that were in the session's cache already.
    Otherwise as Completion; a model that calls a tool ends its turn, so ``finish_reason`` is "eos" then too.
    """

    reasoning: str
    tool_calls: tuple[ToolCall, ...]
    n_cached: int

    @cached_property
    def message(self) -> Message:
        """The answer as a message in OpenAI's format, to append to the conversation; do so before a tool's
        result, which refers to an id in it.
        """
        return answer_message(self.text, self.reasoning, self.tool_calls)
