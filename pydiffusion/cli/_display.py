"""What a person sees on stderr: progress, and the canvas as it settles. In a pipe plain lines only."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import numpy as np

from ._text import one_line, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from pydiffusion.events import CanvasEvent, DraftEvent, Event
    from pydiffusion.tokenizer import Tokenizer

# In a pipe, work that takes longer than this says where it stands, and again after as long.
_SECONDS_BETWEEN_LINES = 5.0
_INFO_WIDTH = 24
_NARROW = 60
# Kept free at the right: the "^C" that a terminal echoes must not wrap, or the drawing could not be cleared.
_MARGIN = 4


def stderr_console() -> Console:
    """A console on stderr; markup and highlighting stay off, for texts are not ours."""
    from rich.console import Console

    return Console(stderr=True, markup=False, highlight=False, emoji=False)


@contextmanager
def progress(label: str) -> Iterator[Callable[..., None]]:
    """Show work under way; yields a function that takes how much is done and how much there is, and if it is
    known a few words about the pace.
    """
    label = one_line(label)
    if sys.stderr.isatty():
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:3.0f}% {task.fields[pace]}", markup=False),
        )
        with Progress(*columns, console=stderr_console(), transient=True) as bar:
            task = bar.add_task(label, total=None, pace="")
            yield lambda done, total, pace="": bar.update(task, completed=done, total=total, pace=pace)
        return
    last = time.perf_counter()

    def update(done: float, total: float, pace: str = "") -> None:
        nonlocal last
        if time.perf_counter() - last >= _SECONDS_BETWEEN_LINES and total:
            last = time.perf_counter()
            more = f", {pace}" if pace else ""
            print(f"{label}: {100 * done / total:.0f}%{more}", file=sys.stderr, flush=True)

    yield update


@contextmanager
def _without_echo() -> Iterator[None]:
    """Keys typed while a drawing stands are read later but not shown: an echoed line break would shift it."""
    try:
        import termios
    except ImportError:  # Windows
        yield
        return
    try:
        descriptor = sys.stdin.fileno()
        before = termios.tcgetattr(descriptor)
    except (OSError, ValueError, termios.error):  # no terminal
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
    """Draws each draft in place and clears it when its canvas is finished.

    Settled tokens are bright, the others dim; beside them step, mean entropy and steps per canvas.
    """

    def __init__(self, tokenizer: Tokenizer, eos: tuple[int, ...], seconds_per_step: float = 0.0) -> None:
        """seconds_per_step: show each draft at least so long, for small models are faster than eyes."""
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
        """Draw a draft over the one before. line: finished text that the draft continues."""
        wait = self._last + self._seconds_per_step - time.perf_counter()
        if wait > 0:
            time.sleep(wait)
        if not self._live.is_started:
            self._echo.enter_context(_without_echo())
            self._live.start()
        self._live.update(self._layout(event, line), refresh=True)
        self._last = time.perf_counter()

    def canvas(self, event: CanvasEvent) -> None:
        """Clear the drawing: the canvas's text is about to be printed for good."""
        self._canvas_steps.append(event.steps)
        if self._seconds_per_step:
            time.sleep(self._seconds_per_step)
        self.clear()

    def clear(self) -> None:
        """Leave nothing drawn."""
        if self._live.is_started:
            self._live.update("", refresh=True)
            self._live.stop()
        self._echo.close()

    def _layout(self, event: DraftEvent, line: str) -> Table:
        from rich.table import Table
        from rich.text import Text

        facts = [
            f"canvas {event.canvas_index + 1}",
            f"step {event.steps - event.step + 1} of {event.steps}",
            f"entropy {float(np.mean(event.entropy)):.3f}",
            f"settled {int(np.count_nonzero(event.accepted))} of {len(event.accepted)}",
        ]
        if self._canvas_steps:
            facts.append(f"{np.mean(self._canvas_steps):.1f} steps per canvas")
        width = self._console.width - _MARGIN
        narrow = width < _NARROW
        draft = Text(line) + self.styled(event.tokens, event.accepted)
        # What does not fit the screen is cut above, for the canvas is at the end.
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
        """A draft, its settled tokens bright and the others dim, up to an eos that is settled."""
        from rich.text import Text

        from pydiffusion.tokenizer.markers import MARKERS

        text = Text()
        run, run_settled = bytearray(), True
        for token_id, settled in zip(tokens.tolist(), accepted.tolist(), strict=True):
            piece = self._tokenizer.piece(token_id)
            if isinstance(
                piece, bytes
            ):  # bytes of one character may be settled one by one: it is when they all are
                run += piece
                run_settled = run_settled and settled
                continue
            text.append(printable(run.decode("utf-8", "replace")), _style(run_settled))
            run, run_settled = bytearray(), True
            if settled and token_id in self._eos:
                break
            steers = piece is None or piece in MARKERS
            text.append("·" if steers else printable(piece), _style(settled))
        text.append(printable(run.decode("utf-8", "replace")), _style(run_settled))
        return text


def _style(settled: bool) -> str:
    return "bold" if settled else "dim"


class AnswerPrinter:
    """A callback for events: drafts are drawn on stderr if there is a display, text goes to stdout.

    Where both are on one terminal, a line that may go on stays in the drawing until it is complete: what is
    printed must end at a line break, or the next drawing would cover it. Leaving the context prints the rest.
    """

    def __init__(self, canvas_display: CanvasDisplay | None, quiet: bool = False) -> None:
        """quiet: keep the text off stdout."""
        self._display = canvas_display
        self._quiet = quiet
        self._for_terminal = sys.stdout.isatty()
        self._line = ""
        self.text = ""

    def __call__(self, event: Event) -> None:
        from pydiffusion.chat.output_parser import Reasoning
        from pydiffusion.events import CanvasEvent, DraftEvent

        if isinstance(event, DraftEvent) and self._display is not None:
            self._display.draft(event, self._line)
        elif isinstance(event, CanvasEvent):
            if self._display is not None:
                self._display.canvas(event)
            self._think("".join(part.text for part in event.parts if isinstance(part, Reasoning)))
            self.text += event.text
            self._print(event.text)

    def _think(self, thought: str) -> None:
        """A thought, apart from the answer: dim on a terminal, elsewhere a line marked as such."""
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
