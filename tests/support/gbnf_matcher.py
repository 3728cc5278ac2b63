"""Match a text against a GBNF grammar by backtracking: written from llama.cpp's description of the format,
without anything of pydiffusion's, to check it from outside.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n]+|\#[^\n]*)|(?P<rule>[A-Za-z0-9_-]+)[ \t]*::=|(?P<name>[A-Za-z0-9_-]+)
    |(?P<string>"(?:[^"\\]|\\.)*")|(?P<class>\[\^?(?:[^\]\\]|\\.)*\])
    |(?P<count>\{\s*[0-9]*\s*(?:,\s*[0-9]*\s*)?\})|(?P<sign>[|()*+?.])""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPE = re.compile(r"\\(?:x(..)|u(....)|U(........)|(.))", re.DOTALL)
Ends = Callable[[str, int], frozenset[int]]  # text and where to begin -> where a match may end


def matches(grammar: str, text: str) -> bool:
    """Whether the rule ``root`` matches all of the text."""
    rules = _compile(grammar)
    return len(text) in rules["root"](text, 0)


@cache
def _compile(grammar: str) -> dict[str, Ends]:
    tokens, at = [], 0
    while at < len(grammar):
        found = _TOKEN.match(grammar, at)
        assert found, grammar[at : at + 20]
        at = found.end()
        if found.lastgroup != "space":
            tokens.append((str(found.lastgroup), found.group(str(found.lastgroup))))
    rules: dict[str, Ends] = {}
    while tokens:
        _, name = tokens.pop(0)
        rules[name] = _memoized(_alternatives(tokens, rules))
    return rules


def _memoized(rule: Ends) -> Ends:
    return cache(rule)


def _alternatives(tokens: list[tuple[str, str]], rules: dict[str, Ends]) -> Ends:
    found = [_sequence(tokens, rules)]
    while tokens and tokens[0] == ("sign", "|"):
        tokens.pop(0)
        found.append(_sequence(tokens, rules))
    return lambda text, at: frozenset().union(*(each(text, at) for each in found))


def _sequence(tokens: list[tuple[str, str]], rules: dict[str, Ends]) -> Ends:
    items: list[Ends] = []
    while tokens and tokens[0][0] != "rule" and tokens[0] not in (("sign", "|"), ("sign", ")")):
        kind, value = tokens.pop(0)
        if kind == "count" or (kind == "sign" and value in "*+?"):
            items[-1] = _repeated(items[-1], value)
        else:
            items.append(_item(kind, value, tokens, rules))

    def run(text: str, at: int) -> frozenset[int]:
        ends = frozenset((at,))
        for item in items:
            ends = frozenset().union(*(item(text, end) for end in ends))
        return ends

    return run


def _item(kind: str, value: str, tokens: list[tuple[str, str]], rules: dict[str, Ends]) -> Ends:
    if kind == "name":
        return lambda text, at: rules[value](text, at)
    if kind == "string":
        literal = _ESCAPE.sub(_unescape, value[1:-1])
        return lambda text, at: frozenset((at + len(literal),) if text.startswith(literal, at) else ())
    if kind == "class":
        # Python's classes have the same ranges; every character is written by its number.
        inner = value[2:-1] if value[1] == "^" else value[1:-1]
        parts = [part.group() for part in re.finditer(_ESCAPE.pattern + "|.", inner, re.DOTALL)]
        codes = [_ESCAPE.sub(_unescape, part) for part in parts]
        spelled = "".join(
            "-" if part == "-" and 0 < i < len(parts) - 1 else f"\\U{ord(code):08x}"
            for i, (part, code) in enumerate(zip(parts, codes, strict=True))
        )
        one = re.compile("[" + "^" * (value[1] == "^") + spelled + "]")
        return lambda text, at: frozenset((at + 1,) if one.match(text, at) else ())
    if value == ".":
        return lambda text, at: frozenset((at + 1,) if at < len(text) else ())
    assert value == "(", value
    inside = _alternatives(tokens, rules)
    assert tokens.pop(0) == ("sign", ")")
    return inside


def _repeated(item: Ends, how: str) -> Ends:
    if how in "*+?":
        low, high = {"*": (0, 10**9), "+": (1, 10**9), "?": (0, 1)}[how]
    else:
        numbers = [part.strip() for part in how[1:-1].split(",")]
        low, high = int(numbers[0]), int(numbers[-1] or 10**9)

    def run(text: str, at: int) -> frozenset[int]:
        found: set[int] = set()
        ends, count = frozenset((at,)), 0
        seen: set[frozenset[int]] = set()
        while ends and count <= high:
            if count >= low:
                found |= ends
                if ends in seen:
                    break
                seen.add(ends)
            ends = frozenset().union(*(item(text, end) for end in ends))
            count += 1
        return frozenset(found)

    return run


def _unescape(escape: re.Match[str]) -> str:
    digits = escape[1] or escape[2] or escape[3]
    if digits:
        return chr(int(digits, 16))
    return {"n": "\n", "r": "\r", "t": "\t"}.get(escape[4], escape[4])
