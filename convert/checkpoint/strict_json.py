"""Strict JSON: values are read by key and type; a missing key or a wrong type raises by name."""

from __future__ import annotations

import json
import struct
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pydiffusion._util.file_kinds import recognise
from pydiffusion.errors import ConversionError

_REQUIRED: Any = object()
_MAX_INT = 2**31 - 1
_MAX_FLOAT32 = 3.4e38


def read_json_object(path: Path, max_bytes: int = 1 << 30) -> dict[str, Any]:
    """Read the JSON object in ``path``. Raises ConversionError if it is missing, invalid or not an object."""
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise ConversionError(f"{path}: {size} bytes are too many for this file (at most {max_bytes})")
        text = path.read_bytes()
    except OSError as error:
        raise ConversionError(f"{path}: can't be read: {error.strerror or error}") from error
    return parse_json_object(text, str(path))


def parse_json_object(text: bytes, where: str) -> dict[str, Any]:
    """As :func:`read_json_object`, from bytes. Also rejects duplicate keys, NaN and infinity."""
    try:
        value = json.loads(
            text.decode("utf-8-sig"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        found = recognise(text[:4096], len(text), "json")
        if found is not None:
            raise ConversionError(f"{where}: not JSON; it is {found}") from error
        raise ConversionError(f"{where}: not valid JSON: {error or 'nested too deeply'}") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{where}: should contain a JSON object, contains {_describe(value)}")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key!r} occurs twice")
            seen.add(key)
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _describe(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_within(value: float, minimum: float, maximum: float) -> bool:
    if not abs(value) <= _MAX_FLOAT32:
        return False
    return _float32(minimum) <= _float32(value) <= _float32(maximum)


def _float32(value: float) -> float:
    (rounded,) = struct.unpack("<f", struct.pack("<f", value))
    return float(rounded)


class Fields:
    """A JSON object with typed getters.

    Every getter takes an optional ``default``; without one, a missing key raises. :meth:`note_defaults`
    reports the defaults used, :meth:`note_unread` the keys that were not read. ``null`` counts as missing
    only if ``null_is_missing`` is set.
    """

    def __init__(
        self, values: dict[str, Any], where: str, notes: list[str], *, null_is_missing: bool = False
    ):
        self.values = values
        self.where = where
        self.notes = notes
        self.null_is_missing = null_is_missing
        self.asked: set[str] = set()
        self.defaulted: list[str] = []

    def has(self, key: str) -> bool:
        """Whether the key exists with a value."""
        self.asked.add(key)
        return key in self.values and not (self.null_is_missing and self.values[key] is None)

    def _get(self, key: str, default: Any) -> tuple[Any, bool]:
        if self.has(key):
            return self.values[key], True
        if default is _REQUIRED:
            raise ConversionError(f"{self.where}: the required key {key!r} is missing")
        self.defaulted.append(f"{key} = {json.dumps(default)}")
        return default, False

    def note_defaults(self) -> None:
        """Add a note with the values taken from the reference's defaults."""
        if self.defaulted:
            self.notes.append(
                f"{self.where}: absent, the reference's defaults are used: {', '.join(self.defaulted)}"
            )
            self.defaulted.clear()

    def note_unread(self, irrelevant: Collection[str]) -> None:
        """Add a note with the keys that nothing asked for, except for the irrelevant ones."""
        unread = sorted(set(self.values) - self.asked - set(irrelevant))
        if unread:
            self.notes.append(f"{self.where}: keys that were not read: {', '.join(map(repr, unread))}")

    def error(self, key: str, wanted: str) -> ConversionError:
        """An error that names the key and its value."""
        return ConversionError(
            f"{self.where}: {key!r} should be {wanted}, is {_describe(self.values.get(key))}"
        )

    def integer(
        self, key: str, default: Any = _REQUIRED, *, minimum: int = 1, maximum: int = _MAX_INT
    ) -> int:
        """An integer within bounds; floats and bools are rejected."""
        value, there = self._get(key, default)
        if there and (type(value) is not int or not minimum <= value <= maximum):
            raise self.error(key, f"an integer from {minimum} to {maximum}")
        return value

    def number(self, key: str, default: Any = _REQUIRED, *, minimum: float, maximum: float = 1e30) -> float:
        """A number from ``minimum`` to ``maximum``, as the float32 that files store; integers count."""
        value, there = self._get(key, default)
        if there and (type(value) not in (int, float) or not _is_within(value, minimum, maximum)):
            raise self.error(key, f"a number from {minimum:g} to {maximum:g}")
        return float(value)

    def boolean(self, key: str, default: Any = _REQUIRED) -> bool:
        """True or false."""
        value, there = self._get(key, default)
        if there and type(value) is not bool:
            raise self.error(key, "true or false")
        return value

    def string(self, key: str, default: Any = _REQUIRED) -> str:
        """A string."""
        value, there = self._get(key, default)
        if there and not isinstance(value, str):
            raise self.error(key, "a string")
        return value

    def object(self, key: str) -> Fields:
        """A nested object, required."""
        value, _ = self._get(key, _REQUIRED)
        if not isinstance(value, dict):
            raise self.error(key, "an object")
        return Fields(value, f"{self.where}: {key}", self.notes, null_is_missing=self.null_is_missing)

    def one_of(self, key: str, accepted: tuple[Any, ...], default: Any = _REQUIRED) -> Any:
        """One of the ``accepted`` values; any other is an unsupported feature."""
        value, _ = self._get(key, default)
        if not any(type(value) is type(choice) and value == choice for choice in accepted):
            choices = " or ".join(json.dumps(choice) for choice in accepted)
            raise ConversionError(
                f"{self.where}: {key!r} is {_describe(value)}, which is not supported (only {choices})"
            )
        return value

    def accept_if_there(self, key: str, accepted: tuple[Any, ...]) -> None:
        """As :meth:`one_of` for a key that may be missing."""
        if self.has(key):
            self.one_of(key, accepted)
