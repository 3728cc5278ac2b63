"""Jobs: a request for the scheduler, its runs (one per choice) and their reports."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from pydiffusion.errors import GenerationCancelled
from pydiffusion.generation.batching import ActiveSequence
from pydiffusion.generation.chat_images import n_image_bytes
from pydiffusion.openai.errors import ApiError
from pydiffusion.openai.reports import Report

if TYPE_CHECKING:
    from pydiffusion.openai.prepared import PreparedRun
    from pydiffusion.session import Session


class Job:
    """A request being scheduled. The scheduler's thread calls ``emit`` with (index of the run, report)."""

    def __init__(
        self,
        runs: list[PreparedRun],
        emit: Callable[[int, Report], None],
        *,
        chat: bool,
        drafts: bool = False,
        one_call: bool = False,
    ) -> None:
        """chat: split answers into parts.  drafts: report every step.  one_call: stop after one tool call."""
        self.runs = runs
        self.emit = emit
        self.chat = chat
        self.drafts = drafts
        self.one_call = one_call
        # The choices of one prompt share its images.
        prompts = {id(run.prompt): run.prompt for run in runs}
        self.n_image_bytes = sum(map(n_image_bytes, prompts.values()))
        self.n_begun = 0  # runs that have or had a sequence
        self.in_flight: list[RunSequence] = []
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
        """The error it was cancelled with, or None."""
        return self._error

    @property
    def is_done(self) -> bool:
        return not self.in_flight and self.n_begun == len(self.runs)

    def bind(self, session: Session) -> None:
        """Let ``cancel`` reach this session from now on."""
        with self._lock:
            self._sessions.append(session)
            if self._error is not None:
                session.cancel()

    def release(self, session: Session) -> None:
        """Undo ``bind``, and clear a cancellation that came too late from the session."""
        with self._lock:
            self._sessions.remove(session)
        if self._error is not None:
            with contextlib.suppress(GenerationCancelled):
                session.truncate(session.n_past)


class RunSequence(ActiveSequence):
    """A run's sequence in the batch."""

    def __init__(self, job: Job, i_run: int, session: Session) -> None:
        run = job.runs[i_run]
        super().__init__(session, run.prompt, run.options, chat=job.chat)
        self.job = job
        self.i_run = i_run
        self.run = run
        self.is_reported = False
