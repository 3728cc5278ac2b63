"""Prefill and generate with progress and live display."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ._text import say

if TYPE_CHECKING:
    from pydiffusion import Completion, DiffusionModel, GenerationOptions, Session


def prefill(session: Session, ids: list[int]) -> None:
    """Prefill the prompt with a progress bar."""
    from ._progress import progress

    if not ids:
        raise ValueError("the prompt has no tokens")
    with progress(f"reading {len(ids)} tokens") as update:
        session.prefill(ids, progress=update)


def run(
    model: DiffusionModel,
    session: Session,
    options: GenerationOptions,
    *,
    show: bool,
    quiet: bool = False,
    seconds_per_step: float = 0.0,
) -> Completion:
    """Generate after the session's tokens: text to stdout (unless quiet), timings to stderr.

    show: draw the drafts if stderr is a terminal.
    """
    from ._display import AnswerPrinter, CanvasDisplay

    resolved = model.resolve(options)
    draw = show and sys.stderr.isatty()
    display = CanvasDisplay(model.tokenizer, resolved.eos, seconds_per_step) if draw else None
    with AnswerPrinter(display, quiet) as printer:
        done = session.complete(resolved, on_event=printer)
    say(figures(done))
    return done


def figures(done: Completion) -> str:
    """Summary line with length, steps and speed."""
    n_canvases = len(done.canvas_steps)
    seconds = done.timings["encode"] + done.timings["denoise"]
    return (
        f"{done.n_prompt} + {len(done.tokens)} tokens ({done.finish_reason}), {n_canvases} canvas"
        f"{'es' if n_canvases != 1 else ''}, {done.steps / n_canvases:.1f} steps per canvas,"
        f" {1000 * done.timings['denoise'] / done.steps:.1f} ms per step,"
        f" {len(done.tokens) / seconds if seconds else 0:.1f} tokens/s, seed {done.seed}"
    )
