"""One thread in front of the model: requests in the order of arrival, a few at a time, a canvas each in turn.

Sessions take turns on the processor anyway, so more threads would only wait for each other. Turns of a canvas
let a short request pass a long one; sessions that are left over keep their cache for the request that begins
with the same tokens.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

from pydiffusion.chat_output import ToolCall
from pydiffusion.errors import GenerationCancelled
from pydiffusion.events import CanvasEvent, DraftEvent, EndEvent, Event
from pydiffusion.options import GenerationOptions

from .errors import ApiError, from_exception
from .pool import SessionPool

if TYPE_CHECKING:
    from pydiffusion.model import DiffusionModel
    from pydiffusion.session import Session


@dataclass(frozen=True)
class Run:
    """One answer that a request asks for: the tokens before it, and how to make it (seed included)."""

    prompt: list[int]
    options: GenerationOptions


@dataclass(frozen=True)
class Prefilled:
    """The prompt of a run is in the cache, of which ``n_cached`` tokens were there already."""

    n_cached: int


@dataclass(frozen=True)
class Failed:
    """The request ends here, with this error."""

    error: ApiError


@dataclass(frozen=True)
class Finished:
    """All runs of the request are done."""


# What a job reports, with the number of the run that it is about.
Report: TypeAlias = Prefilled | Event | Failed | Finished


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
        self._lock = threading.Lock()
        self._session: Session | None = None
        self._error: ApiError | None = None
        self.seconds = 0.0  # of work so far

    def cancel(self, error: ApiError) -> None:
        """Stop the work within one step; the job reports this error. From any thread, more than once."""
        with self._lock:
            if self._error is None:
                self._error = error
                if self._session is not None:
                    self._session.cancel()

    @property
    def error(self) -> ApiError | None:
        """Why it was cancelled, or None."""
        return self._error

    def bind(self, session: Session) -> None:
        """From here on, ``cancel`` reaches this session."""
        with self._lock:
            self._session = session

    def release(self) -> Session | None:
        """Take the session back; a cancellation that came too late is gone from it."""
        with self._lock:
            session, self._session = self._session, None
        if session is not None and self._error is not None:
            with contextlib.suppress(GenerationCancelled):
                session.truncate(session.n_past)
        return session


class Counters:
    """What /metrics tells of the work. Only the scheduler's thread writes."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generated_tokens = 0
        self.canvases = 0
        self.steps = 0
        self.busy_seconds = 0.0
        self.cancelled = 0


class Scheduler:
    """Owns the thread and the sessions of a model."""

    def __init__(self, model: DiffusionModel, *, max_queue: int = 64, n_sessions: int = 4) -> None:
        """max_queue: requests that may wait beside those being served; n_sessions: how many are served."""
        self.model = model
        self.max_queue = max_queue
        self.counters = Counters()
        self._pool = SessionPool(model, n_sessions)
        self._changed = threading.Condition()
        self._queue: deque[Job] = deque()
        self._active: deque[tuple[Job, Iterator[None]]] = deque()
        self._closing = False
        self._stopped = False
        self._seconds_per_job = 1.0
        self._thread = threading.Thread(target=self._loop, name="pydiffusion-scheduler", daemon=True)
        self._thread.start()

    # For the server's threads

    @property
    def n_waiting(self) -> int:
        return len(self._queue)

    @property
    def n_active(self) -> int:
        return len(self._active)

    @property
    def n_sessions(self) -> int:
        return self._pool.size

    def submit(self, job: Job) -> None:
        """Queue a job. ApiError 429 when the queue is full, 503 when the server is going down."""
        with self._changed:
            if self._closing:
                raise _going_down()
            n_free = max(
                0, self._pool.size_limit - len(self._active)
            )  # places that the thread is about to fill
            if len(self._queue) >= self.max_queue + n_free:
                seconds = math.ceil(self._seconds_per_job * (len(self._queue) + 1))
                raise ApiError(
                    429,
                    f"The server is busy: {len(self._queue)} requests are waiting. Try again later.",
                    code="rate_limit_exceeded",
                    headers={"Retry-After": str(min(max(seconds, 1), 60))},
                )
            self._queue.append(job)
            self._changed.notify()

    def cancel(self, job: Job, error: ApiError) -> None:
        """Take a waiting job off the queue, or stop a running one within a step."""
        with self._changed:
            try:
                self._queue.remove(job)
            except ValueError:
                pass
            else:
                self.counters.cancelled += 1
        job.cancel(error)

    def begin_shutdown(self) -> None:
        """Take no more jobs, and tell those that wait; those being served go on."""
        with self._changed:
            self._closing = True
            waiting, self._queue = list(self._queue), deque()
            self._changed.notify()
        for job in waiting:
            job.emit(0, Failed(_going_down()))

    def abort(self) -> None:
        """Stop those being served, too."""
        self.begin_shutdown()
        with self._changed:
            jobs = [job for job, _ in self._active]
        for job in jobs:
            job.cancel(_going_down())

    def close(self, timeout: float = 60.0) -> None:
        """Stop all work and the thread."""
        self.abort()
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join(timeout)
        if not self._thread.is_alive():
            self._pool.clear()

    # The thread

    def _loop(self) -> None:
        while True:
            with self._changed:
                while not (self._queue or self._active or self._stopped):
                    self._changed.wait()
                if self._stopped and not self._active:
                    return
                self._admit()
            self._advance()

    def _admit(self) -> None:
        while self._queue and len(self._active) < self._pool.size_limit:
            job = self._queue.popleft()
            self._active.append((job, self._work(job)))

    def _advance(self) -> None:
        """Give the first job its turn; it goes to the end of the line, or is over."""
        job, work = self._active[0]
        started = time.perf_counter()
        over = True
        try:
            next(work)
            over = False
        except StopIteration:
            job.emit(0, Finished())
        except GenerationCancelled as error:
            self.counters.cancelled += 1
            job.emit(0, Failed(job.error or from_exception(error)))
        except Exception as error:  # one request's trouble is not the next one's
            job.emit(0, Failed(from_exception(error)))
        seconds = time.perf_counter() - started
        self.counters.busy_seconds += seconds
        job.seconds += seconds
        with self._changed:
            self._active.popleft()
            if not over:
                self._active.append((job, work))
                return
        session = job.release()
        if session is not None:
            self._pool.give_back(session)
        self._seconds_per_job += 0.2 * (job.seconds - self._seconds_per_job)

    def _work(self, job: Job) -> Iterator[None]:
        """Do a job, yielding after every canvas."""
        for i_run, run in enumerate(job.runs):
            if i_run == 0:
                job.bind(self._pool.take(run.prompt))
            session = job._session
            assert session is not None
            if job.error is not None:
                raise GenerationCancelled("cancelled")
            n_cached = session.prefill(run.prompt)
            self.counters.prompt_tokens += len(run.prompt)
            self.counters.cached_tokens += n_cached
            job.emit(i_run, Prefilled(n_cached))
            generate = session.generate_chat if job.chat else session.generate
            for event in generate(run.options):
                if job.error is not None:
                    raise GenerationCancelled("cancelled")
                self._count(event)
                over = False
                if job.one_call and isinstance(event, CanvasEvent):
                    event, over = _up_to_first_call(event)
                if job.drafts or not isinstance(event, DraftEvent):
                    job.emit(i_run, event)
                if not isinstance(event, CanvasEvent):
                    continue
                yield
                if over:
                    assert run.options.seed is not None
                    job.emit(i_run, EndEvent(reason="stop", timings={}, seed=run.options.seed))
                    break

    def _count(self, event: Event) -> None:
        if isinstance(event, DraftEvent):
            self.counters.steps += 1
        elif isinstance(event, CanvasEvent):
            self.counters.canvases += 1
            self.counters.generated_tokens += len(event.tokens)


def _up_to_first_call(event: CanvasEvent) -> tuple[CanvasEvent, bool]:
    """The event without what follows a tool call, and whether it has one."""
    for i, part in enumerate(event.parts):
        if isinstance(part, ToolCall):
            return replace(event, parts=event.parts[: i + 1]), True
    return event, False


def _going_down() -> ApiError:
    return ApiError(503, "The server is shutting down.", code="shutting_down", headers={"Retry-After": "10"})
