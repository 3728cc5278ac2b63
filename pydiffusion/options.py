"""Generation options: as a caller gives them, and resolved with the defaults of a model file."""

from __future__ import annotations

import json
import math
import operator
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from ._util.function_calls import normalized_calls
from ._util.option_hints import unknown_option
from .errors import ModelFormatError, OptionError
from .tokenizer.end_tokens import find_end_tokens

if TYPE_CHECKING:
    from .adapters.adapter import Adapter

#: Adapters to apply: sources (a path, the hub's "user/repo", or an Adapter), each alone or with its scale.
Lora: TypeAlias = "Sequence[LoraSource | tuple[LoraSource, float]]"
LoraSource: TypeAlias = "str | os.PathLike[str] | Adapter"

# The native loop takes signed 32-bit counts.
_MAX_COUNT = 2**31 - 1
_MAX_SEED = 2**64 - 1
_MAX_SCALE = 1e30  # of an adapter; scaled changes are float32

#: Options that constrain the text, of which one can be given.
Constraint: TypeAlias = Literal["json_schema", "regex", "grammar", "function_calls"]
CONSTRAINTS: tuple[Constraint, ...] = get_args(Constraint)
_CONSTRAINT_TO_WORDS = {"function_calls": "function_calls (forced or strict tool calls)"}


def _refused(name: str, value: Any, permitted: str) -> OptionError:
    return OptionError(name, f"{name} is {value!r}; permitted is {permitted}")


def integer_option(name: str, value: Any, low: int = 1, high: int = _MAX_COUNT) -> int:
    """The value as an integer from low to high. Raises OptionError for anything else."""
    permitted = f"an integer from {low} to {high}"
    if isinstance(value, bool):
        raise _refused(name, value, permitted)
    try:
        number = operator.index(value)
    except TypeError:
        raise _refused(name, value, permitted) from None
    if not low <= number <= high:
        raise _refused(name, number, permitted)
    return number


def _share(name: str, value: Any) -> float:
    number = _number(name, value)
    if number >= 1:
        raise OptionError(name, f"{name} is {number:g}; permitted is a number of at least 0 and below 1")
    return number


def _number(name: str, value: Any, low: float = 0.0) -> float:
    permitted = f"a finite number of at least {low:g}"
    if isinstance(value, (bool, str, bytes)):
        raise _refused(name, value, permitted)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise _refused(name, value, permitted) from None
    if not math.isfinite(number) or number < low:
        raise OptionError(name, f"{name} is {number:g}; permitted is {permitted}")
    return number


def _stop_strings(value: Any) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, Sequence) or isinstance(strings, bytes):
        raise _refused("stop", value, "a string or a sequence of strings")
    for string in strings:
        if not isinstance(string, str) or not string:
            raise OptionError(
                "stop", f"stop holds {string!r}; permitted are strings of at least one character"
            )
    return tuple(strings)


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    try:
        ids = [value] if hasattr(value, "__index__") else list(value)
    except TypeError:
        raise _refused(name, value, "a token id or a sequence of token ids") from None
    return tuple(integer_option(name, token_id, 0) for token_id in ids)


def _canvas(value: Any) -> tuple[int, ...]:
    """Token ids by position, -1 for none."""
    if isinstance(value, (str, bytes)):
        raise _refused("canvas", value, "a sequence of token ids, -1 for none")
    try:
        tokens = list(value)
    except TypeError:
        raise _refused("canvas", value, "a sequence of token ids, -1 for none") from None
    return tuple(-1 if token is None else integer_option("canvas", token, -1, _MAX_COUNT) for token in tokens)


def _hold(value: Any) -> tuple[bool, ...]:
    try:
        return tuple(bool(operator.index(flag)) for flag in value)
    except TypeError:
        raise _refused("hold", value, "a sequence of true and false") from None


def _json_schema(value: Any) -> str:
    """The schema as JSON, so that options stay comparable and immutable."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise OptionError("json_schema", f"json_schema is not valid JSON: {error}") from None
    if hasattr(value, "model_json_schema"):
        name = value.__name__ if isinstance(value, type) else type(value).__name__
        given = f"{name}.model_json_schema()"
        raise OptionError("json_schema", f"json_schema is a model of pydantic: give {given}")
    if not isinstance(value, (Mapping, bool)):
        raise OptionError(
            "json_schema", f"json_schema is {value!r}; permitted is an object, or its JSON"[:200]
        )
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionError("json_schema", f"json_schema can't be written as JSON: {error}") from None


def _flag(name: str, value: Any) -> bool:
    value = value.item() if hasattr(value, "item") else value  # numpy's
    if not isinstance(value, bool):
        raise OptionError(name, f"{name} is {value!r}; permitted are True and False")
    return value


def _expression(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise _refused(name, value, "a string of at least one character")
    return value


def _function_calls(value: Any) -> str:
    """The permitted calls as JSON with all fields, so that options stay comparable and immutable."""
    try:
        return json.dumps(normalized_calls(value), ensure_ascii=False)
    except (TypeError, RecursionError) as error:
        raise OptionError("function_calls", f"function_calls can't be written as JSON: {error}") from None


def lora_option(value: Any) -> tuple[tuple[LoraSource, float], ...]:
    """(source, scale) of each adapter; the scale is 1 where none is given. Raises OptionError."""
    if isinstance(value, (str, bytes, os.PathLike)) or not isinstance(value, Sequence):
        raise OptionError(
            "lora",
            f"lora is {_short(value)}; permitted is a list of adapters, each a source or (source, scale);"
            " an empty list takes all off",
        )
    return tuple(_with_scale(item) for item in value)


def _short(value: Any) -> str:
    """The value in one line of at most 100 characters."""
    return " ".join(repr(value).split())[:100]


def _with_scale(item: Any) -> tuple[LoraSource, float]:
    source, scale = item if isinstance(item, (tuple, list)) and len(item) == 2 else (item, 1.0)
    is_source = isinstance(source, (str, os.PathLike)) or hasattr(source, "fingerprint")
    if not is_source or source == "":
        raise OptionError(
            "lora",
            f"lora holds {_short(item)}; permitted are sources (a path, a repo of the hub, or an"
            " Adapter) and (source, scale)",
        )
    try:
        number = math.nan if isinstance(scale, (bool, str, bytes)) else float(scale)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= _MAX_SCALE:
        raise OptionError(
            "lora", f"lora has the scale {_short(scale)}; permitted is a finite number up to 1e30"
        )
    return source, number


# One check per option, for values from callers and from files.
_NAME_TO_CHECK: dict[str, Callable[[Any], Any]] = {
    "max_tokens": lambda value: integer_option("max_tokens", value),
    "steps": lambda value: integer_option("steps", value),
    "t_min": lambda value: _number("t_min", value),
    "t_max": lambda value: _number("t_max", value),
    "entropy_bound": lambda value: _number("entropy_bound", value),
    "stability_threshold": lambda value: integer_option("stability_threshold", value, 0),
    "confidence_threshold": lambda value: _number("confidence_threshold", value),
    "dropped_mass": lambda value: _share("dropped_mass", value),
    "canvas_length": lambda value: integer_option("canvas_length", value),
    "seed": lambda value: integer_option("seed", value, 0, _MAX_SEED),
    "stop": _stop_strings,
    "eos": lambda value: _token_ids("eos", value),
    "canvas": _canvas,
    "hold": _hold,
    "json_schema": _json_schema,
    "regex": lambda value: _expression("regex", value),
    "grammar": lambda value: _expression("grammar", value),
    "function_calls": _function_calls,
    "thinking_budget": lambda value: integer_option("thinking_budget", value, 0),
    "stop_on_repetition": lambda value: _flag("stop_on_repetition", value),
    "trim_after_eos": lambda value: _flag("trim_after_eos", value),
    "lora": lora_option,
}

# Of options that a file can't set; an option that is not here stays None.
_DEFAULTS: dict[str, Any] = {
    "max_tokens": 256,
    "dropped_mass": 1e-4,
    "stop": (),
    "canvas": (),
    "hold": (),
    "stop_on_repetition": False,
    "trim_after_eos": False,
}


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """Options of one generation. ``None`` means the file's default, else the reference's.

    max_tokens: maximum number of tokens to generate, at least 1 (reference: 256).
    steps: maximum number of denoising steps per canvas, at least 1 (48).
    t_min, t_max: temperature of the last and first step, ``0 <= t_min <= t_max``, ``t_max > 0`` (0.4, 0.8).
    entropy_bound: accept positions in order of ascending entropy while the sum of the preceding ones stays
        within this bound (0.1); 0 accepts one position per step.
    stability_threshold: stop a canvas when this many preceding steps gave the same draft (1); 0 skips the
        check.
    confidence_threshold: and when the mean entropy is below this (0.005); 0 never stops early.
    dropped_mass: probability mass of the least likely tokens that self-conditioning may drop per position, to
        save work (1e-4); 0 keeps every token, as the reference does.
    canvas_length: tokens denoised at a time; smaller is faster for short answers. Default and maximum are the
        model's own length, on which it was trained.
    seed: 0 to 2**64 - 1; ``None`` draws one, which the result reports.
    stop: string or strings at which the text is cut.
    eos: token id or ids that end the text (the file's, ``Tokenizer.end_tokens``); an empty sequence: none.
    canvas: initial token ids by position, counted over all canvases; -1 (or None), and positions beyond the
        end, start with a random token.
    hold: for each of these positions, whether it keeps its token: never renoised, never replaced.
    json_schema: a JSON schema, as an object or as JSON: the text is guaranteed to be valid against it.
    regex: a regular expression that the text is guaranteed to match in full.
    grammar: a grammar in llama.cpp's GBNF, whose rule ``root`` the text is guaranteed to match in full.
    function_calls: the tool calls that a chat's answer is guaranteed to consist of, as an object or as JSON:
        ``functions``, a list of ``{"name", "parameters"}`` with the JSON schema that arguments satisfy, or
        null for any; ``max_calls``, 1 or null for any number; ``otherwise``, what the answer may be instead:
        null for nothing, "text" for any text, also beside calls, or a JSON schema; ``reasoning``, whether it
        may reason before (false).
    thinking_budget: maximum number of reasoning tokens; reasoning beyond it is closed and the answer follows.
        ``None``: no separate limit.
    stop_on_repetition: end the text when it loops: its last 128 tokens or more are the same block repeated
        four times or more, of which the last canvas keeps only the first. ``None``: don't.
    trim_after_eos: freeze all but a few positions after an accepted eos: short answers take less time and may
        come out differently. ``None``: don't.
    lora: adapters for this generation and its prompt, each a source or ``(source, scale)``; an empty
        sequence: none. ``None``: the session's. See ``DiffusionModel.set_lora``.

    Raises OptionError for a value out of range, TypeError for an unknown option.
    """

    max_tokens: int | None = None
    steps: int | None = None
    t_min: float | None = None
    t_max: float | None = None
    entropy_bound: float | None = None
    stability_threshold: int | None = None
    confidence_threshold: float | None = None
    dropped_mass: float | None = None
    canvas_length: int | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    eos: int | Sequence[int] | None = None
    canvas: Sequence[int | None] | None = None
    hold: Sequence[bool] | None = None
    json_schema: Mapping[str, Any] | bool | str | None = None
    regex: str | None = None
    grammar: str | None = None
    function_calls: Mapping[str, Any] | str | None = None
    thinking_budget: int | None = None
    stop_on_repetition: bool | None = None
    trim_after_eos: bool | None = None
    lora: Lora | None = None

    def __post_init__(self) -> None:
        for name, check in _NAME_TO_CHECK.items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, check(value))
        _check_temperatures(self.t_min, self.t_max)
        _check_held(self.canvas or (), self.hold or ())
        _check_constraint(self)
        if self.thinking_budget is not None and self.canvas:
            raise OptionError(
                "thinking_budget", "thinking_budget can't be combined with canvas: positions would move"
            )

    def resolve(
        self, metadata: Mapping[str, Any], n_vocab: int, end_ids: Sequence[int] | None = None
    ) -> ResolvedOptions:
        """Fill in unset options from the file's defaults, else from the reference's.

        end_ids: the file's end tokens, if already known.
        Raises OptionError if options and file contradict each other, ModelFormatError for an invalid value in
        the file.
        """
        # These load the extension, which options don't need.
        from ._util.sampler_options import file_options, sampler_of

        in_file = file_options(sampler_of(metadata))
        chosen = {name: getattr(self, name) for name in _NAME_TO_CHECK}
        for name, value in chosen.items():
            if value is None:
                found = _from_file(name, *in_file[name], metadata) if name in in_file else None
                chosen[name] = _DEFAULTS.get(name) if found is None else found
        if self.seed is None:
            chosen["seed"] = secrets.randbits(32)
        if self.eos is None:
            if end_ids is None:
                end_ids = [end.token_id for end in find_end_tokens(metadata, n_vocab)]
            chosen["eos"] = tuple(end_ids)
        # Of the two temperatures, the one to name is the one that was chosen.
        given = "t_max" if self.t_min is None else "t_min"
        _check_temperatures(chosen["t_min"], chosen["t_max"], given)
        resolved = ResolvedOptions(**chosen)
        _check_token_ids(resolved, n_vocab)
        longest = _from_file("canvas_length", *in_file["canvas_length"], metadata)
        if resolved.canvas_length > longest:
            raise OptionError(
                "canvas_length",
                f"canvas_length is {resolved.canvas_length}; this model allows 1 to {longest}",
            )
        return resolved

    @property
    def is_structured(self) -> bool:
        """Whether the text is constrained by a schema, an expression, a grammar or permitted calls."""
        return self.constraint is not None

    @property
    def constraint(self) -> Constraint | None:
        """The option that constrains the text, or None."""
        return next((name for name in CONSTRAINTS if getattr(self, name) is not None), None)

    @property
    def may_reason(self) -> bool:
        """Whether an answer may contain reasoning, as its constraint permits."""
        if self.function_calls is not None:
            assert isinstance(self.function_calls, str)  # __post_init__
            return bool(json.loads(self.function_calls)["reasoning"])
        return self.constraint is None


@dataclass(frozen=True, kw_only=True)
class ResolvedOptions(GenerationOptions):
    """Options of one generation with one model, nothing left open; ``GenerationOptions.resolve`` makes them.

    ``None`` is a value of the constraints and thinking_budget (there is none) and of lora (the session's).
    """

    # field(): a field without a default, where the base class has one.
    max_tokens: int = field()
    steps: int = field()
    t_min: float = field()
    t_max: float = field()
    entropy_bound: float = field()
    stability_threshold: int = field()
    confidence_threshold: float = field()
    dropped_mass: float = field()
    canvas_length: int = field()
    seed: int = field()
    stop: tuple[str, ...] = field()
    eos: tuple[int, ...] = field()
    canvas: tuple[int, ...] = field()
    hold: tuple[bool, ...] = field()
    stop_on_repetition: bool = field()
    trim_after_eos: bool = field()
    json_schema: str | None = field()
    regex: str | None = field()
    grammar: str | None = field()
    function_calls: str | None = field()
    thinking_budget: int | None = field()
    lora: tuple[tuple[LoraSource, float], ...] | None = field()


def _check_temperatures(t_min: float | None, t_max: float | None, param: str = "t_min") -> None:
    """param: the one to name in an error about both."""
    if t_max is not None and t_max == 0:
        raise OptionError("t_max", "t_max is 0; permitted is a finite number above 0")
    if t_min is not None and t_max is not None and t_min > t_max:
        raise OptionError(param, f"t_min is {t_min:g} and t_max is {t_max:g}; permitted is t_min <= t_max")


def _check_held(canvas: Sequence[Any], hold: Sequence[Any]) -> None:
    if len(hold) > len(canvas):
        raise OptionError(
            "hold", f"hold has {len(hold)} position(s) and canvas {len(canvas)}: give a token for each"
        )
    for i, held in enumerate(hold):
        if held and canvas[i] == -1:
            raise OptionError("hold", f"hold has position {i}, for which canvas has no token")


def _check_constraint(options: GenerationOptions) -> None:
    if not options.is_structured:
        return
    given = [name for name in CONSTRAINTS if getattr(options, name) is not None]
    if len(given) > 1:
        raise OptionError(given[0], f"{' and '.join(given)} exclude each other: give one")
    for name in ("stop", "canvas", "hold", "thinking_budget", "stop_on_repetition"):
        if getattr(options, name) not in (None, (), False):
            constraint = _CONSTRAINT_TO_WORDS.get(options.constraint or "", options.constraint)
            raise OptionError(
                name, f"{name} can't be combined with {constraint}: the text could not be kept whole"
            )


def _check_token_ids(options: ResolvedOptions, n_vocab: int) -> None:
    for name, ids in (("eos", options.eos), ("canvas", options.canvas)):
        for token_id in ids:
            if token_id >= n_vocab:
                raise OptionError(
                    name, f"{name} holds {token_id}; permitted are token ids from 0 to {n_vocab - 1}"
                )


def _from_file(name: str, key: str | None, reference: Any, metadata: Mapping[str, Any]) -> Any:
    """The file's default of an option, else the reference's. Raises ModelFormatError for an invalid one."""
    if key is None or key not in metadata:
        return reference
    try:
        return _NAME_TO_CHECK[name](metadata[key])
    except ValueError as error:
        raise ModelFormatError(f"{key}: {error}") from None


# Measured (docs/denoising-options.md): with the schedule scaled by less, answers get worse. A low temperature
# also lowers the entropies by which positions are accepted, so the first steps accept what they should not.
_LOWEST_FACTOR = 0.5
_MAX_TEMPERATURE = 100.0


def at_temperature(temperature: float, metadata: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The keywords of GenerationOptions that a caller's temperature means.

    It scales t_min and t_max: 1 is the schedule of the file, whose metadata is given, else of the reference.
    Values below 0.5 scale as 0.5 does. 0 also sets a seed, so equal requests get equal texts.
    Raises OptionError for anything but a number from 0 to 100.
    """
    from ._util.sampler_options import file_options, sampler_of  # loads the extension

    given = _number("temperature", temperature)
    if given > _MAX_TEMPERATURE:
        raise _refused("temperature", temperature, f"a number from 0 to {_MAX_TEMPERATURE:g}")
    metadata = metadata or {}
    in_file = file_options(sampler_of(metadata))
    schedule = {name: _from_file(name, *in_file[name], metadata) for name in ("t_min", "t_max")}
    scaled = {name: value * max(given, _LOWEST_FACTOR) for name, value in schedule.items()}
    return scaled if given else {**scaled, "seed": 0}


def make_options(options: GenerationOptions | None, keywords: Mapping[str, Any]) -> GenerationOptions:
    """Return ``options``, or build them from keywords; TypeError for both at once or an unknown keyword."""
    if options is None:
        unknown = sorted(set(keywords) - set(_NAME_TO_CHECK))
        if unknown:
            raise TypeError(unknown_option(unknown[0], _NAME_TO_CHECK))
        return GenerationOptions(**keywords)
    if not isinstance(options, GenerationOptions):
        raise TypeError(f"options must be GenerationOptions, not {type(options).__name__}")
    if keywords:
        raise TypeError(f"give GenerationOptions or keywords, not both: {', '.join(sorted(keywords))}")
    return options
