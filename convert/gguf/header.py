"""Write a GGUF header: magic, metadata, tensor infos.

``gguf.GGUFWriter`` can't write everything that ``quantize`` has to preserve (empty arrays, empty strings);
the tests read the result with ``gguf.GGUFReader``.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from pydiffusion import _native
from pydiffusion.errors import ConversionError

MAGIC, VERSION, DEFAULT_ALIGNMENT = b"GGUF", 3, 32
_SCALARS = MappingProxyType(
    {"u8": (0, "B"), "i8": (1, "b"), "u16": (2, "H"), "i16": (3, "h"), "u32": (4, "I"), "i32": (5, "i"),
     "f32": (6, "f"), "bool": (7, "?"), "u64": (10, "Q"), "i64": (11, "q"), "f64": (12, "d")}
)  # fmt: skip
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Value:
    """A metadata value and its type: ``u32``, ``f32``, ``bool``, ``str``, ``array[i32]``,
    ``array[str]``...
    """

    type: str
    value: Any


@dataclass(frozen=True)
class Placed:
    """Tensor info of a header; ``shape`` in C order, ``offset`` from the start of the data section."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


def align(position: int, alignment: int) -> int:
    """The next multiple of ``alignment`` at or after ``position``."""
    return -(-position // alignment) * alignment


def pack_header(metadata: Mapping[str, Value], tensors: Sequence[Placed], alignment: int) -> bytes:
    """Pack all bytes before the tensor data, including padding. Raises ConversionError naming a key whose
    value does not fit its type.
    """
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        type_id, packed = _pack_value(key, value.type, value.value)
        parts += [_pack_string(key), struct.pack("<I", type_id), packed]
    types = _native.tensor_types()
    for tensor in tensors:
        n_dims = len(tensor.shape)
        dims = struct.pack(f"<I{n_dims}Q", n_dims, *reversed(tensor.shape))
        parts += [_pack_string(tensor.name), dims, struct.pack("<IQ", types[tensor.type][0], tensor.offset)]
    header = b"".join(parts)
    return header + bytes(align(len(header), alignment) - len(header))


def _pack_string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _pack_value(key: str, type_name: str, value: Any) -> tuple[int, bytes]:
    try:
        if type_name == "str":
            return _STRING, _pack_string(value)
        if type_name.startswith("array["):
            return _ARRAY, _pack_array(key, type_name.removeprefix("array[").removesuffix("]"), value)
        type_id, code = _SCALARS[type_name]
        return type_id, struct.pack("<" + code, value)
    except (struct.error, TypeError, OverflowError, UnicodeEncodeError, KeyError) as error:
        raise ConversionError(
            f"metadata key {key!r}: {value!r:.60} can't be written as {type_name}: {error}"
        ) from error


def _pack_array(key: str, item_type: str, items: Sequence[Any]) -> bytes:
    if item_type in _SCALARS:
        type_id, code = _SCALARS[item_type]
        return struct.pack(f"<IQ{len(items)}{code}", type_id, len(items), *items)
    packed = [_pack_value(key, item_type, item)[1] for item in items]
    type_id = _STRING if item_type == "str" else _ARRAY
    return struct.pack("<IQ", type_id, len(items)) + b"".join(packed)
