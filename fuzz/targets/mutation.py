"""Mutations of JSON values, text and bytes: valid input with one or a few changes."""

from __future__ import annotations

import copy
import random
from typing import Any

NUMBERS: list[int | float] = [
    0, 1, -1, 2, 3, 7, 8, 16, 255, 256, 1024, 65535, 65536, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1,
    2**63, 2**64,
    -(2**31), -(2**63), -(2**64), 10**30, 10**400, 0.0, -0.0, 0.5, 1e-9, 5e-324, 1e30, 1e308, -1.5,
]  # fmt: skip
TEXTS = [
    "", " ", "a", "auto", "none", "text", "\x00", "a\x00b", "\n", "é", "\u2581", "\ufffd", "\U0001f600",
    "\ud800",
    "x\udfffy", "\u202e", "{{ 1 }}", "%s", "../..", "/", "<bos>", "<|turn>", "<|hole|>", "<|hole:3|>", "0",
    "1e3",
    "true", "null", "[", "(", "a{99999}", "\\", "\\p{L}+", "x" * 300,
]  # fmt: skip


def number(draw: random.Random) -> int | float:
    """Draw an edge case or any number."""
    kind = draw.randrange(4)
    if kind == 0:
        return draw.randrange(-(2**33), 2**33)
    return draw.uniform(-3, 3) if kind == 1 else draw.choice(NUMBERS)


def text(draw: random.Random) -> str:
    """Draw an edge case or a few random characters."""
    if draw.random() < 0.7:
        return draw.choice(TEXTS)
    return "".join(
        chr(draw.choice((draw.randrange(128), draw.randrange(0x3000)))) for _ in range(draw.randrange(9))
    )


def json_value(draw: random.Random, depth: int = 3) -> Any:
    """Draw any JSON value; rarely, a deeply nested one."""
    kind = draw.randrange(8 if depth else 5)
    if kind == 7 and draw.random() < 0.05:
        return nested(draw.choice((50, 500, 3000)), draw.random() < 0.5)
    if kind in (0, 1):
        return number(draw)
    if kind in (2, 3):
        return text(draw)
    if kind == 4:
        return draw.choice((None, True, False))
    if kind == 5:
        return {text(draw): json_value(draw, depth - 1) for _ in range(draw.randrange(4))}
    return [json_value(draw, depth - 1) for _ in range(draw.randrange(4))]


def nested(depth: int, in_lists: bool) -> Any:
    """Return a value nested to ``depth``."""
    value: Any = 1
    for _ in range(depth):
        value = [value] if in_lists else {"a": value}
    return value


def places(value: Any, depth: int = 6) -> list[tuple[Any, Any]]:
    """Return (container, key) of every value inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = []
    for key, inner in items:
        found.append((value, key))
        if depth:
            found += places(inner, depth - 1)
    return found


def n_changes(draw: random.Random) -> int:
    """How many changes an input gets: mostly one."""
    return 1 if draw.random() < 0.7 else draw.randrange(2, 4)


def mutated(draw: random.Random, value: Any, other: Any = None) -> Any:
    """Return a copy with one value (rarely more) replaced, removed, renamed, duplicated or slightly changed.

    other: a value of the same kind, parts of which may be copied in.
    """
    if draw.random() < 0.01:
        return json_value(draw)
    value = copy.deepcopy(value)
    for _ in range(n_changes(draw)):
        where = places(value)
        if not where:
            return json_value(draw)
        holder, key = draw.choice(where)
        try:
            _change(draw, holder, key, where, other)
        except RecursionError:  # nested too deeply to copy: unusual enough
            break
    return value


def _change(draw: random.Random, holder: Any, key: Any, where: list[tuple[Any, Any]], other: Any) -> None:
    action = draw.randrange(8)
    old = holder[key]
    if action == 0 and isinstance(holder, dict):
        holder[text(draw)] = holder.pop(key)
    elif action == 1:
        del holder[key]
    elif action == 2 and isinstance(holder, list):
        holder.insert(draw.randrange(len(holder) + 1), copy.deepcopy(old))
    elif action == 3:
        source, name = draw.choice(places(other) if other else where)
        holder[key] = copy.deepcopy(source[name])
    elif action == 4 and isinstance(old, (str, int, float)):
        holder[key] = _near(draw, old)
    elif action == 5 and isinstance(holder, dict):
        holder[text(draw)] = json_value(draw)
    else:
        holder[key] = json_value(draw)


def _near(draw: random.Random, old: Any) -> Any:
    """Return nearly the same value, perhaps of another type."""
    if isinstance(old, bool):
        return draw.choice((int(old), str(old), not old))
    if isinstance(old, str):
        at = draw.randrange(len(old) + 1)
        return draw.choice(
            (old[:at], old[:at] + text(draw) + old[at:], old * 2, old.upper(), [old], old + " ")
        )
    return draw.choice(
        (old + 1, old - 1, -old, old * 2, float(min(old, 2**1000)), str(old), [old], old * 2**20)
    )


def damaged(draw: random.Random, data: bytes) -> bytes:
    """Change, delete, insert or truncate a few bytes."""
    out = bytearray(data)
    for _ in range(draw.randrange(1, 4)):
        at = draw.randrange(len(out) + 1)
        action = draw.randrange(6)
        if action == 0:
            del out[at : at + draw.randrange(1, 9)]
        elif action == 1:
            out[at:at] = bytes(
                draw.choice((0, 0x7F, 0x80, 0xFF, draw.randrange(256))) for _ in range(draw.randrange(1, 9))
            )
        elif action == 2 and draw.random() < 0.3:
            del out[at:]
        elif at < len(out):
            out[at] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, out[at] ^ (1 << draw.randrange(8))))
    return bytes(out)
