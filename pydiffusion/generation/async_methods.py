"""The async methods of ``DiffusionModel``. asyncio is imported on first use: most programs need none."""

from __future__ import annotations

import threading
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar, cast

from pydiffusion.options import GenerationOptions, make_options

if TYPE_CHECKING:
    import asyncio

    from pydiffusion.events import ChatCompletion, Completion, Event
    from pydiffusion.model import DiffusionModel
    from pydiffusion.openai.chat import Messages
    from pydiffusion.session import Session

    from .image_prompt import AnyPrompt
    from .infill import Infill
    from .session_thread import SessionThread

T = TypeVar("T")
# Calls at a time per event loop; others wait in order. Each has a KV cache, and their steps take turns.
_N_AT_A_TIME = 4


class AsyncMethods:
    """Async counterparts of the methods that generate: the same names with an ``a`` in front.

    The work runs in threads, the event loop goes on. A task that is cancelled stops its work within a step;
    model and session stay usable. A session is for one task at a time.
    """

    async def agenerate(
        self,
        prompt: str | AnyPrompt,
        options: GenerationOptions | None = None,
        *,
        session: Session | None = None,
        **keywords: Any,
    ) -> Completion:
        """As ``DiffusionModel.generate``. Of many calls at once four run at a time, the others wait."""
        chosen = make_options(options, keywords)
        return await self._in_turn(session, lambda s: self._model.generate(prompt, chosen, session=s))

    def astream(
        self,
        prompt: str | AnyPrompt,
        options: GenerationOptions | None = None,
        *,
        session: Session | None = None,
        **keywords: Any,
    ) -> AsyncIterator[Event]:
        """As ``DiffusionModel.stream``: a step is computed when its event is asked for."""
        chosen = make_options(options, keywords)
        thread = self._thread(session)
        return thread.iterate(lambda s: self._model.stream(prompt, chosen, session=s))

    async def achat(
        self,
        messages: Messages,
        options: GenerationOptions | None = None,
        *,
        session: Session | None = None,
        **keywords: Any,
    ) -> ChatCompletion:
        """As ``DiffusionModel.chat``, with its keywords. At once as ``agenerate``."""
        return await self._in_turn(
            session, lambda s: self._model.chat(messages, options, session=s, **keywords)
        )

    def astream_chat(
        self,
        messages: Messages,
        options: GenerationOptions | None = None,
        *,
        session: Session | None = None,
        **keywords: Any,
    ) -> AsyncIterator[Event]:
        """As ``DiffusionModel.stream_chat``, with its keywords; as ``astream``."""
        thread = self._thread(session)
        return thread.iterate(lambda s: self._model.stream_chat(messages, options, session=s, **keywords))

    async def ainfill(
        self,
        text: str,
        options: GenerationOptions | None = None,
        *,
        session: Session | None = None,
        **keywords: Any,
    ) -> Infill:
        """As ``DiffusionModel.infill``, with its keywords. At once as ``agenerate``."""
        return await self._in_turn(
            session, lambda s: self._model.infill(text, options, session=s, **keywords)
        )

    async def aedit(
        self,
        text: str,
        spans: Sequence[tuple[int, int]],
        options: GenerationOptions | None = None,
        *,
        session: Session | None = None,
        **keywords: Any,
    ) -> Infill:
        """As ``DiffusionModel.edit``, with its keywords. At once as ``agenerate``."""
        return await self._in_turn(
            session, lambda s: self._model.edit(text, spans, options, session=s, **keywords)
        )

    async def acreate_completion(
        self,
        prompt: str | AnyPrompt,
        *,
        stream: bool = False,
        session: Session | None = None,
        **parameters: Any,
    ) -> Any:
        """As ``DiffusionModel.create_completion``; with ``stream`` an async iterator of chunks, as in
        OpenAI's client.
        """
        return await self._create(self._model.create_completion, prompt, stream, session, parameters)

    async def acreate_chat_completion(
        self, messages: Messages, *, stream: bool = False, session: Session | None = None, **parameters: Any
    ) -> Any:
        """As ``DiffusionModel.create_chat_completion``; ``stream`` as in ``acreate_completion``."""
        return await self._create(self._model.create_chat_completion, messages, stream, session, parameters)

    async def _create(
        self,
        create: Callable[..., Any],
        given: Any,
        stream: bool,
        session: Session | None,
        parameters: dict[str, Any],
    ) -> Any:
        if not stream:
            return await self._in_turn(session, lambda s: create(given, session=s, **parameters))
        thread = self._thread(session)
        return thread.rest(await thread.call(lambda s: create(given, stream=True, session=s, **parameters)))

    async def _in_turn(self, session: Session | None, work: Callable[[Session], T]) -> T:
        async with self._turns.of_running_loop():
            return await self._thread(session).call(work)

    def _thread(self, session: Session | None) -> SessionThread:
        from .session_thread import SessionThread

        return SessionThread(self._model, session)

    @cached_property
    def _turns(self) -> _Turns:
        return _Turns()

    @property
    def _model(self) -> DiffusionModel:
        return cast("DiffusionModel", self)


class _Turns:
    """A semaphore per event loop, which is what they belong to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._semaphores: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = (
            weakref.WeakKeyDictionary()
        )

    def of_running_loop(self) -> asyncio.Semaphore:
        import asyncio

        with self._lock:
            loop = asyncio.get_running_loop()
            return self._semaphores.setdefault(loop, asyncio.Semaphore(_N_AT_A_TIME))
