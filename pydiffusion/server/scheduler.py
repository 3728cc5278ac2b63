"""Request scheduler: one thread in front of the model, first come first served, with continuous batching.

Prompts are prefilled in chunks and every step denoises the canvases of all in-flight sequences in one graph,
so none waits for another to finish. A request for several choices gets a sequence for each as long as nobody
else waits. Idle sessions keep their cache for requests with the same prefix.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from pydiffusion.errors import GenerationCancelled, InsufficientMemoryError
from pydiffusion.events import CanvasEvent, DraftEvent, EndEvent, Event
from pydiffusion.generation.batching import Batch
from pydiffusion.generation.image_prompt import session_keys
from pydiffusion.generation.token_ids import common_prefix
from pydiffusion.openai.errors import ApiError, from_exception
from pydiffusion.openai.reports import Failed, Finished, Prefilled, up_to_first_call

from .jobs import Job, RunSequence
from .pool import SessionPool

if TYPE_CHECKING:
    from pydiffusion.model import DiffusionModel
    from pydiffusion.session import Session


_MAX_IMAGE_BYTES = 2 << 30  # of the images of waiting requests


class Counters:
    """Totals for /metrics. Only the scheduler's thread writes them."""

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
        """max_queue: requests that may wait; n_parallel: most sequences in flight; n_sessions: KV caches
        kept, at least ``n_parallel``.
        """
        self.model = model
        self.max_queue = max_queue
        self.counters = Counters()
        self._n_parallel = n_parallel
        self._pool = SessionPool(model, max(n_sessions, n_parallel))
        self._batch = Batch(model)
        self._in_flight: list[RunSequence] = []
        self._changed = threading.Condition()
        self._queue: deque[Job] = deque()
        self._active: list[Job] = []
        self._closing = False
        self._stopped = False
        self._seconds_per_job = 1.0
        self._thread = threading.Thread(target=self._loop, name="pydiffusion-scheduler", daemon=True)
        self._thread.start()

    # Called from the server's threads

    @property
    def is_closing(self) -> bool:
        """Whether new jobs are refused, since the server is going down."""
        return self._closing

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
    def n_in_flight(self) -> int:
        """Sequences being denoised now."""
        return len(self._in_flight)

    @property
    def n_parallel(self) -> int:
        """Most sequences in flight: fewer than requested once memory ran out."""
        return min(self._n_parallel, self._pool.size_limit)

    def submit(self, job: Job) -> None:
        """Queue a job. ApiError 429 when the queue is full, 503 when the server is going down."""
        with self._changed:
            if self._closing:
                raise _going_down()
            n_free = max(0, self.n_parallel - len(self._active))  # slots that the thread is about to fill
            n_bytes = sum(waiting.n_image_bytes for waiting in self._queue) + job.n_image_bytes
            is_full = bool(self._queue and job.n_image_bytes) and n_bytes > _MAX_IMAGE_BYTES
            if len(self._queue) >= self.max_queue + n_free or is_full:
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
        """Accept no more jobs and fail the waiting ones; running jobs continue."""
        with self._changed:
            self._closing = True
            waiting, self._queue = list(self._queue), deque()
            self._changed.notify()
        for job in waiting:
            job.emit(0, Failed(_going_down()))

    def abort(self) -> None:
        """Stop the running jobs too."""
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
            self._fill_slots()
            self._advance()
            self.counters.busy_seconds += time.perf_counter() - started

    def _fill_slots(self) -> None:
        while len(self._in_flight) < self.n_parallel:
            job = self._next_job()
            if job is None:
                return
            self._attempt(job, partial(self._start_run, job))

    def _next_job(self) -> Job | None:
        """The job to start a sequence for: the one that waited longest, else one with choices left."""
        with self._changed:
            if self._queue:
                job = self._queue.popleft()
                job.started = time.perf_counter()
                self._active.append(job)
                return job
        for job in self._active:
            # Another choice follows once the prompt is read: it copies the cache.
            if job.error is None and job.n_begun < len(job.runs) and all(x.is_ready for x in job.in_flight):
                return job
        return None

    def _session_for(self, job: Job) -> Session:
        """A session for a job's next run."""
        try:
            run = job.runs[job.n_begun]
            return self._pool.take(run.prompt, run.options.lora)
        except InsufficientMemoryError:
            if not self._in_flight:
                raise
            self._n_parallel = len(self._in_flight)  # as many as there is room for
            raise _NoRoom from None

    def _start_run(self, job: Job) -> None:
        self._begin_run(job, self._session_for(job))

    def _begin_run(self, job: Job, session: Session) -> None:
        job.bind(session)
        try:
            self._copy_prompt(job, session)
            sequence = RunSequence(job, job.n_begun, session)
        except BaseException:
            self._give_back(job, session)
            raise
        job.n_begun += 1
        job.in_flight.append(sequence)
        self._in_flight.append(sequence)

    def _copy_prompt(self, job: Job, session: Session) -> None:
        """Take the prompt from another choice of the job that has read it, where the session lacks it."""
        prompt, held = job.runs[job.n_begun].prompt, session_keys(session)
        for sequence in job.in_flight:
            at_prompt = sequence.run.prompt == prompt and sequence.session.n_past == sequence.n_prompt
            if not at_prompt:
                continue
            if common_prefix(held, session_keys(sequence.session)) < sequence.n_prompt:
                session.copy(sequence.session)
                return

    def _advance(self) -> None:
        """Advance every sequence by a prompt chunk or a step."""
        for sequence in self._in_flight.copy():
            if sequence.job.error is not None:
                self._fail(sequence.job, sequence.job.error)
        for sequence, result in self._batch.advance(self._in_flight.copy()):
            self._attempt(sequence.job, partial(self._report, sequence, result))

    def _report(self, sequence: RunSequence, result: Iterator[Event] | Exception) -> None:
        """Emit the events of a step."""
        job = sequence.job
        if sequence not in self._in_flight:  # another sequence of its job failed in this same step
            return
        if isinstance(result, Exception):
            raise result
        if sequence.is_ready and not sequence.is_reported:
            sequence.is_reported = True
            self.counters.prompt_tokens += sequence.n_prompt
            self.counters.cached_tokens += sequence.n_cached
            job.emit(sequence.i_run, Prefilled(sequence.n_cached))
        for event in result:
            self._count(event)
            over = isinstance(event, EndEvent)
            if job.one_call and isinstance(event, CanvasEvent):
                event, called = up_to_first_call(event)
                over = over or called
            if job.drafts or not isinstance(event, DraftEvent):
                job.emit(sequence.i_run, event)
            if over:
                if not isinstance(event, EndEvent):
                    seed = sequence.run.options.seed
                    job.emit(sequence.i_run, EndEvent(reason="stop", timings={}, seed=seed))
                self._end(sequence)
                return

    def _end(self, sequence: RunSequence) -> None:
        """Finish a run; its session goes to the job's next run unless other jobs wait."""
        job = sequence.job
        self._in_flight.remove(sequence)
        job.in_flight.remove(sequence)
        if job.n_begun < len(job.runs) and not (self._queue and job.in_flight):
            job.release(sequence.session)
            self._begin_run(job, sequence.session)
            return
        self._give_back(job, sequence.session)
        if job.is_done:
            self._leave(job)
            job.emit(0, Finished())

    def _attempt(self, job: Job, action: Callable[[], None]) -> None:
        """Do a part of a job's work; an error fails this job only."""
        try:
            action()
        except _NoRoom:
            self._wait_again(job)
        except GenerationCancelled as error:
            self._fail(job, job.error or from_exception(error))
        except Exception as error:
            self._fail(job, from_exception(error))

    def _wait_again(self, job: Job) -> None:
        """Requeue a run that found no memory until another sequence finishes."""
        if job.in_flight:
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
        for sequence in job.in_flight:
            self._in_flight.remove(sequence)
            self._give_back(job, sequence.session)
        job.in_flight.clear()
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
    """No memory for another session beside those in use."""


def _going_down() -> ApiError:
    return ApiError(503, "The server is shutting down.", code="shutting_down", headers={"Retry-After": "10"})
