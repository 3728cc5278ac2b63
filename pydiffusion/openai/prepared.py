"""Requests made ready to run: validated, prompts rendered, checked against the context."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydiffusion.chat.image_parts import ImagePartError
from pydiffusion.errors import InsufficientMemoryError, ModelFormatError, PyDiffusionError
from pydiffusion.options import ResolvedOptions

from .answers import Answer
from .errors import invalid
from .requests import (
    ChatRequest,
    CompletionRequest,
    InfillRequest,
    Request,
    Terms,
    chat_request,
    completion_request,
    infill_request,
)
from .response_format import check_constraint, held_options
from .tool_choice import ToolUse

if TYPE_CHECKING:
    from pydiffusion.model import DiffusionModel
    from pydiffusion.vision.prompt import Prompt


@dataclass(frozen=True)
class PreparedRun:
    """One choice of a request: prompt tokens and options."""

    prompt: list[int] | Prompt
    options: ResolvedOptions

    @property
    def first_ids(self) -> list[int]:
        """The prompt's first two token ids."""
        return self.prompt[:2] if isinstance(self.prompt, list) else self.prompt.ids[:2].tolist()


@dataclass(frozen=True)
class Prepared:
    """A request, its runs (one per choice), and the answer that their reports are to fill."""

    request: Request
    runs: list[PreparedRun]
    answer: Answer


def prepare_chat(body: Any, model: DiffusionModel, terms: Terms) -> Prepared:
    """Of /v1/chat/completions. terms: of the server. Raises ApiError."""
    request: ChatRequest = chat_request(body, model, terms)
    try:
        prompt = model.chat_prompt(request.messages, **request.variables)
    except (InsufficientMemoryError, ModelFormatError):  # the vision file's
        raise
    except ImagePartError as error:
        raise invalid(str(error), error.where) from None
    except (PyDiffusionError, ValueError) as error:  # refused by the template, as a rule
        raise invalid(str(error), "messages") from None
    check_room(model, prompt, "messages")
    check_constraint(model, request.options[0], len(prompt), request.use)
    runs = [PreparedRun(prompt, options) for options in request.options]
    return _prepared(request, model, terms, runs)


def prepare_completion(body: Any, model: DiffusionModel, terms: Terms) -> Prepared:
    """Of /v1/completions. Raises ApiError."""
    request: CompletionRequest = completion_request(body, model, terms)
    runs, heads = [], []
    for prompt in request.prompts:
        try:
            tokens = _tokenize(model, prompt, request) if isinstance(prompt, str) else prompt
        except (PyDiffusionError, ValueError) as error:
            raise invalid(str(error), "prompt") from None
        check_room(model, tokens, "prompt")
        text = prompt if isinstance(prompt, str) else model.detokenize(tokens)
        heads += [text if request.echo else ""] * len(request.options)
        options = request.options
        if request.layout is None:
            check_constraint(model, options[0], len(tokens), ToolUse())
        else:
            options = held_options(model, request.layout, tokens, options)
        runs += [PreparedRun(tokens, each) for each in options]
    return _prepared(request, model, terms, runs, heads)


def _tokenize(model: DiffusionModel, text: str, request: CompletionRequest) -> list[int]:
    return model.tokenize(text, add_bos=request.add_bos, parse_special=request.parse_special)


def prepare_infill(body: Any, model: DiffusionModel, terms: Terms) -> Prepared:
    """Of /v1/infill. Raises ApiError."""
    request: InfillRequest = infill_request(body, model, terms)
    check_room(model, request.prompt, "text")
    options = held_options(model, request.layout, request.prompt, request.options)
    return _prepared(request, model, terms, [PreparedRun(request.prompt, each) for each in options])


#: By the path of an endpoint.
PREPARE: Mapping[str, Any] = {
    "/v1/chat/completions": prepare_chat,
    "/v1/completions": prepare_completion,
    "/v1/infill": prepare_infill,
}


def check_room(model: DiffusionModel, tokens: list[int] | Prompt, param: str) -> None:
    """Raise ApiError for a prompt that is empty, leaves no room for a canvas, or has a place for an image and
    no image. param: its field.
    """
    room = model.n_ctx - model.canvas_length
    if len(tokens) == 0:
        raise invalid(f"{param} has no tokens", param)
    if len(tokens) > room:
        raise invalid(
            f"The context is {model.n_ctx} tokens, of which a canvas takes {model.canvas_length}: {param}"
            f" resulted in {len(tokens)} tokens, and {room} fit.",
            param,
            "context_length_exceeded",
        )
    if isinstance(tokens, list) and model.vision is not None:
        token = model.native.image_tokens["image"]
        if token in tokens:
            raise invalid(
                f"{param} has the image token, {token}, at {tokens.index(token)} and no image for it: send"
                " images as parts of messages to /v1/chat/completions",
                param,
            )


def _prepared(
    request: Request,
    model: DiffusionModel,
    terms: Terms,
    runs: list[PreparedRun],
    heads: list[str] | None = None,
) -> Prepared:
    prompts = [run.prompt for run in runs]
    named = None if request.lora is None else request.lora.name
    return Prepared(request, runs, Answer(request, named or terms.names[0], model.tokenizer, prompts, heads))
