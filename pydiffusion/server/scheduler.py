"""One thread in front of the model: requests in the order of arrival, several at a time in one batch.

Every answer in the making has a lane: its prompt is read part by part, and every step denoises the canvases
of all lanes in one graph, so that none waits for another's end. A request that asks for several choices gets
a lane for each, as far as nobody else waits. Sessions that are left over keep their cache for the request
that begins with the same tokens.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from pydiffusion.chat.output_parser import ToolCall
from pydiffusion.errors import GenerationCancelled, InsufficientMemoryError
from pydiffusion.events import CanvasEvent, DraftEvent, EndEvent, Event
from pydiffusion.generation.batching import Batch
from pydiffusion.generation.token_ids import common_prefix
from pydiffusion.openai.errors import ApiError, from_exception
from pydiffusion.openai.reports import Failed, Finished, Prefilled

from .jobs import Job, RunLane
from .pool import SessionPool

if TYPE_CHECKING:
    from pydiffusion.model import DiffusionModel
    from pydiffusion.session import Session


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

    def __init__(
        self, model: DiffusionModel, *, max_queue: int = 64, n_parallel: int = 4, n_sessions: int = 4
    ) -> None:
        """max_queue: requests that may wait beside those being served; n_parallel: canvases denoised at a
        time; n_sessions: caches kept, at least ``n_parallel``.
        """
        self.model = model
        self.max_queue = max_queue
        self.counters = Counters()
        self._n_parallel = n_parallel
        self._pool = SessionPool(model, max(n_sessions, n_parallel))
        self._batch = Batch(model)
        self._lanes: list[RunLane] = []
        self._changed = threading.Condition()
        self._queue: deque[Job] = deque()
        self._active: list[Job] = []
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

    @property
    def n_lanes(self) -> int:
        """Answers in the making."""
        return len(self._lanes)

    @property
    def n_parallel(self) -> int:
        """How many there may be: fewer than asked for where memory did not permit more."""
        return min(self._n_parallel, self._pool.size_limit)

    def submit(self, job: Job) -> None:
        """Queue a job. ApiError 429 when the queue is full, 503 when the server is going down."""
        with self._changed:
            if self._closing:
                raise _going_down()
            n_free = max(0, self.n_parallel - len(self._active))  # places that the thread is about to fill
            if len(self._queue) >= self.max_queue + n_free:
                seconds = math.ceil(self._seconds_per_job * (len(self._queue) + 1) / self.n_parallel)
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
            jobs = list(self._active)
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
            started = time.perf_counter()
            self._fill_lanes()
            self._advance()
            self.counters.busy_seconds += time.perf_counter() - started

    def _fill_lanes(self) -> None:
        while len(self._lanes) < self.n_parallel:
            job = self._next_job()
            if job is None:
                return
            self._attempt(job, lambda job=job: self._begin_run(job, self._session_for(job)))

    def _next_job(self) -> Job | None:
        """Whose next run gets a free lane: the job that has waited longest, then one with choices left."""
        with self._changed:
            if self._queue:
                job = self._queue.popleft()
                job.started = time.perf_counter()
                self._active.append(job)
                return job
        for job in self._active:
            # Another choice follows once the prompt is read: it copies the cache.
            if job.error is None and job.n_begun < len(job.runs) and all(x.is_ready for x in job.lanes):
                return job
        return None

    def _session_for(self, job: Job) -> Session:
        """The session that a job's next run begins with."""
        try:
            return self._pool.take(job.runs[job.n_begun].prompt)
        except InsufficientMemoryError:
            if not self._lanes:
                raise
            self._n_parallel = len(self._lanes)  # as many as there is room for
            raise _NoRoom from None

    def _begin_run(self, job: Job, session: Session) -> None:
        job.bind(session)
        try:
            self._copy_prompt(job, session)
            lane = RunLane(job, job.n_begun, session)
        except BaseException:
            self._give_back(job, session)
            raise
        job.n_begun += 1
        job.lanes.append(lane)
        self._lanes.append(lane)

    def _copy_prompt(self, job: Job, session: Session) -> None:
        """Take the prompt from another choice of the job that has read it, where the session lacks it."""
        prompt = job.runs[job.n_begun].prompt
        for lane in job.lanes:
            at_prompt = lane.run.prompt == prompt and lane.session.n_past == lane.n_prompt
            if at_prompt and common_prefix(session.tokens, lane.session.tokens) < lane.n_prompt:
                session.copy(lane.session)
                return

    def _advance(self) -> None:
        """A part of a prompt or a step for every lane."""
        for lane in self._lanes.copy():
            if lane.job.error is not None:
                self._fail(lane.job, lane.job.error)
        for lane, brought in self._batch.advance(self._lanes.copy()):
            self._attempt(lane.job, lambda lane=lane, brought=brought: self._report(lane, brought))

    def _report(self, lane: RunLane, brought: Iterator[Event] | Exception) -> None:
        """Tell what a step brought."""
        job = lane.job
        if lane not in self._lanes:  # another lane of its job failed in this same step
            return
        if isinstance(brought, Exception):
            raise brought
        if lane.is_ready and not lane.is_reported:
            lane.is_reported = True
            self.counters.prompt_tokens += lane.n_prompt
            self.counters.cached_tokens += lane.n_cached
            job.emit(lane.i_run, Prefilled(lane.n_cached))
        for event in brought:
            self._count(event)
            over = isinstance(event, EndEvent)
            if job.one_call and isinstance(event, CanvasEvent):
                event, called = _up_to_first_call(event)
                over = over or called
            if job.drafts or not isinstance(event, DraftEvent):
                job.emit(lane.i_run, event)
            if over:
                if not isinstance(event, EndEvent):
                    assert lane.run.options.seed is not None  # resolved
                    job.emit(lane.i_run, EndEvent(reason="stop", timings={}, seed=lane.run.options.seed))
                self._end(lane)
                return

    def _end(self, lane: RunLane) -> None:
        """A run is done: its lane goes to the job's next one, unless others wait and the job has more."""
        job = lane.job
        self._lanes.remove(lane)
        job.lanes.remove(lane)
        if job.n_begun < len(job.runs) and not (self._queue and job.lanes):
            job.release(lane.session)
            self._begin_run(job, lane.session)
            return
        self._give_back(job, lane.session)
        if job.is_done:
            self._leave(job)
            job.emit(0, Finished())

    def _attempt(self, job: Job, action: Callable[[], None]) -> None:
        """Do a part of a job's work; one request's trouble is not the next one's."""
        try:
            action()
        except _NoRoom:
            self._wait_again(job)
        except GenerationCancelled as error:
            self._fail(job, job.error or from_exception(error))
        except Exception as error:
            self._fail(job, from_exception(error))

    def _wait_again(self, job: Job) -> None:
        """There was no memory for a lane: it goes on when another lane gets free."""
        if job.lanes:
            return
        if self._closing:
            self._fail(job, _going_down())
            return
        with self._changed:
            self._active.remove(job)
            self._queue.appendleft(job)

    def _fail(self, job: Job, error: ApiError) -> None:
        if job not in self._active:
            return
        if job.error is not None:
            self.counters.cancelled += 1
        for lane in job.lanes:
            self._lanes.remove(lane)
            self._give_back(job, lane.session)
        job.lanes.clear()
        self._leave(job)
        job.emit(0, Failed(error))

    def _leave(self, job: Job) -> None:
        with self._changed:
            self._active.remove(job)
        seconds = time.perf_counter() - job.started
        self._seconds_per_job += 0.2 * (seconds - self._seconds_per_job)

    def _give_back(self, job: Job, session: Session) -> None:
        job.release(session)
        self._pool.give_back(session)

    def _count(self, event: Event) -> None:
        if isinstance(event, DraftEvent):
            self.counters.steps += 1
        elif isinstance(event, CanvasEvent):
            self.counters.canvases += 1
            self.counters.generated_tokens += len(event.tokens)


class _NoRoom(Exception):
    """No memory for another session beside those that are out."""


def _up_to_first_call(event: CanvasEvent) -> tuple[CanvasEvent, bool]:
    """The event without what follows a tool call, and whether it has one."""
    for i, part in enumerate(event.parts):
        if isinstance(part, ToolCall):
            return replace(event, parts=event.parts[: i + 1]), True
    return event, False


def _going_down() -> ApiError:
    return ApiError(503, "The server is shutting down.", code="shutting_down", headers={"Retry-After": "10"})
