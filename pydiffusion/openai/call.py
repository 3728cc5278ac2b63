"""Parameters that ``create_completion`` and ``create_chat_completion`` have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from pydiffusion.errors import OptionError
from pydiffusion.options import CONSTRAINTS, GenerationOptions, ResolvedOptions, integer_option, make_options

from .fields import IGNORED, UNSUPPORTED
from .parameters import constraint_of, with_temperature
from .requests import MAX_CHOICES

if TYPE_CHECKING:
    from pydiffusion.model import DiffusionModel

_OWN = frozenset(field.name for field in fields(GenerationOptions))
# Beside those that the server ignores: of llama-cpp-python, without meaning for a diffusion sampler.
_IGNORED = frozenset(
    (*IGNORED, "typical_p", "tfs_z", "repeat_penalty", "mirostat_mode", "mirostat_tau", "mirostat_eta")
)
# Refused with values that request something, beside those that the server refuses.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {**UNSUPPORTED, "logits_processor": (), "stopping_criteria": ()}
_ANY_SEED = -1  # of llama.cpp: draw one
_STREAM_OPTIONS = ("include_usage", "include_obfuscation", "diffusion")


class Call:
    """A call's parameters, checked.

    options: those of GenerationOptions.  ignored: names of the parameters without effect.
    stream, include_usage, drafts: what to stream.
    """

    def __init__(
        self,
        model: DiffusionModel,
        options: Mapping[str, Any],
        n: int,
        seed: int | None,
        response_format: Mapping[str, Any] | None,
        stream: bool,
        stream_options: Mapping[str, Any] | None,
    ) -> None:
        """Raises OptionError for a value that is not permitted, TypeError for an unknown parameter."""
        self.model = model
        self.stream = stream
        self.include_usage, self.drafts = _what_to_stream(stream, stream_options)
        self.ignored = [name for name in options if name in _IGNORED and options[name] is not None]
        self.options = {name: value for name, value in options.items() if not _is_foreign(name, value)}
        self._temperature = self.options.pop("temperature", None)
        if response_format is not None:
            self.options |= _constraint(response_format, self.options)
        self._n = integer_option("n", n, 1, MAX_CHOICES)
        self._seed = None if seed == _ANY_SEED else seed

    def given(self, **own: Any) -> GenerationOptions:
        """The options given; own: more of them. Raises OptionError, TypeError for an unknown one."""
        named = {"seed": self._seed, **own, **self.options}
        return make_options(None, with_temperature(named, self._temperature, self.model))

    def each_choice(self, first: ResolvedOptions) -> list[ResolvedOptions]:
        """The options of each choice, which differ in the seed."""
        return [replace(first, seed=(first.seed + i) % 2**64) for i in range(self._n)]


def _is_foreign(name: str, value: Any) -> bool:
    """Whether it is a parameter without effect. Raises OptionError if one requests something."""
    if name in _OWN or (name not in _UNSUPPORTED and name not in _IGNORED):
        return False
    if name in _UNSUPPORTED and value is not None and value not in _UNSUPPORTED[name]:
        raise OptionError(name, f"{name} is not supported with the value {value!r}: leave it out"[:200])
    return True


def _constraint(response_format: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    meant = constraint_of(response_format)
    other = next((name for name in CONSTRAINTS if options.get(name) is not None), None)
    if meant and other is not None:
        raise OptionError("response_format", f"response_format and {other} exclude each other: give one")
    return meant


def _what_to_stream(stream: Any, given: Any) -> tuple[bool, bool]:
    """Whether to send the usage, and the drafts."""
    if given is None:
        return False, False
    if not isinstance(given, Mapping) or not set(given) <= set(_STREAM_OPTIONS):
        names = ", ".join(_STREAM_OPTIONS)
        raise OptionError("stream_options", f"stream_options is {given!r}; permitted is a dict with {names}")
    if given and not stream:
        raise OptionError("stream_options", "stream_options is only permitted with stream=True")
    return bool(given.get("include_usage")), bool(given.get("diffusion"))
