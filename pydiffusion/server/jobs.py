"""A request in the scheduler's hands: the answers that it asks for, and what is reported of them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydiffusion.errors import GenerationCancelled
from pydiffusion.generation.batching import Lane
from pydiffusion.openai.errors import ApiError
from pydiffusion.openai.reports import Report
from pydiffusion.options import GenerationOptions

if TYPE_CHECKING:
    from pydiffusion.session import Session


@dataclass(frozen=True)
class Run:
    """One answer that a request asks for: the tokens before it, and how to make it (seed included)."""

    prompt: list[int]
    options: GenerationOptions


class Job:
    """A request in the scheduler's hands. Its thread calls ``emit`` with (number of the run, report)."""

    def __init__(
        self,
        runs: list[Run],
        emit: Callable[[int, Report], None],
        *,
        chat: bool,
        drafts: bool = False,
        one_call: bool = False,
    ) -> None:
        """chat: divide answers into parts.  drafts: report every step.  one_call: end after a tool call."""
        self.runs = runs
        self.emit = emit
        self.chat = chat
        self.drafts = drafts
        self.one_call = one_call
        self.n_begun = 0  # runs that have, or had, a lane
        self.lanes: list[RunLane] = []
        self.started = 0.0
        self._lock = threading.Lock()
        self._sessions: list[Session] = []
        self._error: ApiError | None = None

    def cancel(self, error: ApiError) -> None:
        """Stop the work within one step; the job reports this error. From any thread, more than once."""
        with self._lock:
            if self._error is None:
                self._error = error
                for session in self._sessions:
                    session.cancel()

    @property
    def error(self) -> ApiError | None:
        """Why it was cancelled, or None."""
        return self._error

    @property
    def is_done(self) -> bool:
        return not self.lanes and self.n_begun == len(self.runs)

    def bind(self, session: Session) -> None:
        """From here on, ``cancel`` reaches this session."""
        with self._lock:
            self._sessions.append(session)
            if self._error is not None:
                session.cancel()

    def release(self, session: Session) -> None:
        """From here on it does not; a cancellation that came too late is gone from the session."""
        with self._lock:
            self._sessions.remove(session)
        if self._error is not None:
            with contextlib.suppress(GenerationCancelled):
                session.truncate(session.n_past)


class RunLane(Lane):
    """A run in the making."""

    def __init__(self, job: Job, i_run: int, session: Session) -> None:
        run = job.runs[i_run]
        super().__init__(session, run.prompt, run.options, chat=job.chat)
        self.job = job
        self.i_run = i_run
        self.run = run
        self.is_reported = False
