"""Draft events: a denoising step for clients that display the canvas."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pydiffusion.events import DraftEvent
    from pydiffusion.tokenizer import Tokenizer


def draft_fields(i_choice: int, event: DraftEvent, tokenizer: Tokenizer) -> dict[str, Any]:
    """Serialize a step: text, acceptance and entropy (nats, 3 decimals) of each position."""
    return {
        "type": "draft",
        "index": i_choice,
        "canvas": event.canvas_index,
        "step": event.steps - event.step + 1,
        "max_steps": event.steps,
        "pieces": pieces(event.tokens, tokenizer),
        "settled": event.accepted.astype(int).tolist(),
        "entropy": np.round(event.entropy.astype(float), 3).tolist(),
    }


def pieces(tokens: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """Text of each position, empty for control tokens and markers.

    A character of several byte tokens is at the position of the first.
    """
    texts: list[str] = []
    run = b""
    for token in tokens.tolist():
        piece = tokenizer.piece(token)
        if isinstance(piece, bytes):
            run += piece
            texts.append("")
            continue
        _settle(texts, run)
        run = b""
        texts.append("" if piece is None or piece in tokenizer.chat_format.markers else piece)
    _settle(texts, run)
    return texts


def _settle(texts: list[str], run: bytes) -> None:
    if run:
        texts[len(texts) - len(run)] = run.decode("utf-8", "replace")
