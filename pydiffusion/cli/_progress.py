"""Progress on stderr: a bar on a terminal, a line every few seconds in a pipe."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pydiffusion._util.sizes import format_size

from ._text import one_line

if TYPE_CHECKING:
    from rich.console import Console

    from pydiffusion.convert import ConversionProgress

# Interval of progress lines in a pipe.
_SECONDS_BETWEEN_LINES = 5.0


def stderr_console() -> Console:
    """A console on stderr, without markup and highlighting, since texts are untrusted."""
    from rich.console import Console

    return Console(stderr=True, markup=False, highlight=False, emoji=False)


@contextmanager
def progress(label: str, quiet: bool = False) -> Iterator[Callable[..., None]]:
    """Show progress, unless quiet; yields a function of the amount done, the total, and the pace as text."""
    if quiet:
        yield lambda done, total, pace="": None
        return
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
    yield _Lines(label).update


class _Lines:
    """Progress in a pipe: a line every few seconds."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._last = time.perf_counter()

    def update(self, done: float, total: float, pace: str = "") -> None:
        now = time.perf_counter()
        if now - self._last >= _SECONDS_BETWEEN_LINES and total:
            self._last = now
            more = f", {pace}" if pace else ""
            print(f"{self._label}: {100 * done / total:.0f}%{more}", file=sys.stderr, flush=True)


class conversion_progress:
    """Shows the stages of a conversion; a context manager that yields the progress callback."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._stage = ""
        self._shown: AbstractContextManager[Callable[..., None]] | None = None

    def __enter__(self) -> Callable[[ConversionProgress], None]:
        return self._update

    def _update(self, state: ConversionProgress) -> None:
        if state.stage != self._stage:
            self.__exit__()
            self._stage = state.stage
            verb = {"write": "writing", "verify": "verifying"}.get(state.stage, state.stage)
            self._shown = progress(f"{verb} {self._target.name}")
            self._show = self._shown.__enter__()
        self._show(state.done_bytes, state.total_bytes, pace(state))

    def __exit__(self, *_: object) -> None:
        if self._shown is not None:
            self._shown.__exit__(None, None, None)
            self._shown = None


def pace(state: ConversionProgress) -> str:
    """``120 MB/s, 1:05 left``; empty while unknown."""
    rate, left = state.bytes_per_second, state.seconds_left
    if rate is None or left is None:
        return ""
    minutes, seconds = divmod(round(left), 60)
    hours, minutes = divmod(minutes, 60)
    clock = f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
    return f"{format_size(rate)}/s, {clock} left"


def quiet_hub_in_a_pipe() -> None:
    """Disable huggingface_hub's progress bars unless stderr is a terminal; call before importing it."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
