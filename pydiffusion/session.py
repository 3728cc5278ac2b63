"""Session: one conversation's tokens and KV cache, single denoising steps, whole generations."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from . import _native
from .events import CanvasEvent, Completion, DraftEvent, EndEvent, Event
from .generation import session_file
from .generation.repetition import loop_start
from .generation.streaming import AnswerStream, ChatStream, chat_stream, count_tokens
from .generation.thinking_budget import ThoughtBudget
from .generation.token_ids import TokenIds, check_bos, common_prefix, cut_at_eos, token_array
from .options import GenerationOptions, ResolvedOptions, make_options

if TYPE_CHECKING:
    from .constrained import Guide
    from .model import DiffusionModel

# Tokens at the end of a prompt that may open a reasoning block: the marker, "thought", a line break.
_THOUGHT_OPENING = 16

# Options that the native loop takes as they are.
_BEGIN_OPTIONS = (
    "max_tokens", "steps", "t_min", "t_max", "entropy_bound", "stability_threshold", "confidence_threshold",
    "dropped_mass", "canvas_length", "seed", "trim_after_eos",
)  # fmt: skip


class NativeStep(Protocol):
    """``_native.Step`` with the types of its arrays, which the generated stub leaves out."""

    canvas_index: int
    step: int
    draft: np.ndarray
    entropy: np.ndarray
    accepted: np.ndarray
    canvas_done: bool
    tokens: np.ndarray
    finish: str
    timings: dict[str, float]


class Session:
    """One conversation; create it with ``DiffusionModel.new_session``.

    For one thread at a time: concurrent use raises PyDiffusionError. Sessions can be forked, saved and rolled
    back.
    """

    def __init__(self, model: DiffusionModel, n_ctx: int) -> None:
        """Allocate a cache of ``n_ctx`` tokens. Raises InsufficientMemoryError if that fails."""
        self.model = model
        self._native = _native.Session(model._native, n_ctx)
        self._prompt_seconds = 0.0  # spent on encoding since the last generation

    @property
    def n_ctx(self) -> int:
        """Context length: the maximum number of tokens in the cache."""
        return self._native.n_ctx

    @property
    def n_past(self) -> int:
        """Number of tokens in the cache."""
        return self._native.n_past

    @property
    def tokens(self) -> np.ndarray:
        """The tokens in the cache, int32 (n_past,)."""
        return cast(np.ndarray, self._native.tokens)

    @property
    def n_encoded(self) -> int:
        """Number of tokens encoded so far; tokens reused from the cache don't count."""
        return self._native.n_encoded

    @property
    def step_ops(self) -> dict[str, int]:
        """Operations of the last denoising step: ggml's name -> count; empty before the first step."""
        return self._native.step_ops

    def encode(
        self,
        ids: TokenIds,
        return_hidden: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray | None:
        """Encode tokens causally and append them to the cache.

        return_hidden: return the hidden states after the final norm, float32 (len(ids), d).
        progress: called with the number of tokens done and the total.
        Raises ContextOverflowError, with nothing changed, if they don't fit; ValueError for an id out of
        range.
        """
        started = time.perf_counter()
        hidden = self._native.encode(
            token_array(ids, self.model.n_vocab), return_hidden=return_hidden, progress=progress
        )
        self._prompt_seconds += time.perf_counter() - started
        return cast("np.ndarray | None", hidden)

    def prefill(self, ids: TokenIds, progress: Callable[[int, int], None] | None = None) -> int:
        """Make these the session's tokens, encoding only what follows the prefix that is already in the
        cache.

        Returns the number of tokens reused. Raises as ``encode``; warns (PromptWarning) if the bos at the
        start is missing or doubled.
        """
        wanted = token_array(ids, self.model.n_vocab)
        check_bos(self.model.tokenizer, wanted)
        n_kept = self.keep(wanted)
        if n_kept < len(wanted):
            self.encode(wanted[n_kept:], progress=progress)
        return n_kept

    def keep(self, ids: TokenIds) -> int:
        """Truncate the cache to its longest common prefix with these tokens; return the prefix length."""
        wanted = token_array(ids, self.model.n_vocab)
        n_kept = common_prefix(wanted, self.tokens)
        if n_kept < self.n_past:
            self.truncate(n_kept)
        return n_kept

    def truncate(self, n: int) -> None:
        """Roll back to the first ``n`` tokens. Raises ValueError unless ``0 <= n <= n_past``.

        Free within a sliding window of the newest token and back to the start of the last generation (and a
        little before); further back, the remaining tokens are encoded again.
        """
        self._native.truncate(n)

    def fork(self) -> Session:
        """Copy the session, cache included; nothing is encoded again.

        Raises InsufficientMemoryError if another cache can't be allocated.
        """
        other = Session(self.model, self.n_ctx)
        other.copy(self)
        return other

    def copy(self, other: Session) -> None:
        """Replace tokens and cache by a copy of another session's, which must be of the same model.

        Raises ContextOverflowError if they don't fit.
        """
        self._native.restore(other.tokens, other._native.cache_rows())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write tokens and cache to a file for ``DiffusionModel.load_session``, atomically.

        Raises PyDiffusionError if it can't be written.
        """
        session_file.save(self, Path(path))

    def denoise(self, canvas: TokenIds, self_conditioning: npt.ArrayLike | None = None) -> np.ndarray:
        """Compute the logits of one denoising step on a canvas after the cached tokens; the cache is
        unchanged.

        canvas: (canvas_length,).
        self_conditioning: float32 (canvas_length, n_vocab), the logits whose softmax conditions this step
            (already divided by their temperature), or None for the first step.
        Returns float32 (canvas_length, n_vocab): soft-capped, before temperature.
        """
        ids = token_array(canvas, self.model.n_vocab)
        if len(ids) != self.model.canvas_length:
            raise ValueError(
                f"canvas has {len(ids)} tokens; this model's canvas has {self.model.canvas_length}"
            )
        if self_conditioning is not None:
            self_conditioning = np.ascontiguousarray(self_conditioning, dtype=np.float32)
            expected = (self.model.canvas_length, self.model.n_vocab)
            if self_conditioning.shape != expected:
                raise ValueError(
                    f"self_conditioning has the shape {self_conditioning.shape}; it must be {expected}"
                )
        return cast(np.ndarray, self._native.denoise(ids, self_conditioning))

    def cancel(self) -> None:
        """Make the running native call, or the next one, raise GenerationCancelled. Thread-safe."""
        self._native.cancel()

    def generate(self, options: GenerationOptions | None = None, **keywords: Any) -> Iterator[Event]:
        """Generate after the session's tokens, canvas by canvas; yields events, the last one an EndEvent.

        Options as GenerationOptions or as keywords of the same names. A finished canvas enters the cache when
        the next one begins. The iterator may be abandoned early; the session continues from the tokens it has
        by then. Raises GenerationCancelled after ``cancel()``.
        """
        resolved = self.model.resolve(make_options(options, keywords))
        return self._generate(resolved, self._answer_stream(resolved, chat=False))

    def generate_chat(self, options: GenerationOptions | None = None, **keywords: Any) -> Iterator[Event]:
        """As ``generate``, after a chat prompt: ``CanvasEvent.parts`` separates reasoning, answer and tool
        calls, and stop strings apply to the answer only.
        """
        resolved = self.model.resolve(make_options(options, keywords))
        return self._generate(resolved, self._answer_stream(resolved, chat=True))

    def _answer_stream(self, options: ResolvedOptions, chat: bool) -> AnswerStream | ChatStream:
        if not chat:
            return AnswerStream(self.model.tokenizer, options.stop)
        prompt_end = self.model.detokenize(self.tokens[-_THOUGHT_OPENING:], keep_control=True)
        return chat_stream(self.model.tokenizer, options, prompt_end)

    def _guide(self, options: ResolvedOptions) -> Guide | None:
        """Guide for constrained decoding, if the options ask for it."""
        if not options.is_structured:
            return None
        from .constrained import Guide

        n_canvas = options.canvas_length
        budget = min(options.max_tokens, (self.n_ctx - self.n_past) // n_canvas * n_canvas)
        return Guide(self.model.automaton(options), n_canvas, budget, options.eos, self.model.n_vocab)

    def _generate(self, options: ResolvedOptions, answer: AnswerStream | ChatStream) -> Iterator[Event]:
        to_events = self._begin(options, answer)
        while (step := self._native.next_step()) is not None:
            for event in to_events(cast(NativeStep, step)):
                yield event
                if isinstance(event, EndEvent):
                    return

    def _begin(
        self, options: ResolvedOptions, answer: AnswerStream | ChatStream
    ) -> Callable[[NativeStep], Iterator[Event]]:
        """Start a generation; returns the function that converts a native step into events."""
        started = time.perf_counter()
        eos = np.asarray(options.eos, dtype=np.int32)
        prompt_seconds, self._prompt_seconds = self._prompt_seconds, 0.0

        def draft_text(tokens: np.ndarray) -> str:
            return self.model.tokenizer.detokenize(cut_at_eos(tokens, eos))

        guide = self._guide(options)
        conditions = _StopConditions(self, options)
        self._native.begin(**_begin_arguments(options), guided=guide is not None)

        def to_events(step: NativeStep) -> Iterator[Event]:
            if guide is not None:
                found = self._native.candidates(guide.n_likeliest, guide.extra)
                step = cast(NativeStep, self._native.impose(guide.choose(*found)))
            yield DraftEvent(
                step=step.step,
                tokens=step.draft,
                entropy=step.entropy,
                accepted=step.accepted,
                canvas_index=step.canvas_index,
                steps=options.steps,
                _to_text=draft_text,
            )
            if not step.canvas_done:
                return
            tokens, finish = conditions.apply(step)
            if guide is not None:
                guide.commit()
                finish = "eos" if guide.finished else finish
            text, n_tokens, stopped = answer.feed(tokens, last=bool(finish))
            yield CanvasEvent(
                tokens=tokens[:n_tokens],
                text=text,
                steps=options.steps - step.step + 1,
                canvas_index=step.canvas_index,
                parts=tuple(answer.parts),
            )
            if stopped or finish:
                total = prompt_seconds + time.perf_counter() - started
                timings = {"prompt": prompt_seconds, **step.timings, "total": total}
                yield EndEvent(reason="stop" if stopped else finish, timings=timings, seed=options.seed)

        return to_events

    def complete(
        self,
        options: GenerationOptions | None = None,
        on_event: Callable[[Event], None] | None = None,
        **keywords: Any,
    ) -> Completion:
        """Run ``generate`` to its end; on_event is called with every event. Raises as ``generate``."""
        n_prompt = self.n_past
        events: list[CanvasEvent | EndEvent] = []
        for event in self.generate(options, **keywords):
            if on_event is not None:
                on_event(event)
            if not isinstance(event, DraftEvent):
                events.append(event)
        return self._completion(n_prompt, events)

    def _completion(self, n_prompt: int, events: list[CanvasEvent | EndEvent]) -> Completion:
        end = events[-1]
        assert isinstance(end, EndEvent)  # always the last event
        canvases = [event for event in events if isinstance(event, CanvasEvent)]
        text = "".join(canvas.text for canvas in canvases)
        tokens = np.concatenate([canvas.tokens for canvas in canvases])
        if end.reason == "stop":  # the stop string may begin in an earlier canvas than it ends in
            tokens = tokens[: count_tokens(self.model.tokenizer, tokens, len(text))]
        return Completion(
            text=text,
            tokens=tokens,
            steps=sum(canvas.steps for canvas in canvases),
            timings=end.timings,
            finish_reason=end.reason,
            seed=end.seed,
            n_prompt=n_prompt,
            canvas_steps=tuple(canvas.steps for canvas in canvases),
        )


class _StopConditions:
    """Thinking budget and repetition check over the canvases of one generation."""

    def __init__(self, session: Session, options: ResolvedOptions) -> None:
        self._native = session._native
        self._budget: ThoughtBudget | None = None
        if options.thinking_budget is not None:
            end = session.tokens[-_THOUGHT_OPENING:].tolist()
            self._budget = ThoughtBudget(session.model.tokenizer, options.thinking_budget, end)
        self._past: np.ndarray | None = np.empty(0, np.int32) if options.stop_on_repetition else None

    def apply(self, step: NativeStep) -> tuple[np.ndarray, str]:
        """Truncate a finished canvas; returns its tokens and the finish reason, empty to continue."""
        tokens, finish = step.tokens, step.finish
        if self._budget is not None and (cut := self._budget.cut(tokens.tolist())) is not None:
            tokens = np.asarray(cut, dtype=np.int32)
            finish = self._native.amend(tokens)
        if self._past is not None:
            self._past = np.concatenate([self._past, tokens])
            if not finish and (start := loop_start(self._past)) is not None:
                n_before = len(self._past) - len(tokens)
                return tokens[: max(0, start - n_before)], "repetition"
        return tokens, finish


def _begin_arguments(options: ResolvedOptions) -> dict[str, Any]:
    """Options as arguments of the native loop."""
    arguments: dict[str, Any] = {name: getattr(options, name) for name in _BEGIN_OPTIONS}
    arguments["eos"] = list(options.eos)
    if options.canvas:
        arguments["canvas"] = np.asarray(options.canvas, dtype=np.int32)
        arguments["hold"] = np.asarray(options.hold, dtype=np.uint8)
    return arguments
