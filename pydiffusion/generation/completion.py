"""The result of a generation, from its events."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pydiffusion.events import CanvasEvent, Completion, EndEvent
from pydiffusion.tokenizer import Tokenizer

from .streaming import count_tokens


def completion_of(
    tokenizer: Tokenizer, n_prompt: int, events: Sequence[CanvasEvent | EndEvent]
) -> Completion:
    """The completion that these events are; the last one is the end. n_prompt: tokens of the prompt."""
    end = events[-1]
    assert isinstance(end, EndEvent)
    canvases = [event for event in events if isinstance(event, CanvasEvent)]
    text = "".join(canvas.text for canvas in canvases)
    tokens = np.concatenate([canvas.tokens for canvas in canvases])
    if end.reason == "stop":  # the stop string may begin in an earlier canvas than it ends in
        tokens = tokens[: count_tokens(tokenizer, tokens, len(text))]
    return Completion(
        text=text,
        tokens=tokens,
        steps=sum(canvas.steps for canvas in canvases),
        timings=end.timings,
        finish_reason=end.reason,
        seed=end.seed,
        n_prompt=n_prompt,
        canvas_steps=tuple(canvas.steps for canvas in canvases),
    )
