"""Tensors of a source, and thread-safe reads of their bytes."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pydiffusion.errors import ConversionError

# (first byte, number of bytes) of a tensor -> (n_bytes,) uint8
ReadBytes = Callable[[int, int], np.ndarray]


@dataclass(frozen=True)
class SourceTensor:
    """A tensor: its GGUF name, its type and shape in the source, and a function to read it."""

    name: str
    type: str
    shape: tuple[int, ...]
    read: ReadBytes


class SharedRead:
    """A :data:`ReadBytes` with a cache per thread, shared by several conversions of one tensor: between two
    calls of :meth:`drop`, a thread reads no byte twice, as long as no range ends within another.
    """

    def __init__(self, read: ReadBytes):
        self._read = read
        self._local = threading.local()

    def __call__(self, start: int, n_bytes: int) -> np.ndarray:
        held = self._local.__dict__.setdefault("held", [])
        for first, data in held:
            if first <= start and start + n_bytes <= first + len(data):
                return data[start - first : start - first + n_bytes]
        data = self._read(start, n_bytes)
        held.append((start, data))
        return data

    def hold(self, start: int, n_bytes: int) -> None:
        """Cache this range."""
        self(start, n_bytes)

    def drop(self) -> None:
        """Clear this thread's cache."""
        self._local.__dict__.pop("held", None)


def read_exactly(file: io.FileIO, path: Path, offset: int, n_bytes: int) -> np.ndarray:
    """Read ``n_bytes`` of an unbuffered file at ``offset``: (n_bytes,) uint8. Thread-safe. Raises
    ConversionError at the end of the file or on failure.
    """
    buffer = np.empty(n_bytes, np.uint8)
    done = 0
    try:
        while done < n_bytes:
            count = _read_at(file, buffer.data[done:], offset + done)
            if not count:
                raise ConversionError(
                    f"{path}: truncated by {n_bytes - done} bytes; was it changed while being read?"
                )
            done += count
    except OSError as error:
        raise ConversionError(f"{path}: can't be read: {error.strerror or error}") from error
    return buffer


if hasattr(os, "preadv"):

    def _read_at(file: io.FileIO, buffer: memoryview, offset: int) -> int:
        return os.preadv(file.fileno(), [buffer], offset)

else:  # Windows: seek and read are two calls and need a lock
    _position = threading.Lock()

    def _read_at(file: io.FileIO, buffer: memoryview, offset: int) -> int:
        with _position:
            file.seek(offset)
            return file.readinto(buffer)
