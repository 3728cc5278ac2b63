"""Completions in the format of OpenAI's API and llama-cpp-python: plain dicts, or an iterator of chunks.

A stream has one chunk per finished canvas (in a chat, one per part of it: reasoning, answer, tool call). A
response and the last chunk of a stream also have ``"diffusion"``: ``steps``, ``canvas_steps``, ``seed`` and
``timings``.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydiffusion.chat.messages import template_variables
from pydiffusion.chat.output_parser import Content, Part, Reasoning
from pydiffusion.errors import OptionError
from pydiffusion.events import CanvasEvent, DraftEvent, EndEvent, Event
from pydiffusion.generation.prompt import prefilled_session
from pydiffusion.generation.thinking_budget import can_think
from pydiffusion.options import GenerationOptions, integer_option, make_options

if TYPE_CHECKING:
    from pydiffusion.generation.token_ids import TokenIds
    from pydiffusion.model import DiffusionModel
    from pydiffusion.session import Session

# Parameters of other libraries, and what to use instead.
_FOREIGN = {
    "temperature": "a diffusion sampler has t_min and t_max",
    "top_p": "a diffusion sampler has entropy_bound",
    "top_k": "a diffusion sampler has entropy_bound",
    "min_p": "a diffusion sampler has entropy_bound",
    "n": "one answer is made per call; call again with another seed",
}
FINISH_REASONS = {
    "eos": "stop", "stop": "stop", "repetition": "stop", "length": "length", "context": "length",
}  # fmt: skip

# JSON mode, which predates schemas: any object.
_JSON_OBJECT = {"type": "object"}
# response_format type -> other allowed fields.
_FORMAT_TO_FIELDS = {"text": (), "json_object": ("schema",), "json_schema": ("json_schema",)}

Chunk = dict[str, Any]


def create_completion(
    diffusion_model: DiffusionModel,
    prompt: str | TokenIds,
    /,
    *,
    max_tokens: int | None = 256,
    stop: str | Sequence[str] | None = None,
    seed: int | None = None,
    echo: bool = False,
    stream: bool = False,
    model: str | None = None,
    session: Session | None = None,
    **options: Any,
) -> Chunk | Iterator[Chunk]:
    """Complete a prompt.

    max_tokens: None or -1 generates until eos or the end of the context.
    echo: prepend the prompt to the text.
    stream: return an iterator of chunks.
    model: model name in the response; session: see ``DiffusionModel.generate``.
    options: the other fields of GenerationOptions.
    Raises TypeError for an unknown parameter, ValueError for a value out of range.
    """
    chosen = _options(diffusion_model, max_tokens, stop, seed, options)
    frame = _Frame("cmpl", "text_completion", "text_completion", model or diffusion_model.name)
    head = ""
    if echo:
        head = prompt if isinstance(prompt, str) else diffusion_model.detokenize(prompt)

    def choice(text: str, finish_reason: str | None) -> dict[str, Any]:
        return {"text": text, "index": 0, "logprobs": None, "finish_reason": finish_reason}

    if stream:
        events = diffusion_model.stream(prompt, chosen, session=session)
        return _stream(frame, events, head, choice)
    done = diffusion_model.generate(prompt, chosen, session=session)
    figures = {
        "steps": done.steps,
        "canvas_steps": list(done.canvas_steps),
        "seed": done.seed,
        "timings": done.timings,
    }
    finished = choice(head + done.text, FINISH_REASONS[done.finish_reason])
    return frame.answer(finished, done.n_prompt, len(done.tokens), figures)


def create_chat_completion(
    diffusion_model: DiffusionModel,
    messages: Sequence[Mapping[str, Any]],
    /,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    enable_thinking: bool | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    max_tokens: int | None = None,
    max_completion_tokens: int | None = None,
    stop: str | Sequence[str] | None = None,
    seed: int | None = None,
    response_format: Mapping[str, Any] | None = None,
    stream: bool = False,
    model: str | None = None,
    session: Session | None = None,
    **options: Any,
) -> Chunk | Iterator[Chunk]:
    """Answer messages, ``{"role": ..., "content": ...}``, with the model's chat template.

    tools, enable_thinking, chat_template_kwargs: passed to the template. With enable_thinking=False,
        reasoning that the model starts anyway is closed at once (``thinking_budget=0``).
    max_tokens, max_completion_tokens: None or -1 generates until eos or the end of the context; of both, the
        smaller applies.
    response_format: as in OpenAI's API, or with a schema as in llama-cpp-python; an alternative to
        json_schema.
    Other parameters as for ``create_completion``; stop strings apply to the answer only.
    The response separates ``content``, ``reasoning_content`` and ``tool_calls``.
    """
    max_tokens = token_limit(max_tokens, max_completion_tokens)
    if response_format is not None:
        schema = schema_of(response_format)
        if schema is not None and options.get("json_schema") is not None:
            raise OptionError(
                "response_format", "response_format and json_schema exclude each other: give one"
            )
        options["json_schema"] = options.get("json_schema") if schema is None else schema
    variables = template_variables({} if chat_template_kwargs is None else chat_template_kwargs)
    if enable_thinking is not None:
        variables["enable_thinking"] = enable_thinking
    if variables.get("enable_thinking") is False:
        options = no_thinking(diffusion_model, options)
    chosen = _options(diffusion_model, max_tokens, stop, seed, options)
    prompt = diffusion_model.chat_prompt(messages, tools=tools, **variables)
    frame = _Frame("chatcmpl", "chat.completion", "chat.completion.chunk", model or diffusion_model.name)

    session = prefilled_session(diffusion_model, prompt, session)
    n_prompt = session.n_past
    events = session.generate_chat(chosen)
    if stream:
        return _stream_chat(frame, events)
    finished = [event for event in events if not isinstance(event, DraftEvent)]
    end = finished.pop()
    assert isinstance(end, EndEvent)  # the last event, always
    canvases = [event for event in finished if isinstance(event, CanvasEvent)]
    message = ChatMessage()
    for canvas in canvases:
        for part in canvas.parts:
            message.add(part)
    choice = {"index": 0, "message": message.as_dict(), "logprobs": None}
    choice["finish_reason"] = message.finish_reason(end.reason)
    n_tokens = sum(len(canvas.tokens) for canvas in canvases)
    figures = diffusion_figures([canvas.steps for canvas in canvases], end)
    return frame.answer(choice, n_prompt, n_tokens, figures)


def token_limit(max_tokens: Any, max_completion_tokens: Any) -> int | None:
    """The smaller limit; None and -1 mean no limit. Raises OptionError for anything but an integer."""
    limits = []
    for name, value in (("max_tokens", max_tokens), ("max_completion_tokens", max_completion_tokens)):
        if value is None or value == -1:
            continue
        limits.append(integer_option(name, value))
    return min(limits, default=None)


def schema_of(response_format: Any) -> Any:
    """The JSON schema of a ``response_format``, None for any text. Raises OptionError.

    Accepts OpenAI's ``{"type": "text"}``, ``{"type": "json_object"}`` and ``{"type": "json_schema",
    "json_schema": {"schema": ...}}``, and llama.cpp's ``{"type": "json_object", "schema": ...}``.
    """
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if not isinstance(kind, str) or kind not in _FORMAT_TO_FIELDS:
        raise OptionError(
            "response_format",
            "response_format must be an object whose type is text, json_object or json_schema",
        )
    for name, value in response_format.items():
        if name != "type" and name not in _FORMAT_TO_FIELDS[kind] and value is not None:
            known = " or ".join(f"{n} of type {k}" for k, names in _FORMAT_TO_FIELDS.items() for n in names)
            raise OptionError(
                "response_format",
                f"response_format.{name} is not permitted with type {kind}; known are {known}",
            )
    if kind == "text":
        return None
    if kind == "json_object":
        where, schema = "schema", response_format.get("schema")
        if schema is None or schema == {}:  # any object
            return _JSON_OBJECT
    else:
        given = response_format.get("json_schema")
        where, schema = "json_schema.schema", given.get("schema") if isinstance(given, Mapping) else None
    if not isinstance(schema, (Mapping, bool)):
        raise OptionError("response_format", f"response_format.{where} must be a JSON schema, an object")
    return schema


def no_thinking(model: DiffusionModel, options: Mapping[str, Any]) -> dict[str, Any]:
    """Set the thinking budget to 0, unless the options set it or the model can't reason here."""
    constrained = options.get("json_schema") is not None or options.get("regex") is not None
    if constrained or not can_think(model.tokenizer):
        return dict(options)
    return {"thinking_budget": 0, **options}


def diffusion_figures(canvas_steps: list[int], end: EndEvent) -> dict[str, Any]:
    """The ``diffusion`` field of a response."""
    return {
        "steps": sum(canvas_steps),
        "canvas_steps": canvas_steps,
        "seed": end.seed,
        "timings": end.timings,
    }


class ChatMessage:
    """Accumulates an assistant message; ``add`` returns the part as a stream delta."""

    def __init__(self) -> None:
        self._content = ""
        self._reasoning = ""
        self.tool_calls: list[dict[str, Any]] = []

    def add(self, part: Part) -> dict[str, Any]:
        if isinstance(part, Content):
            self._content += part.text
            return {"content": part.text}
        if isinstance(part, Reasoning):
            self._reasoning += part.text
            return {"reasoning_content": part.text}
        call = {
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": part.name, "arguments": json.dumps(part.arguments, ensure_ascii=False)},
        }
        self.tool_calls.append(call)
        return {"tool_calls": [{"index": len(self.tool_calls) - 1, **call}]}

    @property
    def reasoning(self) -> str:
        """The reasoning so far."""
        return self._reasoning

    def as_dict(self) -> dict[str, Any]:
        """The message; content is None if there are only tool calls."""
        content = None if self.tool_calls and not self._content.strip() else self._content
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if self._reasoning:
            message["reasoning_content"] = self._reasoning
        if self.tool_calls:
            message["tool_calls"] = self.tool_calls
        return message

    def finish_reason(self, reason: str) -> str:
        """OpenAI's finish_reason for an ``EndEvent.reason``."""
        finish_reason = FINISH_REASONS[reason]
        return "tool_calls" if self.tool_calls and finish_reason == "stop" else finish_reason


def _options(
    diffusion_model: DiffusionModel,
    max_tokens: int | None,
    stop: str | Sequence[str] | None,
    seed: int | None,
    options: Mapping[str, Any],
) -> GenerationOptions:
    for name in options:
        if name in _FOREIGN:
            raise TypeError(f"unknown parameter {name!r}: {_FOREIGN[name]}")
    limit = token_limit(max_tokens, None)
    if limit is None:
        limit = diffusion_model.n_ctx_train
    return make_options(None, {"max_tokens": limit, "stop": stop, "seed": seed, **options})


class _Frame:
    """Fields shared by all chunks of a response."""

    def __init__(self, id_prefix: str, answer_object: str, chunk_object: str, model: str) -> None:
        self._fields = {"id": f"{id_prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._answer_object = answer_object
        self._chunk_object = chunk_object

    def answer(
        self, choice: dict[str, Any], n_prompt: int, n_tokens: int, figures: dict[str, Any]
    ) -> dict[str, Any]:
        usage = {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_tokens,
            "total_tokens": n_prompt + n_tokens,
        }
        fields = {"object": self._answer_object, "choices": [choice], "usage": usage, "diffusion": figures}
        return self._fields | fields

    def chunk(self, choice: dict[str, Any]) -> Chunk:
        return self._fields | {"object": self._chunk_object, "choices": [choice]}


def _stream(
    frame: _Frame, events: Iterator[Event], head: str, choice: Callable[[str, str | None], dict[str, Any]]
) -> Iterator[Chunk]:
    canvas_steps: list[int] = []
    if head:
        yield frame.chunk(choice(head, None))
    for event in events:
        if isinstance(event, CanvasEvent):
            canvas_steps.append(event.steps)
            if event.text:
                yield frame.chunk(choice(event.text, None))
        elif isinstance(event, EndEvent):
            figures = diffusion_figures(canvas_steps, event)
            yield frame.chunk(choice("", FINISH_REASONS[event.reason])) | {"diffusion": figures}


def _stream_chat(frame: _Frame, events: Iterator[Event]) -> Iterator[Chunk]:
    def choice(delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}

    canvas_steps: list[int] = []
    message = ChatMessage()
    yield frame.chunk(choice({"role": "assistant", "content": ""}))
    for event in events:
        if isinstance(event, CanvasEvent):
            canvas_steps.append(event.steps)
            for part in event.parts:
                yield frame.chunk(choice(message.add(part)))
        elif isinstance(event, EndEvent):
            figures = diffusion_figures(canvas_steps, event)
            yield frame.chunk(choice({}, message.finish_reason(event.reason))) | {"diffusion": figures}
