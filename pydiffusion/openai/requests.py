"""Parse request bodies: every field is used, rejected by name, or listed as ignored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydiffusion.chat.messages import template_variables
from pydiffusion.errors import OptionError
from pydiffusion.options import GenerationOptions, ResolvedOptions

from .errors import ApiError, from_exception, invalid
from .messages import check_messages
from .parameters import no_thinking, token_limit
from .response_format import CONSTRAINT_FIELDS, constraint_options, infill_layout, suffix_layout
from .tool_choice import ToolUse, tool_use

if TYPE_CHECKING:
    from pydiffusion.generation.infill import Layout
    from pydiffusion.model import DiffusionModel

MAX_CHOICES = 16
MAX_STOPS = 16

# Sent by most clients by default; they have no meaning for a diffusion sampler.
IGNORED: dict[str, tuple[type, ...]] = {
    "temperature": (int, float),
    "top_p": (int, float),
    "top_k": (int, float),
    "min_p": (int, float),
    "presence_penalty": (int, float),
    "frequency_penalty": (int, float),
    "repetition_penalty": (int, float),
    "user": (str,),
    "metadata": (dict,),
    "store": (bool,),
    "service_tier": (str,),
    "safety_identifier": (str,),
    "prompt_cache_key": (str,),
    "prompt_cache_retention": (str,),
    "verbosity": (str,),
}

# Fields of OpenAI's API that are not supported: allowed only with values that request nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "functions": (),
    "function_call": (),
    "best_of": (1,),
}

_DIFFUSION = (
    "steps", "t_min", "t_max", "entropy_bound", "stability_threshold", "confidence_threshold",
)  # fmt: skip
_ALL = ("model", "stream", "stream_options", "seed", *_DIFFUSION)
_LIMITS = ("thinking_budget", "stop_on_repetition", "trim_after_eos")
_COMMON = (*_ALL, *_LIMITS, "n", "stop", "max_tokens", "response_format", *CONSTRAINT_FIELDS)
_CHAT = (
    *_COMMON, "messages", "max_completion_tokens", "tools", "tool_choice", "parallel_tool_calls",
    "reasoning_effort", "enable_thinking", "chat_template_kwargs",
)  # fmt: skip
_COMPLETION = (*_COMMON, "prompt", "echo", "suffix")
_INFILL = (*_ALL, "text", "instruction", "hole_tokens")
_NO_THINKING = ("none",)
_EFFORTS = (*_NO_THINKING, "minimal", "low", "medium", "high", "xhigh")


@dataclass
class Request:
    """A validated request; ``options`` has one entry per choice of each prompt.

    layout: the text around the answer, which the prompt's run has to hold.
    """

    stream: bool
    include_usage: bool
    drafts: bool
    options: list[ResolvedOptions]
    ignored: list[str]
    layout: Layout | None = field(default=None, kw_only=True)


@dataclass
class ChatRequest(Request):
    messages: list[dict[str, Any]]
    variables: dict[str, Any] = field(default_factory=dict)  # template variables
    use: ToolUse = field(default_factory=ToolUse)

    @property
    def one_call(self) -> bool:
        """Whether to cut the answer after its first call."""
        return self.use.cuts_after_call


@dataclass
class CompletionRequest(Request):
    prompts: list[str | list[int]]
    echo: bool = False


@dataclass
class InfillRequest(Request):
    prompt: list[int]
    layout: Layout = field(kw_only=True)


def chat_request(body: Any, model: DiffusionModel, names: tuple[str, ...]) -> ChatRequest:
    """Validate the body of /v1/chat/completions. Raises ApiError."""
    fields, ignored = _fields(body, _CHAT)
    _check_model(fields, names)
    variables = _template_variables(fields)
    use = _tool_use(fields, variables)
    variables["tools"] = use.shown
    if use.constraint:
        if "function_calls" not in use.constraint:  # which says itself whether the model may think
            _without_thinking(variables)
    elif variables.get("enable_thinking") is False:
        fields = no_thinking(model, fields)
    return ChatRequest(
        **_stream_options(fields),
        options=_options(fields, model, use.constraint),
        ignored=ignored,
        messages=check_messages(fields.get("messages")),
        variables=variables,
        use=use,
    )


def completion_request(body: Any, model: DiffusionModel, names: tuple[str, ...]) -> CompletionRequest:
    """Validate the body of /v1/completions. Raises ApiError."""
    fields, ignored = _fields(body, _COMPLETION)
    _check_model(fields, names)
    prompts = _prompts(fields.get("prompt"), model)
    layout = suffix_layout(model, fields)
    if layout is None:
        options = _options({"max_tokens": 256, **fields}, model, constraint_options(fields))
    else:
        options = _options_around(fields, model)
    if len(prompts) * len(options) > MAX_CHOICES:
        raise invalid(f"prompts times n is {len(prompts) * len(options)}; permitted are {MAX_CHOICES}", "n")
    return CompletionRequest(
        **_stream_options(fields),
        options=options,
        ignored=ignored,
        prompts=prompts,
        echo=_flag(fields, "echo", False),
        layout=layout,
    )


def infill_request(body: Any, model: DiffusionModel, names: tuple[str, ...]) -> InfillRequest:
    """Validate the body of /v1/infill. Raises ApiError."""
    fields, ignored = _fields(body, _INFILL)
    _check_model(fields, names)
    layout, prompt = infill_layout(model, fields)
    return InfillRequest(
        **_stream_options(fields),
        options=_options_around(fields, model),
        ignored=ignored,
        prompt=prompt,
        layout=layout,
    )


def _tool_use(fields: Mapping[str, Any], variables: Mapping[str, Any]) -> ToolUse:
    thinking = variables.get("enable_thinking")
    try:
        return tool_use(
            fields.get("tools"),
            fields.get("tool_choice"),
            parallel=_flag(fields, "parallel_tool_calls", True),
            constraint=constraint_options(fields),
            thinking=thinking if isinstance(thinking, bool) else None,
        )
    except OptionError as error:
        raise from_exception(error) from None


def _without_thinking(variables: dict[str, Any]) -> None:
    """Switch thinking off for an answer that follows a format."""
    if variables.get("enable_thinking"):
        raise invalid(
            "response_format can't be combined with thinking by this server: all of an answer follows it",
            "response_format",
        )
    variables["enable_thinking"] = False


def _fields(body: Any, known: tuple[str, ...]) -> tuple[dict[str, Any], list[str]]:
    """The fields with a value, and the names of those that are ignored."""
    if not isinstance(body, dict):
        raise invalid("The body must be a JSON object.")
    fields: dict[str, Any] = {}
    ignored: list[str] = []
    for name, value in body.items():
        if value is None:
            continue
        if name in known:
            fields[name] = value
        elif name in IGNORED:
            if not isinstance(value, IGNORED[name]):
                raise invalid(f"{name} has a value of the wrong type: {value!r}"[:200], name, "invalid_type")
            ignored.append(name)
        elif name in UNSUPPORTED:
            if value not in UNSUPPORTED[name]:
                raise invalid(
                    f"{name} is not supported by this server with the value {value!r}"[:200],
                    name,
                    "unsupported_parameter",
                )
        else:
            raise invalid(f"Unrecognized request argument supplied: {name}"[:200], name, "unknown_parameter")
    return fields, ignored


def _check_model(fields: Mapping[str, Any], names: tuple[str, ...]) -> None:
    name = fields.get("model", names[0])
    if not isinstance(name, str):
        raise invalid("model must be a string", "model", "invalid_type")
    if name not in names:
        raise ApiError(
            404,
            f"The model {name!r} does not exist here; this server has {names[0]!r}."[:300],
            param="model",
            code="model_not_found",
        )


def _stream_options(fields: Mapping[str, Any]) -> dict[str, Any]:
    stream = _flag(fields, "stream", False)
    given = fields.get("stream_options", {})
    if not isinstance(given, dict):
        raise invalid("stream_options must be an object", "stream_options", "invalid_type")
    if given and not stream:
        raise invalid("stream_options is only permitted when stream is true", "stream_options")
    for name in given:
        if name not in ("include_usage", "include_obfuscation", "diffusion"):
            raise invalid(
                f"Unrecognized request argument supplied: stream_options.{name}"[:200],
                "stream_options",
                "unknown_parameter",
            )
    return {
        "stream": stream,
        "include_usage": _flag(given, "include_usage", False),
        "drafts": _flag(given, "diffusion", False),
    }


def _options(
    fields: Mapping[str, Any], model: DiffusionModel, constraint: Mapping[str, Any]
) -> list[ResolvedOptions]:
    """The options of each choice."""
    stop = fields.get("stop", ())
    if isinstance(stop, list) and len(stop) > MAX_STOPS:
        raise invalid(f"stop has {len(stop)} strings; permitted are {MAX_STOPS}", "stop")
    choices = {**constraint, "stop": stop}
    try:
        limits = fields.get("max_tokens"), fields.get("max_completion_tokens")
        choices["max_tokens"] = token_limit(model, *limits)
        return list(_each_choice(fields, choices, model))
    except OptionError as error:
        raise from_exception(error) from None


def _options_around(fields: Mapping[str, Any], model: DiffusionModel) -> list[ResolvedOptions]:
    """Options of each choice of a request with a layout, which sets the rest."""
    for name in ("stop", "response_format", *CONSTRAINT_FIELDS, *_LIMITS):
        if fields.get(name) not in (None, [], "", {"type": "text"}):
            raise invalid(f"{name} can't be combined with suffix by this server", name, "unsupported_value")
    try:
        return list(_each_choice(fields, {}, model))
    except OptionError as error:
        raise from_exception(error) from None


def _each_choice(
    fields: Mapping[str, Any], choices: dict[str, Any], model: DiffusionModel
) -> Iterator[ResolvedOptions]:
    n = fields.get("n", 1)
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MAX_CHOICES:
        raise invalid(f"n is {n!r}; permitted is an integer from 1 to {MAX_CHOICES}"[:200], "n")
    seed = fields.get("seed")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or abs(seed) >= 2**64):
        raise invalid(f"seed is {seed!r}; permitted is an integer of 64 bits"[:200], "seed")
    choices = {**choices, **{name: fields[name] for name in (*_DIFFUSION, *_LIMITS) if name in fields}}
    for i in range(n):
        own_seed = None if seed is None else (seed + i) % 2**64
        yield model.resolve(GenerationOptions(**choices, seed=own_seed))


def _template_variables(fields: Mapping[str, Any]) -> dict[str, Any]:
    try:
        variables = template_variables(fields.get("chat_template_kwargs", {}))
    except ValueError as error:
        raise invalid(str(error), "chat_template_kwargs", "invalid_value") from None
    effort = fields.get("reasoning_effort")
    if effort is not None:
        if effort not in _EFFORTS:
            raise invalid(
                f"reasoning_effort is {effort!r}; permitted are {', '.join(_EFFORTS)}"[:200],
                "reasoning_effort",
            )
        variables = {"enable_thinking": effort not in _NO_THINKING, **variables}
    if "enable_thinking" in fields:
        variables = {**variables, "enable_thinking": _flag(fields, "enable_thinking", False)}
    return dict(variables)


def _prompts(prompt: Any, model: DiffusionModel) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise invalid("prompt must be a string, token ids, or an array of either", "prompt")
    if all(isinstance(entry, int) for entry in prompt):
        prompt = [prompt]
    for entry in prompt:
        if isinstance(entry, str):
            continue
        if not isinstance(entry, list) or not entry:
            raise invalid("prompt must be a string, token ids, or an array of either", "prompt")
        for token in entry:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < model.n_vocab:
                raise invalid(f"prompt holds {token!r}, which is not a token id"[:200], "prompt")
    return prompt


def _flag(fields: Mapping[str, Any], name: str, default: bool) -> bool:
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise invalid(f"{name} is {value!r}; permitted are true and false"[:200], name, "invalid_type")
    return value
