"""Session: one conversation's tokens and KV cache, single denoising steps, whole generations."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt

from .adapters.adapter import Adapter
from .adapters.applied import AdapterSet, SessionAdapters
from .events import CanvasEvent, Completion, DraftEvent, EndEvent, Event
from .generation import session_file
from .generation.completion import completion_of
from .generation.image_prompt import (
    AnyPrompt,
    begin_prompt,
    check_no_bare_image,
    keep_shared,
    part_of,
    read_prompt,
)
from .generation.loop import Generation
from .generation.streaming import AnswerStream, ChatStream, answer_stream
from .generation.token_ids import TokenIds, check_bos, token_array
from .options import GenerationOptions, Lora, ResolvedOptions, make_options
from .vision.preprocessing import MAX_SOFT_TOKENS

if TYPE_CHECKING:
    from .model import DiffusionModel
    from .vision.prompt import Prompt


class Session:
    """One conversation; create it with ``DiffusionModel.new_session``.

    For one thread at a time: concurrent use raises PyDiffusionError. Sessions can be forked, saved and rolled
    back.

    For this package only: ``native``, the native session; ``adapters``, which it applies; ``prompt_seconds``,
    spent on encoding since the last generation.
    """

    def __init__(self, model: DiffusionModel, n_ctx: int, lora: AdapterSet | None = None) -> None:
        """Allocate a cache of ``n_ctx`` tokens. lora: adapters of its own; None: the model's.

        Raises InsufficientMemoryError if that fails.
        """
        self.model = model
        longest = MAX_SOFT_TOKENS[-1] if model.vision is not None else 0
        self.native = model.native.new_session(n_ctx, longest)
        self.adapters = SessionAdapters(model.adapters, self.native, lora)
        self.prompt_seconds = 0.0

    @property
    def n_ctx(self) -> int:
        """Context length: the maximum number of tokens in the cache."""
        return self.native.n_ctx

    @property
    def n_past(self) -> int:
        """Number of tokens in the cache."""
        return self.native.n_past

    @property
    def tokens(self) -> np.ndarray:
        """The tokens in the cache, int32 (n_past,); at an image's soft tokens the image token."""
        return self.native.tokens

    @property
    def n_encoded(self) -> int:
        """Number of tokens encoded so far; tokens reused from the cache don't count."""
        return self.native.n_encoded

    @property
    def step_ops(self) -> dict[str, int]:
        """Operations of the last denoising step: ggml's name -> count; empty before the first step."""
        return self.native.step_ops

    @property
    def lora(self) -> tuple[tuple[Adapter, float], ...]:
        """The session's adapters, each with its scale: its own, else the model's."""
        return self.adapters.chosen.given

    @property
    def lora_key(self) -> bytes:
        """A hash of the adapters and scales that the tokens in the cache are encoded with, those of scale 0
        left out; empty without adapters. Equal keys: caches that can take each other's place.
        """
        return self.adapters.applied.key

    def set_lora(self, lora: Lora | None) -> None:
        """Give the session adapters of its own, as ``DiffusionModel.set_lora``; None: the model's again.

        The cache's tokens are encoded anew before they are next used. Raises as ``DiffusionModel.set_lora``,
        with nothing changed.
        """
        self.adapters.set(lora)

    def encode(
        self,
        ids: AnyPrompt,
        return_hidden: bool = False,
        progress: Callable[[int, int], None] | None = None,
        lora: Lora | None = None,
    ) -> np.ndarray | None:
        """Encode tokens causally and append them to the cache.

        ids: token ids, and images among them (a PIL image, an array, a path or the bytes of a file), each of
            which stands for its begin token, soft tokens and end token; or a Prompt.
        return_hidden: return the hidden states after the final norm, float32 (n_tokens, d).
        progress: called with the number of tokens done and the total.
        lora: adapters for this call, as ``GenerationOptions.lora``; None: the session's. Tokens that the
            cache has with others are encoded anew.
        Raises ContextOverflowError, with nothing changed, if they don't fit; ValueError for an id out of
        range, or an image token without its image; of images, as ``DiffusionModel.encode_image``.
        """
        started = time.perf_counter()
        prompt = read_prompt(self.model, ids)
        check_no_bare_image(self.model, prompt)
        self.adapters.apply(lora)
        hidden = self.native.encode(
            prompt.ids, images=self._features(prompt), return_hidden=return_hidden, progress=progress
        )
        self.prompt_seconds += time.perf_counter() - started
        return hidden

    def _features(self, prompt: Prompt) -> list[tuple[int, np.ndarray, bytes]]:
        """The images of a prompt as the native session takes them."""
        if not prompt.images or self.n_past + len(prompt) > self.n_ctx:  # which `encode` reports
            return []
        features = self.model.require_vision().features
        return [(placed.begin, features(placed.image), placed.image.key) for placed in prompt.images]

    def prefill(
        self,
        ids: AnyPrompt,
        progress: Callable[[int, int], None] | None = None,
        lora: Lora | None = None,
    ) -> int:
        """Make these the session's tokens, encoding only what follows the prefix that is already in the
        cache.

        ids, lora: as of ``encode``; image tokens without an image are the session's own image there.
        Returns the number of tokens reused. Raises as ``encode``; warns (PromptWarning) if the bos at the
        start is missing or doubled.
        """
        wanted = read_prompt(self.model, ids)
        check_bos(self.model.tokenizer, wanted.ids)
        n_kept = begin_prompt(self, wanted, lora)
        if n_kept < len(wanted):
            self.encode(part_of(wanted, n_kept), progress=progress, lora=lora)
        return n_kept

    def keep(self, ids: AnyPrompt) -> int:
        """Truncate the cache to its longest common prefix with these tokens and images, which ends before an
        image that differs; return the prefix length.
        """
        return keep_shared(self, read_prompt(self.model, ids), check=False)

    def truncate(self, n: int) -> None:
        """Roll back to the first ``n`` tokens. Raises ValueError, with nothing changed, unless
        ``0 <= n <= n_past``, or if that would cut an image, which the error names.

        Free within a sliding window of the newest token and back to the start of the last generation (and a
        little before); further back, the remaining tokens are encoded again, from the features of images
        that the session keeps.
        """
        self.native.truncate(n)

    def fork(self) -> Session:
        """Copy the session, cache included; nothing is encoded again.

        Raises InsufficientMemoryError if another cache can't be allocated.
        """
        other = Session(self.model, self.n_ctx, self.adapters.own)
        other.copy(self)
        return other

    def copy(self, other: Session) -> None:
        """Replace tokens and cache by a copy of another session's, which must be of the same model.

        Adapters of its own stay the session's. Raises with nothing changed: ContextOverflowError if they
        don't fit, ValueError for a session of another model.
        """
        if other.lora_key and other.model is not self.model:
            raise ValueError("the session to copy is of another model, with its adapters")
        self.native.copy_from(other.native)
        self.adapters.apply_those_of(other.adapters)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Session can't be pickled or copied: use fork(), or save(path) and load_session")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write tokens, images' features and cache to a file for ``DiffusionModel.load_session``, atomically.

        The cache is saved as it is, also within a generation, which goes on; the file says which adapters it
        is encoded with (``lora_key``). Raises PyDiffusionError if it can't be written.
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
        self.adapters.apply()
        return self.native.denoise(ids, self_conditioning)

    def cancel(self) -> None:
        """Make the running native call, or the next one, raise GenerationCancelled. Thread-safe."""
        self.native.cancel()

    def generate(self, options: GenerationOptions | None = None, **keywords: Any) -> Iterator[Event]:
        """Generate after the session's tokens, canvas by canvas; yields events, the last one an EndEvent.

        Options as GenerationOptions or as keywords of the same names. A finished canvas enters the cache when
        the next one begins. The iterator may be abandoned early; the session continues from the tokens it has
        by then. Raises GenerationCancelled after ``cancel()``.
        """
        resolved = self.model.resolve(make_options(options, keywords))
        return self._events(resolved, answer_stream(self, resolved, chat=False))

    def generate_chat(self, options: GenerationOptions | None = None, **keywords: Any) -> Iterator[Event]:
        """As ``generate``, after a chat prompt: ``CanvasEvent.parts`` separates reasoning, answer and tool
        calls, and stop strings apply to the answer only.
        """
        resolved = self.model.resolve(make_options(options, keywords))
        return self._events(resolved, answer_stream(self, resolved, chat=True))

    def _events(self, options: ResolvedOptions, answer: AnswerStream | ChatStream) -> Iterator[Event]:
        # A generator of its own: options are checked at the call, the generation begins at the first event.
        yield from Generation(self, options, answer).run()

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
        return completion_of(self.model.tokenizer, n_prompt, events)
