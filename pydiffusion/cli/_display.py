"""Live display of the canvas on stderr, and printing of answers."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import numpy as np

from ._progress import stderr_console
from ._text import one_line, printable

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

    from pydiffusion.events import CanvasEvent, DraftEvent, Event
    from pydiffusion.tokenizer import Tokenizer

_INFO_WIDTH = 24
_NARROW = 60
# Right margin: the "^C" that a terminal echoes must not wrap, or the display could not be cleared.
_MARGIN = 4


@contextmanager
def _without_echo() -> Iterator[None]:
    """Disable echo while the display is active: an echoed line break would shift it."""
    try:
        import termios
    except ImportError:  # Windows
        yield
        return
    try:
        descriptor = sys.stdin.fileno()
        before = termios.tcgetattr(descriptor)
    except (OSError, ValueError, termios.error):  # not a terminal
        yield
        return
    silent = before.copy()
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(descriptor, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSANOW, before)


class CanvasDisplay:
    """Draws each draft in place and clears it when the canvas is finished.

    Accepted tokens are bright, the others dim, next to step, mean entropy and steps per canvas.
    """

    def __init__(self, tokenizer: Tokenizer, eos: tuple[int, ...], seconds_per_step: float = 0.0) -> None:
        """seconds_per_step: minimum time to show each draft, for small models."""
        from rich.live import Live

        self._tokenizer = tokenizer
        self._eos = np.asarray(eos, dtype=np.int64)
        self._seconds_per_step = seconds_per_step
        self._canvas_steps: list[int] = []
        self._console = stderr_console()
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._echo = ExitStack()
        self._last = 0.0

    def draft(self, event: DraftEvent, line: str = "") -> None:
        """Draw a draft over the previous one. line: finished text that the draft continues."""
        wait = self._last + self._seconds_per_step - time.perf_counter()
        if wait > 0:
            time.sleep(wait)
        if not self._live.is_started:
            self._echo.enter_context(_without_echo())
            self._live.start()
        self._live.update(self._layout(event, line), refresh=True)
        self._last = time.perf_counter()

    def canvas(self, event: CanvasEvent) -> None:
        """Clear the display before the canvas's final text is printed."""
        self._canvas_steps.append(event.steps)
        if self._seconds_per_step:
            time.sleep(self._seconds_per_step)
        self.clear()

    def clear(self) -> None:
        """Clear the display."""
        if self._live.is_started:
            self._live.update("", refresh=True)
            self._live.stop()
        self._echo.close()

    def _facts(self, event: DraftEvent) -> list[str]:
        facts = [
            f"canvas {event.canvas_index + 1}",
            f"step {event.steps - event.step + 1} of {event.steps}",
            f"entropy {float(np.mean(event.entropy)):.3f}",
            f"settled {int(np.count_nonzero(event.accepted))} of {len(event.accepted)}",
        ]
        if self._canvas_steps:
            facts.append(f"{np.mean(self._canvas_steps):.1f} steps per canvas")
        return facts

    def _layout(self, event: DraftEvent, line: str) -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        facts = self._facts(event)
        width = self._console.width - _MARGIN
        narrow = width < _NARROW
        draft = Text(line) + self.styled(event.tokens, event.accepted)
        # Text that does not fit the screen is cut at the top, since the canvas is at the end.
        rows = draft.wrap(self._console, width - (0 if narrow else _INFO_WIDTH + 2))
        draft = Text("\n").join(rows[-max(1, self._console.height - 3) :])
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.width = width
        if narrow:
            grid.add_row(Text(" · ".join(facts), style="cyan"))
            grid.add_row(draft)
        else:
            grid.add_column(ratio=1)
            grid.add_column(width=_INFO_WIDTH)
            grid.add_row(draft, Text("\n".join(facts), style="cyan"))
        return grid

    def styled(self, tokens: np.ndarray, accepted: np.ndarray) -> Text:
        """Style a draft: accepted tokens bright, others dim, up to an accepted eos."""
        from rich.text import Text

        markers = self._tokenizer.chat_format.markers
        text = Text()
        run, run_settled = bytearray(), True
        for token_id, settled in zip(tokens.tolist(), accepted.tolist(), strict=True):
            piece = self._tokenizer.piece(token_id)
            if isinstance(piece, bytes):  # a character of several bytes is accepted when all its bytes are
                run += piece
                run_settled = run_settled and settled
                continue
            text.append(printable(run.decode("utf-8", "replace")), _style(run_settled))
            run, run_settled = bytearray(), True
            if settled and token_id in self._eos:
                break
            shown = "·" if piece is None or piece in markers else printable(piece)  # of tokens that steer
            text.append(shown, _style(settled))
        text.append(printable(run.decode("utf-8", "replace")), _style(run_settled))
        return text


class StepLine(CanvasDisplay):
    """One line about the canvas and its steps, in place of its text."""

    def _layout(self, event: DraftEvent, line: str) -> RenderableType:
        from rich.text import Text

        width = max(1, self._console.width - _MARGIN)
        rows = [*Text(line).wrap(self._console, width), Text(" · ".join(self._facts(event))[:width], "cyan")]
        return Text("\n").join(rows[-max(1, self._console.height - 1) :])


def _style(settled: bool) -> str:
    return "bold" if settled else "dim"


class AnswerPrinter:
    """Event callback: draws drafts on stderr if there is a display, prints text to stdout.

    If both are the same terminal, an incomplete line stays in the display until it is complete: printed text
    must end at a line break, or the next drawing would overwrite it. Leaving the context prints the rest.
    """

    def __init__(self, canvas_display: CanvasDisplay | None, quiet: bool = False) -> None:
        """quiet: don't print the text."""
        self._display = canvas_display
        self._quiet = quiet
        self._for_terminal = sys.stdout.isatty()
        self._line = ""
        self.text = ""

    def __call__(self, event: Event) -> None:
        from pydiffusion.events import CanvasEvent, DraftEvent, Reasoning

        if isinstance(event, DraftEvent) and self._display is not None:
            self._display.draft(event, self._line)
        elif isinstance(event, CanvasEvent):
            if self._display is not None:
                self._display.canvas(event)
            self._think("".join(part.text for part in event.parts if isinstance(part, Reasoning)))
            self.text += event.text
            self._print(event.text)

    def _think(self, thought: str) -> None:
        """Print reasoning to stderr: dim on a terminal, elsewhere as a prefixed line."""
        if not thought or self._quiet:
            return
        if sys.stderr.isatty():
            stderr_console().print(printable(thought), style="dim italic")
        else:
            print(f"thinking: {one_line(thought)}", file=sys.stderr, flush=True)

    def _print(self, text: str) -> None:
        if self._quiet:
            return
        if self._for_terminal:
            text = printable(text)
        if self._for_terminal and self._display is not None:
            text, self._line = _split_after_last_break(self._line + text)
        sys.stdout.write(text)
        sys.stdout.flush()

    def __enter__(self) -> AnswerPrinter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._display is not None:
            self._display.clear()
        if not self._quiet:
            print(self._line, flush=True)


def _split_after_last_break(text: str) -> tuple[str, str]:
    cut = text.rfind("\n") + 1
    return text[:cut], text[cut:]
