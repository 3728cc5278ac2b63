"""Continuous batching: denoises the canvases of several in-flight requests in one graph.

A sequence that finishes leaves the batch and the next request takes its place. On the CPU every sequence gets
the same result as if it ran alone. Used by ``DiffusionModel.generate_batch`` and by the server.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from pydiffusion.errors import PyDiffusionError
from pydiffusion.events import CanvasEvent, Completion, DraftEvent, EndEvent, Event
from pydiffusion.options import GenerationOptions, ResolvedOptions, make_options

from .completion import chat_completion_of, completion_of
from .image_prompt import (
    AnyPrompt,
    begin_prompt,
    end_of_part,
    part_of,
    read_prompt,
)
from .loop import Generation
from .prompt import given_prompt
from .streaming import answer_stream
from .token_ids import check_bos

if TYPE_CHECKING:
    from pydiffusion._native import Step
    from pydiffusion.model import DiffusionModel
    from pydiffusion.openai.chat import ChatSettings
    from pydiffusion.session import Session


# Errors of one request, which doesn't concern the others; TypeError: its prompt is no prompt.
_OWN_ERRORS = (PyDiffusionError, ValueError, TypeError)
RequestError = PyDiffusionError | ValueError | TypeError
Outcome = Completion | RequestError

# Chunked prefill: prompt tokens encoded between two steps, so that the other sequences keep advancing. As
# many as the encoder takes at a time.
_PROMPT_PART = 512


class ActiveSequence:
    """An in-flight sequence: its prompt is prefilled in chunks, then every step yields events."""

    def __init__(
        self, session: Session, prompt: AnyPrompt, options: ResolvedOptions, *, chat: bool = False
    ) -> None:
        """chat: split the answer into parts, as ``Session.generate_chat`` does.

        Raises ValueError for an empty prompt; else as ``Session.prefill``.
        """
        read = read_prompt(session.model, prompt)
        if len(read) == 0:
            raise ValueError("the prompt has no tokens")
        self.session = session
        self.n_prompt = len(read)
        self.n_cached = begin_prompt(session, read, options.lora)
        self._prompt_left = part_of(read, self.n_cached)
        self._options = options
        self.chat = chat
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
        left = self._prompt_left
        n = len(left)
        if self.n_prompt <= self.session.n_ctx:  # else `encode` reports that it does not fit
            n = end_of_part(left, _PROMPT_PART)
        if n:
            self.session.encode(part_of(left, 0, n), lora=self._options.lora)
        self._prompt_left = part_of(left, n)
        if len(self._prompt_left) == 0:
            answer = answer_stream(self.session, self._options, chat=self.chat)
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
    """A prompt with its options.

    chat: split the answer into parts, as ``Session.generate_chat`` does.  settings: of a chat whose prompt
        is given as messages.
    """

    prompt: Any
    options: GenerationOptions
    chat: bool = False
    settings: ChatSettings | None = None


def batched_events(
    model: DiffusionModel, requests: Iterable[BatchRequest], n_parallel: int, n_ctx: int | None = None
) -> Iterator[tuple[int, ActiveSequence | None, Event | RequestError]]:
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
            except _OWN_ERRORS as error:
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
    prompt, options, settings = request.prompt, request.options, request.settings
    if settings is not None:
        prepared = settings.prepare(model, prompt, options)
        prompt, options = prepared.prompt, prepared.options
    read = given_prompt(model, prompt)
    chat = request.chat or settings is not None
    sequence = ActiveSequence(session, read, model.resolve(options), chat=chat)
    check_bos(model.tokenizer, read.ids)
    return sequence


def _checked(result: Iterator[Event] | Exception) -> Iterator[Event | RequestError]:
    """Errors that are a request's own are among its events, others are raised."""
    if isinstance(result, PyDiffusionError | ValueError):
        yield result
    elif isinstance(result, Exception):
        raise result
    else:
        yield from result


def requests_of(
    prompts: Iterable[Any],
    options: GenerationOptions | Iterable[GenerationOptions] | None,
    keywords: Mapping[str, Any],
    settings: ChatSettings | None = None,
) -> Iterator[BatchRequest]:
    """Each prompt, or conversation, with its options: the same for all, or one for each.

    Raises ValueError unless there are as many options as prompts; of iterators, when the options run out.
    """
    if options is None or isinstance(options, GenerationOptions):
        each: Iterator[GenerationOptions] = itertools.repeat(make_options(options, keywords))
    else:
        if isinstance(prompts, Sized) and isinstance(options, Sized) and len(prompts) != len(options):
            raise ValueError(f"there are {len(prompts)} prompts, but options for {len(options)}")
        each = (make_options(one, keywords) for one in options)
    return _paired(prompts, each, settings)


def _paired(
    prompts: Iterable[Any], options: Iterator[GenerationOptions], settings: ChatSettings | None
) -> Iterator[BatchRequest]:
    for i, prompt in enumerate(prompts):
        chosen = next(options, None)
        if chosen is None:
            raise ValueError(f"there are options for {i} prompts, but more prompts")
        yield BatchRequest(prompt, chosen, settings=settings)


def generate_batch(
    model: DiffusionModel,
    requests: Iterable[BatchRequest],
    n_parallel: int,
    n_ctx: int | None,
    on_event: Callable[[int, Event], None] | None,
) -> Iterator[tuple[int, Outcome]]:
    """See ``DiffusionModel.generate_batch``; requests: consumed as sequences finish."""
    if isinstance(n_parallel, bool) or not isinstance(n_parallel, int) or n_parallel < 1:
        raise ValueError(f"n_parallel is {n_parallel!r}; permitted is an integer of at least 1")
    return _outcomes(model, requests, n_parallel, n_ctx, on_event)


def _outcomes(
    model: DiffusionModel,
    requests: Iterable[BatchRequest],
    n_parallel: int,
    n_ctx: int | None,
    on_event: Callable[[int, Event], None] | None,
) -> Iterator[tuple[int, Outcome]]:
    kept: dict[int, list[CanvasEvent | EndEvent]] = {}
    for index, sequence, event in batched_events(model, requests, n_parallel, n_ctx):
        if isinstance(event, _OWN_ERRORS):
            kept.pop(index, None)
            yield index, event
            continue
        if on_event is not None:
            on_event(index, event)
        if not isinstance(event, DraftEvent):
            kept.setdefault(index, []).append(event)
        if isinstance(event, EndEvent):
            assert sequence is not None  # it had events
            yield index, _completion(sequence, kept.pop(index))


def _completion(sequence: ActiveSequence, events: list[CanvasEvent | EndEvent]) -> Completion:
    if sequence.chat:
        return chat_completion_of(sequence.n_prompt, sequence.n_cached, events)
    return completion_of(sequence.session.model.tokenizer, sequence.n_prompt, events)
