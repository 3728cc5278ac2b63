"""Parse request bodies; ``fields`` tells which fields are used, refused by name, or listed as ignored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydiffusion.chat.image_parts import ImageRules
from pydiffusion.chat.messages import template_variables
from pydiffusion.errors import OptionError
from pydiffusion.options import GenerationOptions, ResolvedOptions

from .errors import from_exception, invalid
from .fields import SortedFields, sort_fields
from .lora import Chosen, LoadedAdapters, check_name
from .messages import check_messages
from .parameters import no_thinking, token_limit, with_temperature
from .response_format import CONSTRAINT_FIELDS, constraint_options, infill_layout, suffix_layout
from .tool_choice import ToolUse, tool_use

if TYPE_CHECKING:
    from pydiffusion.generation.infill import Layout
    from pydiffusion.model import DiffusionModel

MAX_CHOICES = 16
MAX_STOPS = 256
_DEFAULT_LIMIT = 256  # tokens of a completion
_ANY_SEED = -1  # for llama.cpp and its clients: draw one

_DIFFUSION = (
    "steps", "t_min", "t_max", "entropy_bound", "stability_threshold", "confidence_threshold",
)  # fmt: skip
_STREAM_OPTIONS = ("include_usage", "include_obfuscation", "diffusion")
_ALL = ("model", "lora", "stream", "stream_options", "seed", "temperature", *_DIFFUSION)
_LIMITS = ("thinking_budget", "stop_on_repetition", "trim_after_eos")
_COMMON = (
    *_ALL, *_LIMITS, "n", "stop", "stop_token_ids", "ignore_eos", "max_tokens", "max_completion_tokens",
    "response_format", *CONSTRAINT_FIELDS,
)  # fmt: skip
_CHAT = (
    *_COMMON, "messages", "tools", "tool_choice", "parallel_tool_calls",
    "reasoning_effort", "enable_thinking", "chat_template_kwargs",
)  # fmt: skip
_COMPLETION = (*_COMMON, "prompt", "echo", "suffix", "special", "add_special_tokens")
_INFILL = (*_ALL, "text", "instruction", "hole_tokens")
ENDPOINTS = {
    "/v1/chat/completions": _CHAT,
    "/v1/completions": _COMPLETION,
    "/v1/infill": _INFILL,
}
# Of a server: a client sends the bytes of its images.
_NO_FILES = ImageRules(
    files=False,
    how_to_permit="send a data URL (data:image/png;base64,...), or start it with --allow-image-urls",
)
_NO_THINKING = ("none",)
_EFFORTS = (*_NO_THINKING, "minimal", "low", "medium", "high", "xhigh")


@dataclass
class Request:
    """A validated request; ``options`` has one entry per choice of each prompt.

    layout: the text around the answer, which the prompt's run has to hold.
    unenforced: constraints of a schema that the answer may violate.
    hole_stops: strings that end the hole of such a layout.
    lora: its adapters, None where none are loaded.
    """

    stream: bool
    include_usage: bool
    drafts: bool
    options: list[ResolvedOptions]
    ignored: list[str]
    layout: Layout | None = field(default=None, kw_only=True)
    unenforced: tuple[str, ...] = field(default=(), kw_only=True)
    hole_stops: tuple[str, ...] = field(default=(), kw_only=True)
    lora: Chosen | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class Terms:
    """Terms on which requests are accepted.

    names: of its model, the first for responses; any other name stands for it too.
    strict: refuse such names, and fields without effect.
    special: control tokens spelled out in prompt texts are such by default.
    images: which images messages may name without sending them.
    adapters: which requests may choose.
    """

    names: tuple[str, ...]
    strict: bool = False
    special: bool = False
    images: ImageRules = _NO_FILES
    adapters: LoadedAdapters = field(default_factory=LoadedAdapters)


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
    """parse_special: control tokens spelled out in prompt texts are such.  add_bos: None as the file asks."""

    prompts: list[str | list[int]]
    echo: bool = False
    parse_special: bool = False
    add_bos: bool | None = None


@dataclass
class InfillRequest(Request):
    prompt: list[int]
    layout: Layout = field(kw_only=True)


def chat_request(body: Any, model: DiffusionModel, terms: Terms) -> ChatRequest:
    """Validate the body of /v1/chat/completions. Raises ApiError."""
    found = _sorted(body, "/v1/chat/completions", terms)
    fields = found.given
    with found.blaming():
        variables = _template_variables(fields)
        use = _tool_use(fields, variables)
        variables["tools"] = use.shown
        if use.constraint:
            if "function_calls" not in use.constraint:  # which says itself whether the model may think
                _without_thinking(variables)
        elif variables.get("enable_thinking") is False:
            fields = no_thinking(model, fields)
        lora = terms.adapters.chosen(fields)
        options = _options(fields, model, use.constraint, lora)
        return ChatRequest(
            **_stream_options(fields),
            options=options,
            unenforced=_unenforced(options[0], model),
            ignored=found.ignored,
            messages=check_messages(fields.get("messages"), terms.images),
            variables=variables,
            use=use,
            lora=lora,
        )


def completion_request(body: Any, model: DiffusionModel, terms: Terms) -> CompletionRequest:
    """Validate the body of /v1/completions. Raises ApiError."""
    found = _sorted(body, "/v1/completions", terms)
    fields = found.given
    with found.blaming():
        prompts = _prompts(fields.get("prompt"), model)
        lora = terms.adapters.chosen(fields)
        layout = suffix_layout(model, fields)
        if layout is not None:
            options = _options_around(fields, model, lora)
        elif "max_completion_tokens" in fields:
            options = _options(fields, model, constraint_options(fields), lora)
        else:
            limited = {"max_tokens": _DEFAULT_LIMIT, **fields}
            options = _options(limited, model, constraint_options(fields), lora)
        if len(prompts) * len(options) > MAX_CHOICES:
            n = len(prompts) * len(options)
            raise invalid(f"prompts times n is {n}; permitted are {MAX_CHOICES}", "n")
        return CompletionRequest(
            **_stream_options(fields),
            options=options,
            unenforced=_unenforced(options[0], model),
            ignored=found.ignored,
            prompts=prompts,
            echo=_flag(fields, "echo", False),
            layout=layout,
            hole_stops=() if layout is None else _stops(fields),
            lora=lora,
            parse_special=_flag(fields, "special", terms.special),
            add_bos=None if _flag(fields, "add_special_tokens", True) else False,
        )


def _unenforced(options: ResolvedOptions, model: DiffusionModel) -> tuple[str, ...]:
    """Of a schema that is refused, nothing: compiling it says why."""
    try:
        return model.unenforced(options)
    except OptionError:
        return ()


def infill_request(body: Any, model: DiffusionModel, terms: Terms) -> InfillRequest:
    """Validate the body of /v1/infill. Raises ApiError."""
    found = _sorted(body, "/v1/infill", terms)
    fields = found.given
    with found.blaming():
        layout, prompt = infill_layout(model, fields)
        lora = terms.adapters.chosen(fields)
        return InfillRequest(
            **_stream_options(fields),
            options=_options_around(fields, model, lora),
            ignored=found.ignored,
            prompt=prompt,
            layout=layout,
            lora=lora,
        )


def _sorted(body: Any, path: str, terms: Terms) -> SortedFields:
    found = sort_fields(body, ENDPOINTS[path], ENDPOINTS, strict=terms.strict)
    _check_model(found.given, terms)
    _sort_stream_options(found, strict=terms.strict)
    return found


def _sort_stream_options(found: SortedFields, *, strict: bool) -> None:
    """Some clients send stream_options with every request, and some an option of vLLM's in it."""
    given = found.given.get("stream_options")
    if given and found.given.get("stream", False) is False:
        del found.given["stream_options"]
        found.ignore("stream_options", strict=strict)
    elif isinstance(given, dict):
        for name in sorted(set(given) - set(_STREAM_OPTIONS)):
            found.ignore(f"stream_options.{name}", strict=strict)


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


def _check_model(fields: Mapping[str, Any], terms: Terms) -> None:
    name = fields.get("model", terms.names[0])
    if not isinstance(name, str):
        raise invalid("model must be a string", "model", "invalid_type")
    if terms.strict:
        check_name(name, terms.names, terms.adapters)


def _stream_options(fields: Mapping[str, Any]) -> dict[str, Any]:
    stream = _flag(fields, "stream", False)
    given = fields.get("stream_options", {})
    if not isinstance(given, dict):
        raise invalid("stream_options must be an object", "stream_options", "invalid_type")
    return {
        "stream": stream,
        "include_usage": _flag(given, "include_usage", False),
        "drafts": _flag(given, "diffusion", False),
    }


def _options(
    fields: Mapping[str, Any], model: DiffusionModel, constraint: Mapping[str, Any], lora: Chosen | None
) -> list[ResolvedOptions]:
    """The options of each choice."""
    choices = {**constraint, **_lora_option(lora), "stop": _stops(fields)}
    try:
        limits = fields.get("max_tokens"), fields.get("max_completion_tokens")
        choices["max_tokens"] = token_limit(model, *limits)
        choices["eos"] = _end_ids(fields, model, constrained=bool(constraint))
        return list(_each_choice(fields, choices, model))
    except OptionError as error:
        raise from_exception(error) from None


def _options_around(
    fields: Mapping[str, Any], model: DiffusionModel, lora: Chosen | None
) -> list[ResolvedOptions]:
    """Options of each choice of a request with a layout, which sets the rest."""
    for name in ("response_format", *CONSTRAINT_FIELDS, "stop_token_ids", "ignore_eos", *_LIMITS):
        if fields.get(name) not in (None, [], False, "", {"type": "text"}):
            raise invalid(f"{name} can't be combined with suffix by this server", name, "unsupported_value")
    try:
        return list(_each_choice(fields, _lora_option(lora), model))
    except OptionError as error:
        raise from_exception(error) from None


def _lora_option(lora: Chosen | None) -> dict[str, Any]:
    return {} if lora is None else {"lora": lora.applied}


def _stops(fields: Mapping[str, Any]) -> tuple[str, ...]:
    stop = fields.get("stop", ())
    if isinstance(stop, list) and len(stop) > MAX_STOPS:
        raise invalid(f"stop has {len(stop)} strings; permitted are {MAX_STOPS}", "stop")
    try:
        return GenerationOptions(stop=() if stop == "" else stop).stop  # type: ignore[return-value]
    except OptionError as error:
        raise from_exception(error) from None


def _end_ids(
    fields: Mapping[str, Any], model: DiffusionModel, *, constrained: bool
) -> tuple[int, ...] | None:
    """Ids that end the text: the file's, unless ignored, and the request's; None: the file's."""
    more = fields.get("stop_token_ids", [])
    if not isinstance(more, list):
        raise invalid("stop_token_ids must be an array of token ids", "stop_token_ids", "invalid_type")
    ignored = _flag(fields, "ignore_eos", False)
    if constrained and (more or ignored):
        name = "stop_token_ids" if more else "ignore_eos"
        raise invalid(f"{name} can't be combined with a constrained answer", name, "unsupported_value")
    return (*(() if ignored else model.tokenizer.end_ids), *more) if more or ignored else None


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
    choices["seed"] = None if seed == _ANY_SEED else seed
    choices = with_temperature(choices, fields.get("temperature"), model)
    seed = choices.pop("seed")
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
