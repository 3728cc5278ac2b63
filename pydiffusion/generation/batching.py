"""Several answers in the making at a time, their canvases denoised in one graph.

The batch is continuous: an answer that is done leaves it, and the next one enters. On the processor each is
the one that its session gives alone. ``DiffusionModel.generate_batch`` and the server are made of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from pydiffusion import _native
from pydiffusion.errors import PyDiffusionError
from pydiffusion.events import CanvasEvent, Completion, DraftEvent, EndEvent, Event
from pydiffusion.options import GenerationOptions

from .token_ids import check_bos, token_array

if TYPE_CHECKING:
    from pydiffusion.model import DiffusionModel
    from pydiffusion.session import Session

    from .token_ids import TokenIds

Outcome = Completion | PyDiffusionError | ValueError

# Tokens of a prompt that are read between two steps of the other lanes, so that these go on meanwhile: as
# many as the encoder takes at a time.
_PROMPT_PART = 512


class Lane:
    """One answer in the making: its prompt is read part by part, then every step brings events."""

    def __init__(
        self, session: Session, prompt: TokenIds, options: GenerationOptions, *, chat: bool = False
    ) -> None:
        """options: resolved.  chat: divide the answer into parts, as ``Session.generate_chat`` does.

        Raises ValueError for a prompt of no tokens, or that holds what is none.
        """
        ids = token_array(prompt, session.model.n_vocab)
        if len(ids) == 0:
            raise ValueError("the prompt has no tokens")
        self.session = session
        self.n_prompt = len(ids)
        self.n_cached = session.keep(ids)
        self._unread = ids[self.n_cached :]
        self._options = options
        self._chat = chat
        self._to_events: Callable[[_native.Step], Iterator[Event]] | None = None

    @property
    def is_ready(self) -> bool:
        """Whether the prompt is in the cache, and the lane takes part in steps."""
        return self._to_events is not None

    def read_on(self) -> None:
        """Read the prompt's next part; behind the last, begin. Raises as ``encode`` and ``generate`` do."""
        fits = self.n_prompt <= self.session.n_ctx
        part = self._unread[:_PROMPT_PART] if fits else self._unread  # encode tells what does not fit
        if len(part):
            self.session.encode(part)
        self._unread = self._unread[len(part) :]
        if len(self._unread) == 0:
            stream = self.session._answer_stream(self._options, self._chat)
            self._to_events = self.session._begin(self._options, stream)

    def events(self, step: _native.Step) -> Iterator[Event]:
        """What a native step brings."""
        assert self._to_events is not None
        return self._to_events(step)


class Batch:
    """What lanes of one model take their steps in. For one thread."""

    def __init__(self, model: DiffusionModel) -> None:
        self._native = model._new_batch()

    def advance(self, lanes: Sequence[Lane]) -> Iterator[tuple[Lane, Iterator[Event] | Exception]]:
        """Bring every lane a little further: a part of its prompt is read, or one step is made.

        Yields every lane with the events that it brings (take them before the next call), or with the error
        for which it can't go on.
        """
        for lane in lanes:
            if lane.is_ready:
                continue
            try:
                lane.read_on()
                yield lane, iter(())
            except Exception as error:
                yield lane, error
        ready = [lane for lane in lanes if lane.is_ready]
        if not ready:
            return
        steps = self._native.next_steps([lane.session._native for lane in ready])
        for lane, step in zip(ready, steps, strict=True):
            yield lane, step if isinstance(step, Exception) else lane.events(step)


def generate_batch(
    model: DiffusionModel,
    requests: Iterable[tuple[str | TokenIds, GenerationOptions]],
    n_parallel: int,
    n_ctx: int | None,
    on_event: Callable[[int, Event], None] | None,
) -> Iterator[tuple[int, Outcome]]:
    """See ``DiffusionModel.generate_batch``; requests: prompts and options, taken as lanes get free."""
    batch = Batch(model)
    waiting = enumerate(requests)
    idle: list[Session] = []
    lanes: dict[Lane, tuple[int, list[CanvasEvent | EndEvent]]] = {}
    while True:
        while len(lanes) < n_parallel and (request := next(waiting, None)) is not None:
            index, (prompt, options) = request
            session = idle.pop() if idle else model.new_session(n_ctx)
            try:
                ids = model.tokenize(prompt) if isinstance(prompt, str) else prompt
                lane = Lane(session, ids, model.resolve(options))
                check_bos(model.tokenizer, token_array(ids, model.n_vocab))
                lanes[lane] = index, []
            except (PyDiffusionError, ValueError) as error:
                idle.append(session)
                yield index, error
        if not lanes:
            return
        for lane, brought in batch.advance(list(lanes)):
            index, kept = lanes[lane]
            outcome = _outcome(lane, index, brought, kept, on_event)
            if outcome is not None:
                del lanes[lane]
                idle.append(lane.session)
                yield index, outcome


def _outcome(
    lane: Lane,
    index: int,
    brought: Iterator[Event] | Exception,
    kept: list[CanvasEvent | EndEvent],
    on_event: Callable[[int, Event], None] | None,
) -> Outcome | None:
    """Take what a lane was brought; its outcome once there is one."""
    if isinstance(brought, PyDiffusionError | ValueError):
        return brought
    if isinstance(brought, Exception):
        raise brought
    for event in brought:
        if on_event is not None:
            on_event(index, event)
        if not isinstance(event, DraftEvent):
            kept.append(event)
    finished = bool(kept) and isinstance(kept[-1], EndEvent)
    return lane.session._completion(lane.n_prompt, kept) if finished else None
