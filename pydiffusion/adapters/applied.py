"""The adapters of a model and of its sessions: loaded once, kept, and applied with their scales."""

from __future__ import annotations

import hashlib
import math
import os
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np

from pydiffusion.errors import AdapterError, PyDiffusionError
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
    """The adapters that a model has loaded, and those that it applies. Thread-safe; while one is read or
    downloaded, others can be looked up and loaded.

    An adapter is kept for the name that it was loaded by, until its files change; without a name as long as
    anybody has the Adapter.

    current: what sessions apply that have none of their own.
    """

    def __init__(self, metadata: Mapping[str, Any], make: Make | None = None) -> None:
        """metadata: of the model's file. make: loads an adapter beside the model's weights; to ``read``, none
        is needed.
        """
        self._metadata = metadata
        self._make = make
        self._lock = threading.Lock()  # of the tables, never held while something is read
        self._turns: WeakValueDictionary[Any, threading.Lock] = WeakValueDictionary()
        self._source_to_adapter: dict[str, tuple[Any, Adapter]] = {}
        self._adapter_to_native: WeakKeyDictionary[Adapter, _native.Adapter] = WeakKeyDictionary()
        self.current = _NONE

    def begin(self, metadata: Mapping[str, Any], make: Make) -> None:
        """The model is loaded: from now on adapters can be, too."""
        self._metadata, self._make = metadata, make

    def load(self, source: LoraSource) -> Adapter:
        """An adapter, ready to be applied: read unless it is loaded and its files have not changed since.

        Raises as ``load_adapter``, and AdapterError for one that does not fit the model's matrices.
        """
        return self._loaded(source)[0]

    def read(self, lora: Lora) -> list[tuple[Adapter, float]]:
        """The same adapters, read but not loaded yet. Raises as ``load_adapter``, OptionError."""
        return [(self._adapter(source), scale) for source, scale in lora_option(lora)]

    def set_of(self, lora: Lora) -> AdapterSet:
        """Adapters with their scales, loaded. Raises as ``load``, OptionError for anything else."""
        read = self.read(lora)
        native = tuple((self._loaded(adapter)[1], scale) for adapter, scale in read if _is_on(scale))
        return AdapterSet(tuple(read), native, key_of(read))

    def loaded_in(self, options: ResolvedOptions) -> ResolvedOptions:
        """Options with the adapters that they name loaded. Raises as ``load``."""
        if not options.lora:
            return options
        return replace(options, lora=self.set_of(options.lora).given)

    def unload(self, adapter: Adapter) -> None:
        """Forget an adapter, whatever names it was loaded by."""
        with self._lock:
            self._adapter_to_native.pop(adapter, None)
            kept = {name: known for name, known in self._source_to_adapter.items() if known[1] != adapter}
            self._source_to_adapter = kept

    def close(self) -> None:
        """Let go of the adapters, which hold the model's weights; sessions keep those that they apply."""
        with self._lock:
            self._source_to_adapter.clear()
            self._adapter_to_native.clear()
        self.current = replace(self.current, native=())

    def _loaded(self, source: LoraSource) -> tuple[Adapter, _native.Adapter]:
        adapter = self._adapter(source)
        native = self._native_of(adapter)
        if native is None:
            with self._turn(adapter.fingerprint):
                native = self._native_of(adapter)
                if native is None:
                    native = self._made(adapter)
        return adapter, native

    def _native_of(self, adapter: Adapter) -> _native.Adapter | None:
        with self._lock:
            return self._adapter_to_native.get(adapter)

    def _made(self, adapter: Adapter) -> _native.Adapter:
        assert self._make is not None  # begin
        try:
            native = self._make(adapter)
        except AdapterError:
            self.unload(adapter)  # its files may be others by now: read them anew the next time
            raise
        with self._lock:
            self._adapter_to_native[adapter] = native
        return native

    def _adapter(self, source: LoraSource) -> Adapter:
        if isinstance(source, Adapter):
            return source
        from .loading import expanded  # on first use: most models have no adapters

        name, path = os.fspath(source), expanded(os.fspath(source))
        if _state(path) is not None:
            name = str(path.resolve())
            source = path.absolute()  # its factors are read later, perhaps from another folder
        known = self._known(name)
        if known is None:
            with self._turn(name):
                known = self._known(name)
                if known is None:
                    state = _state(path)  # before it is read: what changes meanwhile is read anew
                    known = _read(source, self._metadata)
                    with self._lock:
                        self._source_to_adapter[name] = state or _state(known.path), known
        return known

    def _known(self, name: str) -> Adapter | None:
        """The adapter of this name, if its files have not changed."""
        with self._lock:
            state, adapter = self._source_to_adapter.get(name, (None, None))
        return adapter if adapter is not None and state == _state(adapter.path) else None

    def _turn(self, key: Any) -> threading.Lock:
        """A lock for one that reads or loads this; of others nobody waits."""
        with self._lock:
            return self._turns.setdefault(key, threading.Lock())


def n_loaded_bytes(lora: Sequence[tuple[Adapter, float]], file: _native.GgufFile) -> int:
    """Bytes that adapters take beside the weights of a file: F32 beside F32 matrices, else BF16."""
    f32 = {
        str(tensor.name).removesuffix(".weight") for tensor in file.tensors if tensor.type.lower() == "f32"
    }
    return sum(
        (math.prod(factors.shape_a) + math.prod(factors.shape_b)) * (4 if target.tensor in f32 else 2)
        for adapter in {adapter for adapter, _ in lora}
        for target, factors in adapter.factors.items()
    )


def key_of(lora: Sequence[tuple[Adapter, float]]) -> bytes:
    """A hash of adapters and scales, as the native scales (float32) are; empty if none is on."""
    on = [adapter.fingerprint + struct.pack("<f", scale) for adapter, scale in lora if _is_on(scale)]
    return hashlib.sha256(b"".join(on)).digest() if on else b""


def _is_on(scale: float) -> bool:
    return bool(np.float32(scale))


def _read(source: str | os.PathLike[str], metadata: Mapping[str, Any]) -> Adapter:
    from .loading import load_adapter

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
        read = None if lora is None else self._store.read(lora)
        if (self.chosen.key if read is None else key_of(read)) == self.applied.key:
            return False
        wanted = self.chosen if read is None else self._store.set_of(read)
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
