"""Mutations of a parsed GGUF (tests/support/gguf_mutator.py): keys, arrays, tensors, weights."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

from support.gguf_mutator import ARRAY, BOOL, F32, F64, STRING, U8, U32, U64, Array, RawGguf, String

from . import mutation

_RANGES = {0: 8, 1: -8, 2: 16, 3: -16, 4: 32, 5: -32, 10: 64, 11: -64}


def number(draw: random.Random, type: int) -> int | float | bool:
    """Draw a number that fits a type."""
    value = mutation.number(draw)
    if type == BOOL:
        return bool(draw.randrange(2))
    if type in (F32, F64):
        odd = draw.choice((float("nan"), float("inf"), -float("inf"), value, value))
        try:
            return struct.unpack("<f", struct.pack("<f", float(odd)))[0] if type == F32 else float(odd)
        except OverflowError:
            return 3e38
    if value != value or abs(value) > 1e300:
        value = 2**64 - 1
    bits = _RANGES[type]
    value = int(value) % 2 ** abs(bits)
    return value - 2**-bits if bits < 0 and value >= 2 ** (-bits - 1) else value


def value(draw: random.Random, type: int) -> object:
    """Draw a value of a type."""
    if type == ARRAY:
        kind = draw.choice([t for t in range(13) if t != ARRAY])
        return Array(kind, [value(draw, kind) for _ in range(draw.randrange(4))])
    if type == STRING:
        text = mutation.text(draw).encode("utf-8", "surrogatepass")
        return String(text if draw.random() < 0.9 else text + b"\xff\xfe")
    return number(draw, type)


def change_array(draw: random.Random, array: Array) -> None:
    """Replace, drop, duplicate or swap an item; rarely, change the type or write a wrong length."""
    items, at = array.items, draw.randrange(len(array.items)) if array.items else 0
    action = draw.randrange(9)
    if action == 0 and items:
        del items[at]
    elif action == 1 and items:
        items.insert(draw.randrange(len(items)), items[at])
    elif action == 2 and items:
        other = draw.randrange(len(items))
        items[at], items[other] = items[other], items[at]
    elif action == 3 and items:
        items[at] = items[draw.randrange(len(items))]
    elif action == 4 and draw.random() < 0.3:
        array.length = draw.choice((0, len(items) - 1, len(items) + 1, 2**32, 2**63, 2**64 - 1)) % 2**64
    elif action == 5 and draw.random() < 0.3:
        new = value(draw, ARRAY)
        array.item_type, array.items = new.item_type, new.items
    elif action == 6 and items and isinstance(items[at], String):
        items[at] = String(mutation.damaged(draw, items[at].data))
    elif items:
        items[at] = value(draw, array.item_type)


def change_pair(draw: random.Random, file: RawGguf, names: Callable[[bytes], bool]) -> None:
    """Change one of the keys selected by ``names``."""
    pairs = [pair for pair in file.pairs if names(pair.key)]
    if not pairs:
        return
    pair = draw.choice(pairs)
    action = draw.randrange(10)
    if action == 0:
        file.pairs.remove(pair)
    elif action == 1:
        pair.type = draw.randrange(13)
        pair.value = value(draw, pair.type)
    elif action == 2:
        pair.value, pair.type = (lambda other: (other.value, other.type))(draw.choice(pairs))
    elif isinstance(pair.value, Array):
        for _ in range(draw.choice((1, 1, 2, 5))):
            change_array(draw, pair.value)
    elif isinstance(pair.value, String) and draw.random() < 0.6:
        pair.value = String(mutation.damaged(draw, pair.value.data))
    elif action < 6 and pair.type in _RANGES:
        bits = abs(_RANGES[pair.type]) - (_RANGES[pair.type] < 0)
        pair.value = max(0, min(2**bits - 1, pair.value + draw.choice((-2, -1, 1, 2))))
    else:
        pair.value = value(draw, pair.type)


def change_tensor(draw: random.Random, file: RawGguf) -> None:
    """Change a tensor's name, type, shape, offset or data."""
    tensor = draw.choice(file.tensors)
    action = draw.randrange(9)
    if action == 0:
        file.tensors.remove(tensor)
    elif action == 1:
        tensor.name = mutation.damaged(draw, tensor.name)
    elif action == 2:
        tensor.type = draw.randrange(45)
    elif action == 3 and tensor.dims:
        at = draw.randrange(len(tensor.dims))
        tensor.dims[at] = (
            abs(int(number(draw, U64)))
            if draw.random() < 0.5
            else max(0, tensor.dims[at] + draw.choice((-32, -1, 1, 32)))
        )
    elif action == 4:
        draw.shuffle(tensor.dims)
    elif action == 5:
        tensor.dims = [*tensor.dims, draw.choice((0, 1, 2))] if draw.random() < 0.5 else tensor.dims[:-1]
    elif action == 6 and draw.random() < 0.3:
        tensor.offset = int(number(draw, U64))
    elif action == 7:
        other = draw.choice(file.tensors)
        tensor.data, tensor.dims, tensor.type = other.data, list(other.dims), other.type
    else:
        change_weights(draw, tensor)


def change_weights(draw: random.Random, tensor: object) -> None:
    """Replace some of a tensor's values by NaN, infinity, huge or tiny ones."""
    data = bytearray(tensor.data)
    for _ in range(draw.choice((1, 4, 64))):
        if len(data) < 4:
            return
        at = draw.randrange(len(data) // 4) * 4
        odd = draw.choice(
            (0x7FC00000, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 1, 0x80000000, draw.getrandbits(32))
        )
        data[at : at + 4] = struct.pack("<I", odd)
    tensor.data = bytes(data)


def change_frame(draw: random.Random, file: RawGguf) -> None:
    """Change version, counts or alignment, or truncate the file."""
    action = draw.randrange(5)
    if action == 0:
        file.version = draw.choice((0, 1, 2, 4, 2**31, 0x03000000))
    elif action == 1:
        file.n_pairs = (len(file.pairs) + draw.choice((-1, 1, 2**40, 2**63))) % 2**64
    elif action == 2:
        file.n_tensors = (len(file.tensors) + draw.choice((-1, 1, 2**40, 2**63))) % 2**64
    elif action == 3:
        file.set("general.alignment", U32, draw.choice((0, 1, 7, 8, 16, 64, 2**20, 2**21)))
    else:
        file.cut_tail = draw.choice((1, 31, 1000, 10**6))


__all__ = ["U8", "change_frame", "change_pair", "change_tensor", "change_weights", "number", "value"]
