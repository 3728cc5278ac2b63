"""Native work of a coroutine in threads, stopped within a step when its task is cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from pydiffusion.errors import GenerationCancelled

if TYPE_CHECKING:
    from pydiffusion.model import DiffusionModel
    from pydiffusion.session import Session

T = TypeVar("T")
_END: Any = object()


class SessionThread:
    """Runs calls on a session one after the other, each in a thread that ends with it.

    No thread waits between calls, so an iterator that is left needs no end: nothing runs.
    """

    def __init__(self, model: DiffusionModel, session: Session | None) -> None:
        """session: the one to use; None creates one in the first call."""
        self._model = model
        self._session = session
        self._lock = threading.Lock()  # between `_work` and `_stop`
        self._running: Session | None = None
        self._is_stopped = False

    async def call(self, work: Callable[[Session], T]) -> T:
        """Run ``work(session)`` in a thread; raises what it raises.

        A cancelled task stops the native work within a step and raises CancelledError when the thread has
        ended, so that nobody else finds the session in use.
        """
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[tuple[T | None, BaseException | None]] = loop.create_future()

        def run() -> None:
            outcome: tuple[T | None, BaseException | None]
            try:
                outcome = self._work(work), None
            except BaseException as error:
                outcome = None, error
            with contextlib.suppress(RuntimeError):  # the event loop is closed
                loop.call_soon_threadsafe(_settle, ended, outcome)

        context = contextvars.copy_context()
        threading.Thread(target=context.run, args=(run,), name="pydiffusion-async", daemon=True).start()
        try:
            result, error = await asyncio.shield(ended)
        except asyncio.CancelledError:
            self._stop()
            while not ended.done():
                with contextlib.suppress(asyncio.CancelledError):  # cancelled again: the thread still runs
                    await asyncio.wait([ended])
            raise
        if error is not None:
            raise error
        return result  # type: ignore[return-value]  # None only where T is

    async def iterate(self, start: Callable[[Session], Iterator[T]]) -> AsyncIterator[T]:
        """Iterate over ``start(session)``, item by item as they are asked for."""
        iterator = await self.call(start)
        async for item in self.rest(iterator):
            yield item

    async def rest(self, iterator: Iterator[T]) -> AsyncIterator[T]:
        """Iterate over an iterator that an earlier call has made."""
        while (item := await self.call(lambda _: next(iterator, _END))) is not _END:
            yield item

    def _work(self, work: Callable[[Session], T]) -> T:
        if self._session is None:
            self._session = self._model.new_session()
        session = self._session
        with self._lock:
            if self._is_stopped:
                raise GenerationCancelled("cancelled before it began")
            self._running = session
        try:
            return work(session)
        finally:
            with self._lock:
                self._running = None
            if self._is_stopped:  # a cancellation that came too late would stop the session's next call
                with contextlib.suppress(GenerationCancelled):
                    session.truncate(session.n_past)

    def _stop(self) -> None:
        with self._lock:
            self._is_stopped = True
            if self._running is not None:
                self._running.cancel()


def _settle(ended: asyncio.Future[T], outcome: T) -> None:
    if not ended.done():
        ended.set_result(outcome)
