"""Many prompts through one model, several canvases denoised at a time in one graph.

The batch is continuous: a prompt whose answer is done leaves it, and the next one enters. Every answer is the
one that ``generate`` gives alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from . import _native
from .errors import PyDiffusionError
from .events import CanvasEvent, Completion, DraftEvent, EndEvent, Event
from .options import GenerationOptions
from .streaming import AnswerStream

if TYPE_CHECKING:
    from .model import DiffusionModel
    from .session import Session, TokenIds

Outcome = Completion | PyDiffusionError | ValueError


@dataclass
class _Lane:
    """A prompt that is being answered."""

    index: int
    session: Session
    n_prompt: int
    to_events: Callable[[_native.Step], Iterator[Event]]
    events: list[CanvasEvent | EndEvent] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return bool(self.events) and isinstance(self.events[-1], EndEvent)


def generate_batch(
    model: DiffusionModel,
    requests: Iterable[tuple[str | TokenIds, GenerationOptions]],
    n_parallel: int,
    n_ctx: int | None,
    on_event: Callable[[int, Event], None] | None,
) -> Iterator[tuple[int, Outcome]]:
    """See ``DiffusionModel.generate_batch``; requests: prompts and options, taken as lanes get free."""
    batch = _native.Batch(model._native)
    waiting = enumerate(requests)
    idle: list[Session] = []
    lanes: list[_Lane] = []
    while True:
        while len(lanes) < n_parallel and (request := next(waiting, None)) is not None:
            index, (prompt, options) = request
            session = idle.pop() if idle else model.new_session(n_ctx)
            try:
                lanes.append(_enter(model, index, prompt, options, session))
            except (PyDiffusionError, ValueError) as error:
                idle.append(session)
                yield index, error
        if not lanes:
            return
        steps = batch.next_steps([lane.session._native for lane in lanes])
        for lane, step in zip(list(lanes), steps, strict=True):
            outcome = _advance(lane, step, on_event)
            if outcome is not None:
                lanes.remove(lane)
                idle.append(lane.session)
                yield lane.index, outcome


def _enter(
    model: DiffusionModel, index: int, prompt: str | TokenIds, options: GenerationOptions, session: Session
) -> _Lane:
    model._start(prompt, session)
    resolved = options.resolve(model.metadata, model.n_vocab)
    to_events = session._begin(resolved, AnswerStream(model.tokenizer, resolved.stop))
    return _Lane(index, session, session.n_past, to_events)


def _advance(
    lane: _Lane, step: _native.Step | Exception, on_event: Callable[[int, Event], None] | None
) -> Outcome | None:
    """Take a step's result; the lane's outcome once there is one."""
    if isinstance(step, PyDiffusionError | ValueError):
        return step
    if isinstance(step, Exception):
        raise step
    for event in lane.to_events(step):
        if on_event is not None:
            on_event(lane.index, event)
        if not isinstance(event, DraftEvent):
            lane.events.append(event)
    return lane.session._completion(lane.n_prompt, lane.events) if lane.finished else None
