"""Read llama.cpp's importance matrices of before 2025-07 (``.dat``).

Little-endian, no magic number: the number of entries (i32); per entry the length of its name (i32), the name,
the number of calls (i32), the number of values (i32) and the values (f32), which are means of squared
activations times the number of calls, those of all experts after each other; then, in files since 2024-04,
the number of chunks (i32) and the name of the text, with its length (i32).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pydiffusion.errors import ModelFormatError

_MAX_NAME = 1024  # bytes; ggml's names have 63 at most
_MAX_VALUES = 2**31 - 1
_MIN_ENTRY = 4 + 1 + 4 + 4 + 4  # bytes of an entry with one letter and one value


@dataclass(frozen=True)
class LegacyImatrix:
    """``entries``: tensor name -> (number of calls, values: (n,) float32)."""

    entries: dict[str, tuple[int, np.ndarray]]
    datasets: tuple[str, ...]
    chunk_count: int


def is_legacy(path: Path) -> bool:
    """Whether a file may be of this format: it begins with counts and a name that it can have. Raises
    OSError.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8 + _MAX_NAME)
    if len(head) < 8 + 1 or head.startswith(b"GGUF"):
        return False
    n_entries, n_letters = struct.unpack("<ii", head[:8])
    name = head[8 : 8 + max(n_letters, 0)]
    return 1 <= n_entries <= size // _MIN_ENTRY and 1 <= n_letters <= _MAX_NAME and _is_name(name)


def _is_name(text: bytes) -> bool:
    return text.isascii() and text.decode("ascii").isprintable()


def read_legacy(path: Path) -> LegacyImatrix:
    """Read a file of this format; allocates no more than it has. Raises ModelFormatError, OSError."""
    with path.open("rb") as file:
        reader = _Reader(file, path)
        entries: dict[str, tuple[int, np.ndarray]] = {}
        for index in range(reader.count("number of entries", 1, reader.size // _MIN_ENTRY)):
            name = reader.text(f"name of entry {index}")
            if name in entries:
                raise reader.error(f"entry {name!r} occurs twice")
            n_calls = reader.count(f"number of calls of {name!r}", 0, 2**31 - 1)
            values = reader.floats(f"values of {name!r}")
            if not (np.isfinite(values).all() and (values >= 0).all()):
                raise reader.error(f"entry {name!r} has negative or non-finite values")
            entries[name] = n_calls, values
        if not reader.n_left:  # a file of before 2024-04
            return LegacyImatrix(entries, (), 0)
        n_chunks = reader.count("number of chunks", 0, 2**31 - 1)
        dataset = reader.text("name of the text", shortest=0) if reader.n_left else ""
        if reader.n_left:
            raise reader.error(f"has {reader.n_left} bytes too many")
        return LegacyImatrix(entries, (dataset,) if dataset else (), n_chunks)


class _Reader:
    """Reads numbers and texts from a file, and checks each length against what the file still has."""

    def __init__(self, file: BinaryIO, path: Path):
        self._file = file
        self._path = path
        self.size = path.stat().st_size
        self.n_left = self.size

    def error(self, what: str) -> ModelFormatError:
        return ModelFormatError(
            f"{self._path}: not a whole imatrix of llama.cpp's older format (.dat): {what}; make one with "
            "`pydiffusion imatrix`"
        )

    def _read(self, what: str, n_bytes: int) -> bytes:
        data = self._file.read(n_bytes) if n_bytes <= self.n_left else b""
        if len(data) < n_bytes:
            raise self.error(f"it ends within the {what}")
        self.n_left -= n_bytes
        return data

    def count(self, what: str, low: int, high: int) -> int:
        (value,) = struct.unpack("<i", self._read(what, 4))
        if not low <= value <= high:
            raise self.error(f"the {what} is {value}")
        return int(value)

    def text(self, what: str, shortest: int = 1) -> str:
        n_bytes = self.count(f"length of the {what}", shortest, self.n_left)
        return self._read(what, n_bytes).decode("utf-8", "surrogateescape")

    def floats(self, what: str) -> np.ndarray:
        n_values = self.count(f"number of {what}", 1, _MAX_VALUES)
        if n_values > self.n_left // 4:
            raise self.error(f"it ends within the {n_values} {what}")
        return np.frombuffer(self._read(what, 4 * n_values), "<f4").astype(np.float32)
