"""The methods of ``DiffusionModel`` that fill holes of a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from pydiffusion.options import GenerationOptions, make_options

from .infill import (
    DEFAULT_HOLE_TOKENS,
    Infill,
    Layout,
    collect,
    lay_out,
    lay_out_spans,
    prepare,
    prompt_of,
)
from .prompt import check_text, prefilled_session

if TYPE_CHECKING:
    from pydiffusion.events import Event
    from pydiffusion.model import DiffusionModel
    from pydiffusion.session import Session


class InfillMethods:
    """Text with holes, and text of which spans are written anew."""

    def infill(
        self,
        text: str,
        options: GenerationOptions | None = None,
        *,
        instruction: str | None = None,
        hole_tokens: int = DEFAULT_HOLE_TOKENS,
        on_event: Callable[[Event], None] | None = None,
        session: Session | None = None,
        **keywords: Any,
    ) -> Infill:
        """Infill: fill the holes of a text, ``<|hole|>`` or ``<|hole:N|>``, keeping the text around them
        fixed.

        instruction: user message that the text answers; without one, the text before the first hole is the
            prompt.
        hole_tokens: maximum length of a hole without an N; it may come out shorter.
        A hole attends to its own canvas and everything before it. Options as for ``generate``, except
        ``max_tokens``, ``stop`` and ``eos``. Raises ValueError without a hole, ContextOverflowError.
        """
        check_text("text", text)
        layout = lay_out(self._model, text, hole_tokens, whole=instruction is not None)
        return self._fill(layout, instruction, make_options(options, keywords), on_event, session)

    def edit(
        self,
        text: str,
        spans: Sequence[tuple[int, int]],
        options: GenerationOptions | None = None,
        *,
        instruction: str | None = None,
        more_tokens: int = 4,
        on_event: Callable[[Event], None] | None = None,
        session: Session | None = None,
        **keywords: Any,
    ) -> Infill:
        """Rewrite spans of a text, given as (start, end) in characters, starting from their current tokens.

        more_tokens: tokens that each span may grow by. Otherwise as ``infill``.
        """
        check_text("text", text)
        layout = lay_out_spans(self._model, text, spans, more_tokens, whole=instruction is not None)
        return self._fill(layout, instruction, make_options(options, keywords), on_event, session)

    def _fill(
        self,
        layout: Layout,
        instruction: str | None,
        options: GenerationOptions,
        on_event: Callable[[Event], None] | None,
        session: Session | None,
    ) -> Infill:
        model = self._model
        prompt = prompt_of(model, layout, instruction)
        options = prepare(model, layout, prompt, options, model.n_ctx if session is None else session.n_ctx)
        completion = prefilled_session(model, prompt, session, options.lora).complete(options, on_event)
        return collect(layout, completion, model.tokenizer)

    @property
    def _model(self) -> DiffusionModel:
        return cast("DiffusionModel", self)
