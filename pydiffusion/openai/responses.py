"""Completions in the format of OpenAI's API and llama-cpp-python: plain dicts, or an iterator of chunks.

A stream has one chunk per finished canvas (in a chat, one per part of it: reasoning, answer, tool call). A
response and the last chunk of a stream also have ``"diffusion"``: ``steps``, ``canvas_steps``, ``seed`` and
``timings``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydiffusion.chat.messages import template_variables
from pydiffusion.errors import OptionError
from pydiffusion.generation.prompt import prefilled_session
from pydiffusion.options import CONSTRAINTS, GenerationOptions, make_options

from .parameters import constraint_of, no_thinking, token_limit
from .shaper import ChatChoice, Json, Response, TextChoice
from .tool_choice import cut_after_call, tool_use

if TYPE_CHECKING:
    from pydiffusion.events import Event
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
) -> Json | Iterator[Json]:
    """Complete a prompt.

    max_tokens: None or -1 generates until eos or the end of the context.
    echo: prepend the prompt to the text.
    stream: return an iterator of chunks.
    model: model name in the response; session: see ``DiffusionModel.generate``.
    options: the other fields of GenerationOptions.
    Raises TypeError for an unknown parameter, ValueError for a value out of range.
    """
    limit = token_limit(diffusion_model, max_tokens)
    chosen = _options(options, max_tokens=limit, stop=stop, seed=seed)
    head = ""
    if echo:
        head = prompt if isinstance(prompt, str) else diffusion_model.detokenize(prompt)
    name = model or diffusion_model.name
    if stream:
        events = diffusion_model.stream(prompt, chosen, session=session)
        return _stream(_LibraryResponse(name, [TextChoice(0, 0, head)], chat=False), events)
    done = diffusion_model.generate(prompt, chosen, session=session)
    choice = TextChoice(0, done.n_prompt, head)
    choice.take_completion(done)
    return _LibraryResponse(name, [choice], chat=False).whole()


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
    response_format: Mapping[str, Any] | None = None,
    stream: bool = False,
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
    response_format: as in OpenAI's API, or with a schema as in llama-cpp-python, or with a grammar; an
        alternative to json_schema and grammar.
    Other parameters as for ``create_completion``; stop strings apply to the answer only.
    The response separates ``content``, ``reasoning_content`` and ``tool_calls``.
    """
    constraint: dict[str, Any] = {
        name: options.pop(name) for name in CONSTRAINTS if options.get(name) is not None
    }
    if response_format is not None:
        given = constraint_of(response_format)
        if given and constraint:
            other = next(iter(constraint))
            raise OptionError("response_format", f"response_format and {other} exclude each other: give one")
        constraint |= given
    variables = template_variables({} if chat_template_kwargs is None else chat_template_kwargs)
    if enable_thinking is not None:
        variables["enable_thinking"] = enable_thinking
    use = tool_use(
        tools,
        tool_choice,
        parallel=parallel_tool_calls,
        constraint=constraint,
        thinking=variables.get("enable_thinking"),
    )
    options |= use.constraint
    if variables.get("enable_thinking") is False:
        options = no_thinking(diffusion_model, options)
    limit = token_limit(diffusion_model, max_tokens, max_completion_tokens)
    chosen = _options(options, max_tokens=limit, stop=stop, seed=seed)
    if chosen.constraint is not None:
        with use.naming_tools():
            diffusion_model.automaton(chosen)
    prompt = diffusion_model.chat_prompt(messages, tools=use.shown, **variables)
    session = prefilled_session(diffusion_model, prompt, session)
    choice = ChatChoice(0, session.n_past, is_named=use.is_named)
    response = _LibraryResponse(model or diffusion_model.name, [choice], chat=True)
    # Resolved first where the end of the answer is ours, for the seed that it reports.
    resolved = diffusion_model.resolve(chosen) if use.cuts_after_call else None
    events = session.generate_chat(resolved or chosen)
    if resolved is not None:
        events = cut_after_call(events, resolved)
    if stream:
        return _stream(response, events)
    for event in events:
        response.take(0, event)
    return response.whole()


def _options(options: Mapping[str, Any], **own: Any) -> GenerationOptions:
    """own: the options that are parameters of their own. Raises TypeError for an unknown one."""
    for name in options:
        if name in _FOREIGN:
            raise TypeError(f"unknown parameter {name!r}: {_FOREIGN[name]}")
    return make_options(None, {**own, **options})


class _LibraryResponse(Response):
    """The response of one generation."""

    def _figures(self) -> Json:
        (choice,) = self._choices
        assert choice.end is not None
        return {
            "steps": sum(choice.canvas_steps),
            "canvas_steps": choice.canvas_steps,
            "seed": choice.end.seed,
            "timings": choice.end.timings,
        }


def _stream(response: Response, events: Iterator[Event]) -> Iterator[Json]:
    yield from response.opening(0)
    for event in events:
        yield from response.chunks(0, event)
