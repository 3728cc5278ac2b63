"""One conversation with a model: its tokens and cache, single denoising steps, whole generations."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from . import _native
from .chat.output_parser import ends_in_thought
from .events import CanvasEvent, Completion, DraftEvent, EndEvent, Event
from .generation import session_file
from .generation.repetition import loop_start
from .generation.streaming import AnswerStream, ChatStream, ContentStream, count_tokens
from .generation.thinking_budget import ThoughtBudget
from .generation.token_ids import TokenIds, check_bos, common_prefix, cut_at_eos, token_array
from .options import GenerationOptions, make_options

if TYPE_CHECKING:
    from .constrained import Guide
    from .model import DiffusionModel

# Tokens at the end of a prompt that may open a thought: the marker, "thought", a line break.
_THOUGHT_OPENING = 16


class Session:
    """Made by ``DiffusionModel.new_session``; for one thread at a time (a second raises PyDiffusionError)."""

    def __init__(self, model: DiffusionModel, n_ctx: int) -> None:
        """A session of up to ``n_ctx`` tokens. Raises InsufficientMemoryError without room for its cache."""
        self.model = model
        self._native = _native.Session(model._native, n_ctx)
        self._prompt_seconds = 0.0  # spent on encoding since the last generation

    @property
    def n_ctx(self) -> int:
        """How many tokens the session can hold."""
        return self._native.n_ctx

    @property
    def n_past(self) -> int:
        """How many tokens are in the cache."""
        return self._native.n_past

    @property
    def tokens(self) -> np.ndarray:
        """The tokens in the cache, int32 (n_past,)."""
        return self._native.tokens

    @property
    def n_encoded(self) -> int:
        """Tokens put through the encoder so far: what reuse of the cache saves does not show here."""
        return self._native.n_encoded

    @property
    def step_ops(self) -> dict[str, int]:
        """What the last denoising step ran: ggml's operation name -> how many; empty before the first."""
        return self._native.step_ops

    def encode(
        self,
        ids: TokenIds,
        return_hidden: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray | None:
        """Append tokens to the cache, causally.

        return_hidden: return the hidden states after the final norm, float32 (len(ids), d).
        progress: called with tokens done and tokens in all.
        Raises ContextOverflowError, with nothing changed, when they don't fit; ValueError for an id out of
        range.
        """
        started = time.perf_counter()
        hidden = self._native.encode(
            token_array(ids, self.model.n_vocab), return_hidden=return_hidden, progress=progress
        )
        self._prompt_seconds += time.perf_counter() - started
        return hidden

    def prefill(self, ids: TokenIds, progress: Callable[[int, int], None] | None = None) -> int:
        """Make these the session's tokens, encoding only what follows the part that the cache has already.

        Returns how many tokens could be kept. Raises as ``encode`` does, and warns (PromptWarning) where the
        bos in front is missing or doubled.
        """
        wanted = token_array(ids, self.model.n_vocab)
        check_bos(self.model.tokenizer, wanted)
        n_kept = self.keep(wanted)
        if n_kept < len(wanted):
            self.encode(wanted[n_kept:], progress=progress)
        return n_kept

    def keep(self, ids: TokenIds) -> int:
        """Forget all but the longest beginning of these tokens that the cache has; returns its length."""
        wanted = token_array(ids, self.model.n_vocab)
        n_kept = common_prefix(wanted, self.tokens)
        if n_kept < self.n_past:
            self.truncate(n_kept)
        return n_kept

    def truncate(self, n: int) -> None:
        """Forget all but the first ``n`` tokens. Raises ValueError unless ``0 <= n <= n_past``.

        Costs nothing within a window of the newest token, and back to where the last generation began (and a
        little before); beyond that the tokens kept are encoded again.
        """
        self._native.truncate(n)

    def fork(self) -> Session:
        """A copy with the same tokens that goes its own way; nothing is encoded again.

        Raises InsufficientMemoryError without room for another cache.
        """
        other = Session(self.model, self.n_ctx)
        other.copy(self)
        return other

    def copy(self, other: Session) -> None:
        """Take over the tokens and the cache of another session of this model, in place of its own.

        Raises ContextOverflowError where they don't fit.
        """
        self._native.restore(other.tokens, other._native.cache_rows())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write tokens and cache to a file for ``DiffusionModel.load_session``, whole or not at all.

        Raises PyDiffusionError when it can't be written.
        """
        session_file.save(self, Path(path))

    def denoise(self, canvas: TokenIds, self_conditioning: npt.ArrayLike | None = None) -> np.ndarray:
        """Logits of one denoising step on a canvas behind the cache, which stays as it is.

        canvas: (canvas_length,).
        self_conditioning: float32 (canvas_length, n_vocab), the logits whose softmax conditions this step
            (already divided by their temperature), or None for the first step.
        Returns float32 (canvas_length, n_vocab), soft-capped, not divided by a temperature.
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
        return self._native.denoise(ids, self_conditioning)

    def cancel(self) -> None:
        """Stop the running native call, or the next, which raises GenerationCancelled. From any thread."""
        self._native.cancel()

    def generate(self, options: GenerationOptions | None = None, **keywords: Any) -> Iterator[Event]:
        """Denoise canvas after canvas behind the session's tokens; an iterator of events, the last an
        EndEvent.

        Options as GenerationOptions or as keywords of the same names. A finished canvas enters the cache
        when the next begins. Leaving the iterator early is fine; the session goes on from the tokens it then
        has. Raises GenerationCancelled after ``cancel()``.
        """
        resolved = self.model.resolve(make_options(options, keywords))
        return self._generate(resolved, self._answer_stream(resolved, chat=False))

    def generate_chat(self, options: GenerationOptions | None = None, **keywords: Any) -> Iterator[Event]:
        """As ``generate``, behind a chat prompt: the ``parts`` of a CanvasEvent tell thinking, answer and
        tool calls apart, and stop strings cut the answer only.
        """
        resolved = self.model.resolve(make_options(options, keywords))
        return self._generate(resolved, self._answer_stream(resolved, chat=True))

    def _answer_stream(self, options: GenerationOptions, chat: bool) -> AnswerStream | ChatStream:
        if not chat:
            return AnswerStream(self.model.tokenizer, options.stop)
        prompt_end = self.model.detokenize(self.tokens[-_THOUGHT_OPENING:], keep_control=True)
        in_thought = ends_in_thought(prompt_end)
        if options.is_structured:
            if in_thought:
                raise ValueError("the prompt ends within a thought: structured answers come without one")
            return ContentStream(self.model.tokenizer, ())
        return ChatStream(self.model.tokenizer, options.stop, in_thought)

    def _guide(self, options: GenerationOptions) -> Guide | None:
        """What keeps the text to a schema or an expression, where the options ask for it."""
        if not options.is_structured:
            return None
        from .constrained import Guide

        n_canvas = options.canvas_length or self.model.canvas_length
        assert options.max_tokens is not None and options.eos is not None  # resolved
        budget = min(options.max_tokens, (self.n_ctx - self.n_past) // n_canvas * n_canvas)
        return Guide(self.model.automaton(options), n_canvas, budget, list(options.eos), self.model.n_vocab)

    def _generate(self, options: GenerationOptions, answer: AnswerStream | ChatStream) -> Iterator[Event]:
        to_events = self._begin(options, answer)
        while (step := self._native.next_step()) is not None:
            for event in to_events(step):
                yield event
                if isinstance(event, EndEvent):
                    return

    def _begin(
        self, options: GenerationOptions, answer: AnswerStream | ChatStream
    ) -> Callable[[_native.Step], Iterator[Event]]:
        """Start a generation; what it returns tells the events that a native step brings."""
        started = time.perf_counter()
        eos = np.asarray(options.eos, dtype=np.int32)
        prompt_seconds, self._prompt_seconds = self._prompt_seconds, 0.0

        def draft_text(tokens: np.ndarray) -> str:
            return self.model.tokenizer.detokenize(cut_at_eos(tokens, eos))

        guide = self._guide(options)
        limits = _Limits(self, options)
        self._native.begin(
            max_tokens=options.max_tokens,
            steps=options.steps,
            t_min=options.t_min,
            t_max=options.t_max,
            entropy_bound=options.entropy_bound,
            stability_threshold=options.stability_threshold,
            confidence_threshold=options.confidence_threshold,
            dropped_mass=options.dropped_mass,
            canvas_length=options.canvas_length or 0,
            trim_after_eos=bool(options.trim_after_eos),
            seed=options.seed,
            eos=list(options.eos),
            **_given(options),
            **({"guided": True} if guide else {}),
        )

        def to_events(step: _native.Step) -> Iterator[Event]:
            if guide is not None:
                found = self._native.candidates(guide.n_likeliest, guide.extra)
                step = self._native.impose(guide.choose(*found))
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
            tokens, finish = limits.apply(step)
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
        """``generate`` to its end; on_event is called with every event. Raises as ``generate`` does."""
        n_prompt = self.n_past
        events = []
        for event in self.generate(options, **keywords):
            if on_event is not None:
                on_event(event)
            if not isinstance(event, DraftEvent):
                events.append(event)
        return self._completion(n_prompt, events)

    def _completion(self, n_prompt: int, events: list[CanvasEvent | EndEvent]) -> Completion:
        *canvases, end = events
        assert isinstance(end, EndEvent)  # the generator's last event, always
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


class _Limits:
    """What the options set to thinking and repetition, over the canvases of one generation."""

    def __init__(self, session: Session, options: GenerationOptions) -> None:
        self._native = session._native
        self._budget: ThoughtBudget | None = None
        if options.thinking_budget is not None:
            end = session.tokens[-_THOUGHT_OPENING:].tolist()
            self._budget = ThoughtBudget(session.model.tokenizer, options.thinking_budget, end)
        self._past: np.ndarray | None = np.empty(0, np.int32) if options.stop_on_repetition else None

    def apply(self, step: _native.Step) -> tuple[np.ndarray, str]:
        """The tokens of a finished canvas that count, and how they finish the generation, if they do."""
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


def _given(options: GenerationOptions) -> dict[str, Any]:
    """What the native loop needs to know of tokens that the caller gives."""
    if not options.canvas:
        return {}
    return {
        "canvas": np.asarray(options.canvas, dtype=np.int32),
        "hold": np.asarray(options.hold or (), dtype=np.uint8),
    }
