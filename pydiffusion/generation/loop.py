"""The loop of a generation: native steps in, events out; the same for a session alone and in a batch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pydiffusion._util.sampler_options import SAMPLER_OPTIONS, sampler_of
from pydiffusion.errors import PyDiffusionError
from pydiffusion.events import CanvasEvent, DraftEvent, EndEvent, Event
from pydiffusion.options import ResolvedOptions
from pydiffusion.tokenizer import Tokenizer

from .stop_conditions import StopConditions
from .streaming import AnswerStream, ChatStream, leaves_reasoning_open
from .token_ids import cut_at_eos

if TYPE_CHECKING:
    from pydiffusion._native import Step
    from pydiffusion.constrained import Guide
    from pydiffusion.session import Session

# Options that the native loop takes as they are, beside those of the model's sampler.
_BEGIN_OPTIONS = ("max_tokens", "dropped_mass", "canvas_length", "seed", "trim_after_eos")


class Generation:
    """A generation after a session's tokens.

    Either ``run`` it, or run the native steps of several sessions in a batch and give each of them to its
    generation's ``events``.
    """

    def __init__(self, session: Session, options: ResolvedOptions, answer: AnswerStream | ChatStream) -> None:
        """Begin. answer: converts tokens to text, see ``streaming.answer_stream``.

        Raises ValueError for options that this model or these tokens don't permit, ContextOverflowError,
        GenerationCancelled.
        """
        self._started = time.perf_counter()
        session.adapters.apply(options.lora)
        self._native = session.native
        self._steps, self._seed = options.steps, options.seed
        self._answer = answer
        self._draft_text = partial(
            _draft_text, session.model.tokenizer, np.asarray(options.eos, dtype=np.int32)
        )
        self._prompt_seconds, session.prompt_seconds = session.prompt_seconds, 0.0
        self._guide = _guide(session, options)
        self._stop_conditions = StopConditions(session, options)
        self._native.begin(**_begin_arguments(session, options), guided=self._guide is not None)

    def run(self) -> Iterator[Event]:
        """Denoise to the end; yields the events of all steps.

        Raises PyDiffusionError if something else that the session was used for ended the generation.
        """
        while (step := self._native.next_step()) is not None:
            for event in self.events(step):
                yield event
                if isinstance(event, EndEvent):
                    return
        raise PyDiffusionError(
            "the session was used for something else during the generation, which is over: let it end before"
            " the session encodes, is rolled back, or gets other adapters"
        )

    def events(self, step: Step) -> Iterator[Event]:
        """Events of a step: its draft; after the last step of a canvas the canvas; then perhaps the end."""
        if self._guide is not None:
            step = self._choose(self._guide)
        yield DraftEvent(
            step=step.step,
            tokens=step.draft,
            entropy=step.entropy,
            accepted=step.accepted,
            canvas_index=step.canvas_index,
            steps=self._steps,
            _to_text=self._draft_text,
        )
        if step.canvas_done:
            yield from self._canvas_events(step)

    def _choose(self, guide: Guide) -> Step:
        """Second half of a guided step, with the tokens that the guide chooses."""
        found = self._native.candidates(guide.n_likeliest, guide.extra)
        return self._native.impose(guide.choose(*found))

    def _canvas_events(self, step: Step) -> Iterator[Event]:
        tokens, finish = self._stop_conditions.apply(step.tokens, step.finish)
        if self._guide is not None:
            self._guide.commit()
            finish = "eos" if self._guide.finished else finish
        text, n_tokens, stopped = self._answer.feed(tokens, last=bool(finish))
        yield CanvasEvent(
            tokens=tokens[:n_tokens],
            text=text,
            steps=self._steps - step.step + 1,
            canvas_index=step.canvas_index,
            parts=tuple(self._answer.parts),
        )
        if stopped or finish:
            yield EndEvent(
                reason="stop" if stopped else finish, timings=self._timings(step.timings), seed=self._seed
            )

    def _timings(self, of_steps: Mapping[str, float]) -> dict[str, float]:
        """Seconds per phase, as in ``EndEvent``."""
        total = self._prompt_seconds + time.perf_counter() - self._started
        return {"prompt": self._prompt_seconds, **of_steps, "total": total}


def _draft_text(tokenizer: Tokenizer, eos: np.ndarray, tokens: np.ndarray) -> str:
    return tokenizer.detokenize(cut_at_eos(tokens, eos))


def _guide(session: Session, options: ResolvedOptions) -> Guide | None:
    """Guide for constrained decoding, if the options ask for it."""
    if options.constraint is None:
        return None
    from pydiffusion.constrained import Guide

    model = session.model
    n_canvas = options.canvas_length
    budget = min(options.max_tokens, (session.n_ctx - session.n_past) // n_canvas * n_canvas)
    automaton = model.automaton(options)
    state = 0
    reasoning = model.tokenizer.chat_format.reasoning
    if reasoning is not None and options.may_reason and leaves_reasoning_open(session):
        state = automaton.after(reasoning[0])  # the prompt has the opening marker already
    return Guide(automaton, n_canvas, budget, options.eos, model.n_vocab, state)


def _begin_arguments(session: Session, options: ResolvedOptions) -> dict[str, Any]:
    """Options as arguments of the native loop."""
    of_sampler = [option.name for option in SAMPLER_OPTIONS[sampler_of(session.model.metadata)]]
    arguments: dict[str, Any] = {name: getattr(options, name) for name in (*_BEGIN_OPTIONS, *of_sampler)}
    arguments["eos"] = list(options.eos)
    if options.canvas:
        arguments["canvas"] = np.asarray(options.canvas, dtype=np.int32)
        arguments["hold"] = np.asarray(options.hold, dtype=np.uint8)
    return arguments
