"""The adapters of a model and of its sessions: loaded once, kept, and applied with their scales."""

from __future__ import annotations

import hashlib
import os
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from pydiffusion.errors import PyDiffusionError
from pydiffusion.options import Lora, LoraSource, ResolvedOptions, lora_option

from .adapter import Adapter

if TYPE_CHECKING:
    from pydiffusion import _native


@dataclass(frozen=True, eq=False)
class AdapterSet:
    """Adapters with their scales, in order.

    given: all of them. native: as a native session takes them, those of scale 0 left out, so that an adapter
    that is off costs nothing. key: a hash of the adapters and scales in ``native``; empty if there are none.
    """

    given: tuple[tuple[Adapter, float], ...] = ()
    native: tuple[tuple[_native.Adapter, float], ...] = ()
    key: bytes = b""


_NONE = AdapterSet()
Make: TypeAlias = "Callable[[Adapter], _native.Adapter]"


class AdapterStore:
    """The adapters that a model has loaded, and those that it applies. Thread-safe.

    current: what sessions apply that have none of their own.
    """

    def __init__(self, metadata: Mapping[str, Any], make: Make | None = None) -> None:
        """metadata: of the model's file. make: loads an adapter beside the model's weights; to ``read``, none
        is needed.
        """
        self._metadata = metadata
        self._make = make
        self._lock = threading.Lock()
        self._source_to_adapter: dict[str, tuple[Any, Adapter]] = {}
        self._fingerprint_to_native: dict[bytes, _native.Adapter] = {}
        self.current = _NONE

    def begin(self, metadata: Mapping[str, Any], make: Make) -> None:
        """The model is loaded: from now on adapters can be, too."""
        self._metadata, self._make = metadata, make

    def load(self, source: LoraSource) -> Adapter:
        """An adapter, ready to be applied: read unless it is loaded and its files have not changed since.

        Raises as ``load_adapter``, and AdapterError for one that does not fit the model's matrices.
        """
        return self._loaded(source)[0]

    def read(self, lora: Lora) -> Lora:
        """The same adapters, read but not loaded yet. Raises as ``load_adapter``, OptionError."""
        with self._lock:
            return [(self._adapter(source), scale) for source, scale in lora_option(lora)]

    def set_of(self, lora: Lora) -> AdapterSet:
        """Adapters with their scales, loaded. Raises as ``load``, OptionError for anything else."""
        loaded = [(*self._loaded(source), scale) for source, scale in lora_option(lora)]
        given = tuple((adapter, scale) for adapter, _, scale in loaded)
        native = tuple((native, scale) for _, native, scale in loaded if scale)
        applied = [adapter.fingerprint + struct.pack("<d", scale) for adapter, scale in given if scale]
        return AdapterSet(given, native, hashlib.sha256(b"".join(applied)).digest() if applied else b"")

    def loaded_in(self, options: ResolvedOptions) -> ResolvedOptions:
        """Options with the adapters that they name loaded. Raises as ``load``."""
        if not options.lora:
            return options
        return replace(options, lora=self.set_of(options.lora).given)

    def unload(self, adapter: Adapter) -> None:
        """Forget an adapter, whatever names it was loaded by."""
        with self._lock:
            self._fingerprint_to_native.pop(adapter.fingerprint, None)
            kept = {name: known for name, known in self._source_to_adapter.items() if known[1] != adapter}
            self._source_to_adapter = kept

    def close(self) -> None:
        """Let go of the adapters, which hold the model's weights; sessions keep those that they apply."""
        with self._lock:
            self._source_to_adapter.clear()
            self._fingerprint_to_native.clear()
        self.current = replace(self.current, native=())

    def _loaded(self, source: LoraSource) -> tuple[Adapter, _native.Adapter]:
        with self._lock:
            adapter = self._adapter(source)
            native = self._fingerprint_to_native.get(adapter.fingerprint)
            if native is None:
                assert self._make is not None  # begin
                native = self._fingerprint_to_native[adapter.fingerprint] = self._make(adapter)
            return adapter, native

    def _adapter(self, source: LoraSource) -> Adapter:
        if isinstance(source, Adapter):
            return source
        name = os.fspath(source)
        if _state(Path(source)) is not None:
            name = str(Path(source).resolve())
        known = self._source_to_adapter.get(name)
        if known is not None and known[0] == _state(known[1].path):
            return known[1]
        adapter = _read(source, self._metadata)
        self._source_to_adapter[name] = _state(adapter.path), adapter
        return adapter


def _read(source: str | os.PathLike[str], metadata: Mapping[str, Any]) -> Adapter:
    from .loading import load_adapter  # on first use: most models have no adapters

    return load_adapter(source, metadata)


def _state(path: Path) -> list[tuple[str, int, int]] | None:
    """Names, sizes and times of a file, or of the files in a folder, by which a change is seen; None for what
    is not there, as the name of a repo on the hub or ``~``.
    """
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        return [(file.name, (found := file.stat()).st_size, found.st_mtime_ns) for file in files]
    except (OSError, ValueError):  # ValueError: a path with a null character
        return None


class SessionAdapters:
    """The adapters of a session: its own or the model's, and those that its cache was encoded with."""

    def __init__(self, store: AdapterStore, native: _native.Session, own: AdapterSet | None) -> None:
        """own: None follows the model's."""
        self._store = store
        self._native = native
        self.own = own
        self.applied = _NONE
        self.apply()

    @property
    def chosen(self) -> AdapterSet:
        """The session's own, else the model's."""
        return self._store.current if self.own is None else self.own

    def set(self, lora: Lora | None) -> None:
        """Choose adapters for all that follows, with nothing changed if one is refused; None follows the
        model's again.
        """
        self.own = None if lora is None else self._store.set_of(lora)

    def apply(self, lora: Lora | None = None) -> bool:
        """Apply these adapters, or None for the chosen ones, from now on. Returns whether others were applied
        before: then the cache's tokens are encoded anew before it is next read, and a generation has ended.
        """
        wanted = self.chosen if lora is None else self._store.set_of(lora)
        if wanted.key == self.applied.key:
            return False
        if wanted.key and not wanted.native:
            raise PyDiffusionError("the model is closed: its adapters can't be applied to a session any more")
        self._native.set_adapters(wanted.native)
        self.applied = wanted
        return True

    def apply_those_of(self, other: SessionAdapters) -> None:
        """Apply what another session applies, whose cache is to be copied."""
        if other.applied.key != self.applied.key:
            self._native.set_adapters(other.applied.native)
            self.applied = other.applied
