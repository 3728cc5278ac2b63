"""Adapters that requests choose: by id and scale as llama.cpp's server has them, or as ``model`` by name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydiffusion.errors import OptionError
from pydiffusion.options import lora_option

from .errors import ApiError, invalid

if TYPE_CHECKING:
    from pydiffusion.adapters.adapter import Adapter

Json = dict[str, Any]

FIELD = "lora"
# Of an entry: what GET /lora-adapters shows besides may be sent back with another scale.
_ENTRY = ("id", "scale", "name", "path")


@dataclass(frozen=True)
class NamedAdapter:
    """A loaded adapter. id: from 0, in the order in which they were given.

    name: no other one's, nor the model's. scale: the one that it was given with.
    """

    id: int
    name: str
    adapter: Adapter
    scale: float


@dataclass(frozen=True)
class Chosen:
    """The adapters of a request. scales: by id; 0 is off.  name: of the one that the request named."""

    adapters: tuple[NamedAdapter, ...]
    scales: tuple[float, ...]
    name: str | None = None

    @property
    def applied(self) -> tuple[tuple[Adapter, float], ...]:
        """For ``GenerationOptions.lora``: those that are on, by id, whatever order the request had."""
        pairs = zip(self.adapters, self.scales, strict=True)
        return tuple((named.adapter, scale) for named, scale in pairs if scale)

    @property
    def shown(self) -> list[Json]:
        """For a response: id and scale of those that are on."""
        return [{"id": i, "scale": scale} for i, scale in enumerate(self.scales) if scale]


class LoadedAdapters:
    """The adapters that a server or a batch has loaded, and their scales where a request gives none.

    Requests are prepared in several threads: ``set_scales`` replaces all scales at once.
    """

    def __init__(
        self,
        given: Sequence[tuple[Adapter, float]] = (),
        model_names: Sequence[str] = (),
        *,
        apply: bool = True,
    ) -> None:
        """given: each with its scale.  apply: False: the scales are 0 until ``set_scales``."""
        self.adapters = tuple(_named(given, model_names))
        self._scales = tuple(named.scale if apply else 0.0 for named in self.adapters)

    @property
    def names(self) -> tuple[str, ...]:
        """By which the field ``model`` chooses one."""
        return tuple(named.name for named in self.adapters)

    def find(self, name: str) -> NamedAdapter | None:
        """The adapter of that name."""
        return next((named for named in self.adapters if named.name == name), None)

    def shown(self) -> list[Json]:
        """For GET /lora-adapters."""
        return [
            {"id": named.id, "name": named.name, "path": _sendable(str(named.adapter.path)), "scale": scale}
            for named, scale in zip(self.adapters, self._scales, strict=True)
        ]

    def set_scales(self, body: Any) -> None:
        """Set the scales of requests that give none; an adapter that the body does not list gets 0.

        Raises ApiError, with nothing changed.
        """
        self._scales = self._read(body, "body")

    def chosen(self, fields: Mapping[str, Any]) -> Chosen | None:
        """The adapters of a request, None if none are loaded. Raises ApiError.

        An adapter that ``model`` names is on with the scale that it was given with, or 1 if that is 0; the
        others are off.
        """
        name = fields.get("model")
        named = self.find(name) if isinstance(name, str) else None
        if FIELD in fields:
            if named is not None:
                raise invalid(
                    f"model names the adapter {named.name!r}, and lora gives scales: give one of them, or as"
                    " model the model's own name"[:400],
                    FIELD,
                )
            scales = self._read(fields[FIELD], FIELD)
        elif named is not None:
            scales = tuple((named.scale or 1.0) if each is named else 0.0 for each in self.adapters)
        else:
            scales = self._scales
        if not self.adapters:
            return None
        return Chosen(self.adapters, scales, None if named is None else named.name)

    def _read(self, entries: Any, where: str) -> tuple[float, ...]:
        """The scales by id of a list like ``[{"id": 0, "scale": 0.5}]``. where: it is, for errors."""
        if not isinstance(entries, list):
            raise invalid(
                f'{where} must be an array of objects with id and scale, as [{{"id": 0, "scale": 0.5}}]',
                FIELD,
                "invalid_type",
            )
        scales: dict[int, float] = {}
        for i, entry in enumerate(entries):
            number, scale = self._read_entry(entry, f"{where}[{i}]")
            if number in scales:
                raise invalid(f"{where}[{i}]: the adapter {number} has a scale already", FIELD)
            scales[number] = scale
        return tuple(scales.get(named.id, 0.0) for named in self.adapters)

    def _read_entry(self, entry: Any, where: str) -> tuple[int, float]:
        if not isinstance(entry, dict):
            raise invalid(f"{where} must be an object with id and scale", FIELD, "invalid_type")
        unknown = sorted(entry.keys() - set(_ENTRY))
        if unknown:
            raise invalid(f"{where} has an unknown field, {unknown[0]!r:.100}; known are id and scale", FIELD)
        for name in ("id", "scale"):
            if entry.get(name) is None:
                raise invalid(f"{where} has no {name}: give id and scale", FIELD)
        number, scale = entry["id"], entry["scale"]
        if type(number) is not int or not 0 <= number < len(self.adapters):
            raise invalid(f"{where}.id is {_quoted(number)}; {self._known()}", FIELD)
        try:
            ((_, scale),) = lora_option([(self.adapters[number].adapter, scale)])
        except OptionError as error:
            raise invalid(f"{where}: {error}", FIELD) from None
        return number, scale

    def _known(self) -> str:
        if not self.adapters:
            return "no adapter is loaded: start with --lora"
        ids = ", ".join(f"{named.id} ({named.name})" for named in self.adapters)
        return f"loaded are {ids}"[:300]


def check_name(name: str, model_names: Sequence[str], loaded: LoadedAdapters) -> None:
    """Raise ApiError (404) unless it names the model or an adapter."""
    if name not in model_names and loaded.find(name) is None:
        others = "".join(f", {own!r}" for own in loaded.names)
        raise ApiError(
            404,
            f"The model {name!r} does not exist here; this server has {model_names[0]!r}{others}."[:300],
            param="model",
            code="model_not_found",
        )


def _named(given: Sequence[tuple[Adapter, float]], taken: Sequence[str]) -> list[NamedAdapter]:
    """With names of their own: of equal ones, as of the folders of checkpoints, later ones get a number."""
    names, found = set(taken), []
    for i, (adapter, scale) in enumerate(given):
        name, n = (own := _sendable(adapter.name)), 2
        while name in names:
            name, n = f"{own}-{n}", n + 1
        names.add(name)
        found.append(NamedAdapter(i, name, adapter, scale))
    return found


def _sendable(name: str) -> str:
    """Without the stand-ins for bytes of a file name that are not UTF-8, which JSON can't hold."""
    return name.encode("utf-8", "replace").decode()


def _quoted(value: Any) -> str:
    return json.dumps(value)[:100]
