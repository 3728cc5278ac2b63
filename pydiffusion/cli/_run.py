"""Prefill and generate with progress and live display."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ._text import say

if TYPE_CHECKING:
    from pydiffusion import Completion, DiffusionModel, GenerationOptions, Session
    from pydiffusion.vision.prompt import Prompt

    from ._display import CanvasDisplay

SECONDS_PER_STEP = 0.25
"""Shortest time for which the demo shows a draft."""


def prefill(session: Session, ids: list[int] | Prompt, quiet: bool = False) -> None:
    """Prefill the prompt with a progress bar, unless quiet."""
    from ._progress import progress

    if len(ids) == 0:
        raise ValueError("the prompt has no tokens")
    with progress(f"reading {len(ids)} tokens", quiet) as update:
        session.prefill(ids, progress=update)


def run(
    model: DiffusionModel,
    session: Session,
    options: GenerationOptions,
    *,
    show: bool,
    quiet: bool = False,
    text: bool = True,
    seconds_per_step: float = 0.0,
) -> Completion:
    """Generate after the session's tokens: the text to stdout, timings to stderr.

    show: draw the drafts if stderr is a terminal, else only the steps.  quiet: neither steps nor timings.
    text: whether to print the text.
    """
    from ._display import AnswerPrinter

    resolved = model.resolve(options)
    display = None if quiet else display_for(model, resolved.eos, show, seconds_per_step)
    with AnswerPrinter(display, not text) as printer:
        done = session.complete(resolved, on_event=printer)
    if not quiet:
        say(figures(done))
    return done


def display_for(
    model: DiffusionModel, eos: tuple[int, ...], show: bool, seconds_per_step: float = 0.0
) -> CanvasDisplay | None:
    """Display of progress on stderr: the canvas, or a line about its steps; None unless it is a terminal."""
    from ._display import CanvasDisplay, StepLine

    if not sys.stderr.isatty():
        return None
    kind = CanvasDisplay if show else StepLine
    return kind(model.tokenizer, eos, seconds_per_step)


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
