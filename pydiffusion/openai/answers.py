"""The server's responses: usage with details, a summary of the denoising, drafts in a stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydiffusion.generation.chat_images import n_image_tokens

from .requests import ChatRequest, InfillRequest, Request
from .shaper import ChatChoice, Choice, FilledChoice, Json, Response, TextChoice

if TYPE_CHECKING:
    from pydiffusion.tokenizer import Tokenizer
    from pydiffusion.vision.prompt import Prompt


class Answer(Response):
    """Response to a request."""

    def __init__(
        self,
        request: Request,
        model: str,
        tokenizer: Tokenizer,
        prompts: Sequence[list[int] | Prompt],
        heads: Sequence[str] | None = None,
    ) -> None:
        """prompts: one per choice.  heads: text to prepend to each choice (echo)."""
        self._request = request
        self._tokenizer = tokenizer
        heads = heads or [""] * len(prompts)
        choices = [self._new_choice(i, len(prompts[i]), heads[i]) for i in range(len(prompts))]
        chat = isinstance(request, ChatRequest)
        super().__init__(
            model,
            choices,
            tokenizer,
            chat=chat,
            n_per_prompt=len(request.options),
            include_usage=request.include_usage,
        )
        self._fields["system_fingerprint"] = None
        self._n_image_tokens = sum(map(n_image_tokens, prompts[:: len(request.options)]))

    def _new_choice(self, index: int, n_prompt: int, head: str) -> Choice:
        if isinstance(self._request, ChatRequest):
            return ChatChoice(index, n_prompt, {"refusal": None}, is_named=self._request.use.is_named)
        layout = self._request.layout
        if layout is None:
            return TextChoice(index, n_prompt, head)
        suffixed = not isinstance(self._request, InfillRequest)
        stops = self._request.hole_stops
        return FilledChoice(index, n_prompt, layout, self._tokenizer, head, suffixed=suffixed, stops=stops)

    def _usage(self) -> Json:
        usage = super()._usage()
        thoughts = [choice.reasoning for choice in self._choices]
        n_thought = sum(len(self._tokenizer.tokenize(text, add_bos=False)) for text in thoughts if text)
        details = {"cached_tokens": sum(choice.n_cached for choice in self._prompts())}
        if self._n_image_tokens:
            details["image_tokens"] = self._n_image_tokens
        return usage | {
            "prompt_tokens_details": details,
            "completion_tokens_details": {"reasoning_tokens": min(n_thought, usage["completion_tokens"])},
        }

    def _figures(self) -> Json:
        ends = [choice.end for choice in self._choices if choice.end is not None]
        unenforced, lora = self._request.unenforced, self._request.lora
        return {
            "type": "summary",
            "steps": sum(sum(choice.canvas_steps) for choice in self._choices),
            "canvas_steps": [choice.canvas_steps for choice in self._choices],
            "seeds": [end.seed for end in ends],
            "finish_reasons": [end.reason for end in ends],
            "timings": self._timings(),
            "ignored_parameters": self._request.ignored,
            **({"unenforced": unenforced} if unenforced else {}),
            **({} if lora is None else {"lora": lora.shown}),
        }
