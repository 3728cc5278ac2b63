"""Continuous batching: denoises the canvases of several in-flight requests in one graph.

A sequence that finishes leaves the batch and the next request takes its place. On the CPU every sequence gets
the same result as if it ran alone. Used by ``DiffusionModel.generate_batch`` and by the server.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from pydiffusion.errors import PyDiffusionError
from pydiffusion.events import CanvasEvent, Completion, DraftEvent, EndEvent, Event
from pydiffusion.options import GenerationOptions, ResolvedOptions

from .completion import completion_of
from .loop import Generation
from .streaming import answer_stream
from .token_ids import check_bos, token_array

if TYPE_CHECKING:
    from pydiffusion._native import Step
    from pydiffusion.model import DiffusionModel
    from pydiffusion.session import Session

    from .token_ids import TokenIds

Outcome = Completion | PyDiffusionError | ValueError

# Chunked prefill: prompt tokens encoded between two steps, so that the other sequences keep advancing. As
# many as the encoder takes at a time.
_PROMPT_PART = 512


class ActiveSequence:
    """An in-flight sequence: its prompt is prefilled in chunks, then every step yields events."""

    def __init__(
        self, session: Session, prompt: TokenIds, options: ResolvedOptions, *, chat: bool = False
    ) -> None:
        """chat: split the answer into parts, as ``Session.generate_chat`` does.

        Raises ValueError for an empty prompt or an id outside the vocabulary.
        """
        ids = token_array(prompt, session.model.n_vocab)
        if len(ids) == 0:
            raise ValueError("the prompt has no tokens")
        self.session = session
        self.n_prompt = len(ids)
        self.n_cached = session.keep(ids)
        self._prompt_left = ids[self.n_cached :]
        self._options = options
        self._chat = chat
        self._generation: Generation | None = None
        self.has_left = False

    def leave(self) -> None:
        """Take no further part in ``batched_events``."""
        self.has_left = True

    @property
    def is_ready(self) -> bool:
        """Whether the prompt is in the cache, so that the sequence takes part in steps."""
        return self._generation is not None

    def prefill_next(self) -> None:
        """Prefill the next chunk of the prompt; after the last one, begin. Raises as ``encode``,
        ``generate``.
        """
        part = self._prompt_left
        if self.n_prompt <= self.session.n_ctx:  # else `encode` reports that it does not fit
            part = part[:_PROMPT_PART]
        if len(part):
            self.session.encode(part)
        self._prompt_left = self._prompt_left[len(part) :]
        if len(self._prompt_left) == 0:
            answer = answer_stream(self.session, self._options, chat=self._chat)
            self._generation = Generation(self.session, self._options, answer)

    def events(self, step: Step) -> Iterator[Event]:
        """Events of a native step, see ``Generation.events``."""
        assert self._generation is not None  # is_ready
        return self._generation.events(step)


AnySequence = TypeVar("AnySequence", bound=ActiveSequence)


class Batch:
    """Runs the sequences of one model in lockstep. Not thread-safe."""

    def __init__(self, model: DiffusionModel) -> None:
        self._native = model.native.new_batch()

    def advance(
        self, sequences: Sequence[AnySequence]
    ) -> Iterator[tuple[AnySequence, Iterator[Event] | Exception]]:
        """Advance every sequence by one prompt chunk or one denoising step.

        Yields each sequence with its new events (consume them before the next call), or with the error that
        stopped it.
        """
        for sequence in sequences:
            if sequence.is_ready:
                continue
            try:
                sequence.prefill_next()
                yield sequence, iter(())
            except Exception as error:
                yield sequence, error
        ready = [sequence for sequence in sequences if sequence.is_ready]
        if not ready:
            return
        steps = self._native.next_steps([sequence.session.native for sequence in ready])
        for sequence, step in zip(ready, steps, strict=True):
            assert step is not None  # a sequence leaves the batch after its last step
            yield sequence, step if isinstance(step, Exception) else sequence.events(step)


@dataclass(frozen=True)
class BatchRequest:
    """A prompt with its options. chat: split the answer into parts, as ``Session.generate_chat`` does."""

    prompt: str | TokenIds
    options: GenerationOptions
    chat: bool = False


def batched_events(
    model: DiffusionModel, requests: Iterable[BatchRequest], n_parallel: int, n_ctx: int | None = None
) -> Iterator[tuple[int, ActiveSequence | None, Event | PyDiffusionError | ValueError]]:
    """The events of many requests, which are consumed as sequences finish.

    Yields (index of the request, its sequence, an event); a request's last one is an EndEvent, or the error
    that stopped it, without a sequence if it could not begin. Once the caller has called ``leave`` of a
    sequence, no more of its events follow.
    """
    batch = Batch(model)
    waiting = enumerate(requests)
    idle: list[Session] = []
    sequences: dict[ActiveSequence, int] = {}
    while True:
        while len(sequences) < n_parallel and (numbered := next(waiting, None)) is not None:
            index, request = numbered
            session = idle.pop() if idle else model.new_session(n_ctx)
            try:
                sequences[_begin(model, session, request)] = index
            except (PyDiffusionError, ValueError) as error:
                idle.append(session)
                yield index, None, error
        if not sequences:
            return
        for sequence, result in batch.advance(list(sequences)):
            for event in _checked(result):
                yield sequences[sequence], sequence, event
                if isinstance(event, (EndEvent, Exception)):
                    sequence.leave()
                if sequence.has_left:
                    break
            if sequence.has_left:
                del sequences[sequence]
                idle.append(sequence.session)


def _begin(model: DiffusionModel, session: Session, request: BatchRequest) -> ActiveSequence:
    ids = model.tokenize(request.prompt) if isinstance(request.prompt, str) else request.prompt
    sequence = ActiveSequence(session, ids, model.resolve(request.options), chat=request.chat)
    check_bos(model.tokenizer, token_array(ids, model.n_vocab))
    return sequence


def _checked(result: Iterator[Event] | Exception) -> Iterator[Event | PyDiffusionError | ValueError]:
    """Errors that are a request's own are among its events, others are raised."""
    if isinstance(result, PyDiffusionError | ValueError):
        yield result
    elif isinstance(result, Exception):
        raise result
    else:
        yield from result


def generate_batch(
    model: DiffusionModel,
    requests: Iterable[tuple[str | TokenIds, GenerationOptions]],
    n_parallel: int,
    n_ctx: int | None,
    on_event: Callable[[int, Event], None] | None,
) -> Iterator[tuple[int, Outcome]]:
    """See ``DiffusionModel.generate_batch``; requests: prompts and options, consumed as sequences finish."""
    kept: dict[int, list[CanvasEvent | EndEvent]] = {}
    each = (BatchRequest(prompt, options) for prompt, options in requests)
    for index, sequence, event in batched_events(model, each, n_parallel, n_ctx):
        if isinstance(event, (PyDiffusionError, ValueError)):
            kept.pop(index, None)
            yield index, event
            continue
        if on_event is not None:
            on_event(index, event)
        if not isinstance(event, DraftEvent):
            kept.setdefault(index, []).append(event)
        if isinstance(event, EndEvent):
            assert sequence is not None  # it had events
            yield index, completion_of(model.tokenizer, sequence.n_prompt, kept.pop(index))
