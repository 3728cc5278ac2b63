"""Parse and write GGUF files in pure Python, valid or broken in any way that a test needs.

Nothing is checked: counts, offsets, types and lengths are written as given, so that tests can make files that
no correct writer makes.
"""

from __future__ import annotations

import copy
import struct
from dataclasses import dataclass, field
from pathlib import Path

# Value types of the format.
U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_FORMAT = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q"}
_FORMAT[F64] = "d"

GGML_F32 = 0


@dataclass
class Array:
    """A value of type ARRAY. ``length`` overrides the true number of items in what is written."""

    item_type: int
    items: list
    length: int | None = None


@dataclass
class String:
    """A string; ``length`` overrides the true one in what is written."""

    data: bytes
    length: int | None = None


@dataclass
class KeyValue:
    """One metadata entry: a number, bool, ``String`` or ``Array``; raw bytes are written as they are."""

    key: bytes
    type: int
    value: object


@dataclass
class Tensor:
    """One tensor: ``dims`` fastest first, as in the file; ``offset`` None puts the data where it belongs."""

    name: bytes
    dims: list[int]
    type: int
    data: bytes
    offset: int | None = None
    n_dims: int | None = None


@dataclass
class RawGguf:
    """A whole file. Counts are those of the lists unless given."""

    pairs: list[KeyValue] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    magic: bytes = b"GGUF"
    version: int = 3
    n_pairs: int | None = None
    n_tensors: int | None = None
    alignment: int = 32
    big_endian: bool = False
    cut_tail: int = 0

    def copy(self) -> RawGguf:
        """An independent copy to break."""
        return copy.deepcopy(self)

    def get(self, key: str) -> KeyValue:
        """The entry of that key."""
        return next(pair for pair in self.pairs if pair.key == key.encode())

    def set(self, key: str, type: int, value: object) -> None:
        """Replace an entry's type and value in place, or append a new one."""
        new = KeyValue(key.encode(), type, String(value.encode()) if isinstance(value, str) else value)
        for i, pair in enumerate(self.pairs):
            if pair.key == new.key:
                self.pairs[i] = new
                return
        self.pairs.append(new)

    def drop(self, key: str) -> None:
        """Leave an entry out."""
        self.pairs.remove(self.get(key))

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name."""
        return next(tensor for tensor in self.tensors if tensor.name == name.encode())

    def drop_tensor(self, name: str) -> None:
        """Leave a tensor out."""
        self.tensors.remove(self.tensor(name))

    def header(self) -> bytes:
        """Everything before the data, without padding."""
        out = [self.magic, self._number(U32, self.version)]
        out.append(self._number(U64, len(self.tensors) if self.n_tensors is None else self.n_tensors))
        out.append(self._number(U64, len(self.pairs) if self.n_pairs is None else self.n_pairs))
        for pair in self.pairs:
            out += [self._string(String(pair.key)), self._number(U32, pair.type)]
            out.append(self._value(pair.type, pair.value))
        at = 0
        for tensor in self.tensors:
            n_dims = len(tensor.dims) if tensor.n_dims is None else tensor.n_dims
            out += [self._string(String(tensor.name)), self._number(U32, n_dims)]
            out += [self._number(U64, dim) for dim in tensor.dims]
            out += [self._number(U32, tensor.type)]
            out.append(self._number(U64, at if tensor.offset is None else tensor.offset))
            at += self._padded(len(tensor.data))
        return b"".join(out)

    def to_bytes(self) -> bytes:
        """The file."""
        header = self.header()
        out = [header, b"\0" * (self._padded(len(header)) - len(header))]
        for tensor in self.tensors:
            out += [tensor.data, b"\0" * (self._padded(len(tensor.data)) - len(tensor.data))]
        whole = b"".join(out)
        return whole[: len(whole) - self.cut_tail]

    def write(self, path: Path) -> Path:
        """Write the file and return its path."""
        path.write_bytes(self.to_bytes())
        return path

    def _padded(self, n: int) -> int:
        return -(-n // self.alignment) * self.alignment

    def _number(self, type: int, value: object) -> bytes:
        return struct.pack((">" if self.big_endian else "<") + _FORMAT[type], value)

    def _string(self, value: String) -> bytes:
        return self._number(U64, len(value.data) if value.length is None else value.length) + value.data

    def _value(self, type: int, value: object) -> bytes:
        if isinstance(value, bytes):
            return value
        if isinstance(value, String):
            return self._string(value)
        if isinstance(value, Array):
            n = len(value.items) if value.length is None else value.length
            items = b"".join(self._value(value.item_type, item) for item in value.items)
            return self._number(U32, value.item_type) + self._number(U64, n) + items
        return self._number(type, value)


class _Reader:
    """Reads a valid file from front to back."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def number(self, type: int) -> int | float | bool:
        layout = "<" + _FORMAT[type]
        (value,) = struct.unpack_from(layout, self.data, self.at)
        self.at += struct.calcsize(layout)
        return value

    def string(self) -> bytes:
        n = self.number(U64)
        self.at += n
        return self.data[self.at - n : self.at]

    def value(self, type: int) -> object:
        if type == STRING:
            return String(self.string())
        if type == ARRAY:
            item_type, n = self.number(U32), self.number(U64)
            return Array(item_type, [self.value(item_type) for _ in range(n)])
        return self.number(type)


def read_gguf(path: Path) -> RawGguf:
    """Parse a valid file; a tensor's bytes run up to the next tensor, padding included."""
    reader = _Reader(path.read_bytes())
    reader.at = 4
    out = RawGguf(version=reader.number(U32))
    n_tensors, n_pairs = reader.number(U64), reader.number(U64)
    for _ in range(n_pairs):
        key, type = reader.string(), reader.number(U32)
        out.pairs.append(KeyValue(key, type, reader.value(type)))
    offsets: list[int] = []
    for _ in range(n_tensors):
        name = reader.string()
        dims = [reader.number(U64) for _ in range(reader.number(U32))]
        out.tensors.append(Tensor(name, dims, reader.number(U32), b""))
        offsets.append(reader.number(U64))
    out.alignment = next((p.value for p in out.pairs if p.key == b"general.alignment"), 32)
    data = reader.data[-(-reader.at // out.alignment) * out.alignment :]
    ends = sorted([*offsets, len(data)])
    for tensor, start in zip(out.tensors, offsets, strict=True):
        tensor.data = data[start : next(end for end in ends if end > start)]
    return out


def float_tensor(name: str, dims: list[int], data: bytes) -> Tensor:
    """An F32 tensor of ``dims`` (fastest first)."""
    return Tensor(name.encode(), dims, GGML_F32, data)
