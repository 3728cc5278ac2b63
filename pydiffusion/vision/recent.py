"""A cache of the values used last."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Generic, Protocol, TypeVar


class _Sized(Protocol):
    """A value that says its size."""

    @property
    def nbytes(self) -> int: ...


_Value = TypeVar("_Value", bound=_Sized)


class Recent(Generic[_Value]):
    """The values used last, by key, of ``max_bytes`` together at most; but a single larger one is kept until
    the next. Thread-safe.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._values: OrderedDict[bytes, _Value] = OrderedDict()

    def find(self, key: bytes) -> _Value | None:
        """The value kept under the key, or None."""
        with self._lock:
            found = self._values.get(key)
            if found is not None:
                self._values.move_to_end(key)
            return found

    def keep(self, key: bytes, value: _Value) -> None:
        """Keep a value, dropping those whose last use is longest ago."""
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            n_bytes = sum(kept.nbytes for kept in self._values.values())
            while n_bytes > self.max_bytes and len(self._values) > 1:
                n_bytes -= self._values.popitem(last=False)[1].nbytes
