"""Completions in the format of OpenAI's API and llama-cpp-python: plain dicts, or an iterator of chunks.

A stream has one chunk per finished canvas (in a chat, one per part of it: reasoning, answer, tool call). A
response and the last chunk of a stream also have ``"diffusion"``: ``steps``, ``canvas_steps``, ``seed``,
``seeds``, ``timings``, ``ignored_parameters``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pydiffusion.errors import OptionError
from pydiffusion.events import DraftEvent
from pydiffusion.generation.infill import Layout, lay_out_suffix, prepare
from pydiffusion.generation.prompt import given_prompt, session_for
from pydiffusion.options import GenerationOptions, ResolvedOptions

from .call import Call
from .chat import ChatSettings
from .parameters import token_limit
from .reports import Prefilled, Report
from .shaper import ChatChoice, Choice, FilledChoice, Json, Response, TextChoice
from .tool_choice import ToolUse, cut_after_call

if TYPE_CHECKING:
    from pydiffusion.events import Event
    from pydiffusion.generation.image_prompt import AnyPrompt
    from pydiffusion.model import DiffusionModel
    from pydiffusion.session import Session


def create_completion(
    diffusion_model: DiffusionModel,
    prompt: str | AnyPrompt,
    /,
    *,
    suffix: str | None = None,
    max_tokens: int | None = 256,
    stop: str | Sequence[str] | None = None,
    seed: int | None = None,
    n: int = 1,
    echo: bool = False,
    response_format: Mapping[str, Any] | None = None,
    stream: bool = False,
    stream_options: Mapping[str, Any] | None = None,
    model: str | None = None,
    session: Session | None = None,
    **options: Any,
) -> Json | Iterator[Json]:
    """Complete a prompt.

    suffix: text after the completion, held on the same canvas, which limits the completion; its tokens count
        as the prompt's.
    max_tokens: None or -1 generates until eos or the end of the context.
    n: number of choices, made one after the other from one prefill; choice i has the seed ``seed + i``.
    echo: prepend the prompt to the text.
    response_format: as in OpenAI's API, or with a schema as in llama-cpp-python; an alternative to
        json_schema.
    stream: return an iterator of chunks.  stream_options: ``include_usage`` for a last chunk with the usage,
        ``diffusion`` for a chunk per denoising step.
    model: model name in the response; session: see ``DiffusionModel.generate``.
    options: the other fields of GenerationOptions (``lora`` as there, not as requests have it), and
        ``temperature`` as the server takes it. Parameters of
        OpenAI's API and of llama-cpp-python that mean nothing here are ignored, and listed in
        ``ignored_parameters``.
    Raises TypeError for an unknown parameter, ValueError for a value out of range.
    """
    call = Call(diffusion_model, options, n, seed, response_format, stream, stream_options)
    limit = token_limit(diffusion_model, max_tokens)
    read = given_prompt(diffusion_model, prompt)
    ids = read.ids
    session = session_for(diffusion_model, session)
    layout = None
    if suffix is None or suffix == "":
        chosen = diffusion_model.resolve(call.given(max_tokens=limit, stop=stop))
    else:
        layout, chosen = _around_suffix(call, suffix, limit, ids.tolist(), session.n_ctx)
    head = "" if not echo else prompt if isinstance(prompt, str) else diffusion_model.detokenize(ids)
    choices = [_text_choice(call, i, len(ids), head, layout, stop) for i in range(n)]
    return _respond(call, model, choices, _reports(call, session, read, chosen, session.generate), chat=False)


def create_chat_completion(
    diffusion_model: DiffusionModel,
    messages: Sequence[Mapping[str, Any]],
    /,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    tool_choice: str | Mapping[str, Any] | None = None,
    parallel_tool_calls: bool | None = None,
    enable_thinking: bool | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    max_tokens: int | None = None,
    max_completion_tokens: int | None = None,
    stop: str | Sequence[str] | None = None,
    seed: int | None = None,
    n: int = 1,
    response_format: Mapping[str, Any] | None = None,
    stream: bool = False,
    stream_options: Mapping[str, Any] | None = None,
    model: str | None = None,
    session: Session | None = None,
    **options: Any,
) -> Json | Iterator[Json]:
    """Answer messages, ``{"role": ..., "content": ...}``, with the model's chat template.

    tools: functions that the model may call, as in OpenAI's API, passed to the template.
    tool_choice: "auto", "none", "required" or the object that names a function. A call that is required, and
        those of functions with ``strict``, are guaranteed to satisfy their ``parameters``.
    parallel_tool_calls: False: one call at most.
    enable_thinking, chat_template_kwargs: passed to the template. With enable_thinking=False, reasoning that
        the model starts anyway is closed at once (``thinking_budget=0``).
    max_tokens, max_completion_tokens: None or -1 generates until eos or the end of the context; of both, the
        smaller applies.
    Other parameters as for ``create_completion``; stop strings apply to the answer only.
    The response separates ``content``, ``reasoning_content`` and ``tool_calls``.
    """
    call = Call(diffusion_model, options, n, seed, response_format, stream, stream_options)
    limit = token_limit(diffusion_model, max_tokens, max_completion_tokens)
    settings = ChatSettings(tools, tool_choice, parallel_tool_calls, enable_thinking, chat_template_kwargs)
    chat = settings.prepare(diffusion_model, messages, call.given(max_tokens=limit, stop=stop))
    session = session_for(diffusion_model, session)
    choices = [ChatChoice(i, len(chat.prompt), is_named=chat.use.is_named) for i in range(n)]
    reports = _reports(call, session, chat.prompt, chat.options, partial(_chat_events, session, chat.use))
    return _respond(call, model, choices, reports, chat=True)


def _around_suffix(
    call: Call, suffix: Any, limit: int, prompt: Sequence[int], n_ctx: int
) -> tuple[Layout, ResolvedOptions]:
    """The layout of a completion before a suffix, and its options."""
    if not isinstance(suffix, str):
        raise OptionError("suffix", f"suffix is {suffix!r}; permitted is a string"[:200])
    given = call.given()
    layout = lay_out_suffix(call.model, suffix, limit, call.model.resolve(given).canvas_length)
    return layout, prepare(call.model, layout, prompt, given, n_ctx)


def _text_choice(
    call: Call, index: int, n_prompt: int, head: str, layout: Layout | None, stop: Any
) -> Choice:
    if layout is None:
        return TextChoice(index, n_prompt, head)
    stops = GenerationOptions(stop=stop).stop or ()
    return FilledChoice(
        index, n_prompt, layout, call.model.tokenizer, head, suffixed=True, stops=tuple(stops)
    )


def _chat_events(session: Session, use: ToolUse, options: ResolvedOptions) -> Iterator[Event]:
    events = session.generate_chat(options)
    return cut_after_call(events, options.seed) if use.cuts_after_call else events


def _reports(
    call: Call,
    session: Session,
    prompt: AnyPrompt,
    options: ResolvedOptions,
    generate: Callable[[ResolvedOptions], Iterator[Event]],
) -> Iterator[tuple[int, Report]]:
    """The reports of each choice, with its index. The prompt is prefilled at the call.

    options: of the first choice.  generate: gives the events of a choice after the session's tokens.
    """
    n_cached = session.prefill(prompt, lora=options.lora)
    n_prompt = session.n_past

    def generated() -> Iterator[tuple[int, Report]]:
        for i, chosen in enumerate(call.each_choice(options)):
            if i:
                session.truncate(n_prompt)
            yield i, Prefilled(n_cached)
            for event in generate(chosen):
                if call.drafts or not isinstance(event, DraftEvent):
                    yield i, event

    return generated()


def _respond(
    call: Call,
    name: str | None,
    choices: Sequence[Choice],
    reports: Iterator[tuple[int, Report]],
    *,
    chat: bool,
) -> Json | Iterator[Json]:
    """name: of the model, for the response."""
    response = _LibraryResponse(call, name, choices, chat=chat)
    if call.stream:
        return _stream(response, reports)
    for i, report in reports:
        response.take(i, report)
    return response.whole()


def _stream(response: Response, reports: Iterator[tuple[int, Report]]) -> Iterator[Json]:
    for i, report in reports:
        yield from response.chunks(i, report)
    usage = response.usage_chunk()
    if usage is not None:
        yield usage


class _LibraryResponse(Response):
    """The response to a call; the figures of a single choice are not in lists."""

    def __init__(self, call: Call, name: str | None, choices: Sequence[Choice], *, chat: bool) -> None:
        super().__init__(
            name or call.model.name,
            choices,
            call.model.tokenizer,
            chat=chat,
            n_per_prompt=len(choices),
            include_usage=call.include_usage,
        )
        self._ignored = call.ignored

    def _figures(self) -> Json:
        canvas_steps = [choice.canvas_steps for choice in self._choices]
        seeds = [choice.end.seed for choice in self._choices if choice.end is not None]
        return {
            "steps": sum(map(sum, canvas_steps)),
            "canvas_steps": canvas_steps if len(canvas_steps) > 1 else canvas_steps[0],
            "seed": seeds[0],
            "seeds": seeds,
            "timings": self._timings(),
            "ignored_parameters": self._ignored,
        }
