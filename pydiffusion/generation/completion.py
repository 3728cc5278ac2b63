"""The result of a generation, from its events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pydiffusion.events import CanvasEvent, ChatCompletion, Completion, EndEvent, Reasoning, ToolCall
from pydiffusion.tokenizer import Tokenizer

from .streaming import count_tokens


def completion_of(
    tokenizer: Tokenizer, n_prompt: int, events: Sequence[CanvasEvent | EndEvent]
) -> Completion:
    """The completion that these events are; the last one is the end. n_prompt: tokens of the prompt."""
    common = _common(n_prompt, events)
    if common["finish_reason"] == "stop":  # the stop string may begin in an earlier canvas than it ends in
        common["tokens"] = common["tokens"][: count_tokens(tokenizer, common["tokens"], len(common["text"]))]
    return Completion(**common)


def chat_completion_of(
    n_prompt: int, n_cached: int, events: Sequence[CanvasEvent | EndEvent]
) -> ChatCompletion:
    """As ``completion_of``, of the events of ``Session.generate_chat``."""
    parts = [part for event in events if isinstance(event, CanvasEvent) for part in event.parts]
    return ChatCompletion(
        **_common(n_prompt, events),
        reasoning="".join(part.text for part in parts if isinstance(part, Reasoning)),
        tool_calls=tuple(part for part in parts if isinstance(part, ToolCall)),
        n_cached=n_cached,
    )


def _common(n_prompt: int, events: Sequence[CanvasEvent | EndEvent]) -> dict[str, Any]:
    """The fields of a Completion, its tokens up to the canvas in which a stop string ends."""
    end = events[-1]
    assert isinstance(end, EndEvent)
    canvases = [event for event in events if isinstance(event, CanvasEvent)]
    return {
        "text": "".join(canvas.text for canvas in canvases),
        "tokens": np.concatenate([canvas.tokens for canvas in canvases]),
        "steps": sum(canvas.steps for canvas in canvases),
        "timings": end.timings,
        "finish_reason": end.reason,
        "seed": end.seed,
        "n_prompt": n_prompt,
        "canvas_steps": tuple(canvas.steps for canvas in canvases),
    }
