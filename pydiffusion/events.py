"""What a generation reports while it runs, and what it leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

import numpy as np

from .chat.output_parser import Content, Part, Reasoning, ToolCall

__all__ = [
    "CanvasEvent",
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
    tokens: the draft, the likeliest token of every position, int32 (canvas_length,).
    entropy: of every position's distribution, in nats, float32 (canvas_length,).
    accepted: the positions that this step settled, bool (canvas_length,).
    canvas_index: which canvas, counted from 0.  steps: the most that a canvas may take.
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
        """The draft up to its first eos, control tokens left out; made when first asked for."""
        return self._to_text(self.tokens)


@dataclass(frozen=True, eq=False)
class CanvasEvent:
    """A canvas is finished.

    tokens: cut before the first eos, at max_tokens and at a stop string, int32 (n,).
    text: what this canvas adds to the text. Bytes of an unfinished character and the beginning of a possible
        stop string are held back for the next event, so that the texts joined are the text of the completion.
    steps: the denoising steps that it took.  canvas_index: counted from 0.
    parts: from ``Session.generate_chat``: thinking, answer, tool calls apart; ``text`` is the answer's alone.
    """

    tokens: np.ndarray
    text: str
    steps: int
    canvas_index: int
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True, eq=False)
class EndEvent:
    """The generation is over.

    reason: "eos", "stop" (a stop string), "length" (max_tokens), "context" (the session is full) or
        "repetition" (``stop_on_repetition``).
    timings: seconds by part of the work: "prompt" (encoded since the last generation), "encode" (finished
        canvases), "denoise", "total".
    seed: that repeats this generation.
    """

    reason: str
    timings: dict[str, float]
    seed: int


Event: TypeAlias = DraftEvent | CanvasEvent | EndEvent


@dataclass(frozen=True, eq=False)
class Completion:
    """What a generation made.

    text, tokens: without eos and stop string; int32 (n,).
    steps: denoising steps of all canvases together, ``canvas_steps`` of each.
    finish_reason: as ``EndEvent.reason``.  n_prompt: tokens of the prompt, bos included.
    timings: as ``EndEvent.timings``.  seed: that repeats this generation.
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
        """Tokens for each denoising step: the figure that people quote beside time."""
        return len(self.tokens) / self.steps if self.steps else 0.0
