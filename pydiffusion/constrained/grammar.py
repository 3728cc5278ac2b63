"""GBNF, the grammar format of llama.cpp: text to rules over characters.

The syntax is that of llama.cpp's grammars/README.md. Rules are references by name, so that they may be
recursive; ``grammar_dfa`` compiles them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn, TypeAlias

from .character_classes import Ranges, complement, union

_NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", '"': '"', "[": "[", "]": "]"}
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}
_LAST_CODE_POINT = 0x10FFFF
_SURROGATES = (0xD800, 0xDFFF)
# Limit on the bounds of a repetition; llama.cpp's own is 2000.
_MAX_REPETITION = 10_000
_MAX_RULES = 5000


@dataclass(frozen=True, eq=False)
class Characters:
    """One character of these code points."""

    ranges: Ranges


@dataclass(frozen=True, eq=False)
class Sequence:
    items: tuple[Node, ...]


@dataclass(frozen=True, eq=False)
class Choice:
    items: tuple[Node, ...]


@dataclass(frozen=True, eq=False)
class Repetition:
    """``low`` to ``high`` times the item; None for unbounded."""

    item: Node
    low: int
    high: int | None


@dataclass(frozen=True, eq=False)
class Reference:
    """The rule of this name."""

    rule: str


Node: TypeAlias = Characters | Sequence | Choice | Repetition | Reference


@dataclass(frozen=True, eq=False)
class Grammar:
    """Rules by name; a text has to match the rule ``root``."""

    rules: dict[str, Node]


def parse_grammar(text: str) -> Grammar:
    """Parse GBNF. Raises ValueError, with line and column, for what is invalid or not supported: token
    references, left recursion.
    """
    parser = _Parser(text)
    try:
        rules = parser.grammar()
    except RecursionError:
        raise ValueError("it has too many nested parentheses") from None
    if "root" not in rules:
        found = f"; it has {', '.join(list(rules)[:5])}" if rules else ""
        raise ValueError(f"there is no rule 'root', which the whole text has to match{found}")
    parser.check_references(rules)
    _refuse_left_recursion(rules)
    return Grammar(rules)


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._references: list[tuple[str, int]] = []  # rule and position

    def grammar(self) -> dict[str, Node]:
        rules: dict[str, Node] = {}
        self._skip(lines=True)
        while self._at < len(self._text):
            begin = self._at
            name = self._name("a rule")
            if name in rules:
                self._fail(f"the rule {name!r} is defined twice", begin)
            self._skip()
            if not self._take("::="):
                self._fail(f"expected '::=' after the rule's name {name!r}")
            self._skip(lines=True)
            if len(rules) == _MAX_RULES:
                self._fail(f"it has more than {_MAX_RULES} rules", begin)
            rules[name] = self._choice(nested=False)
            if self._at < len(self._text) and self._peek() not in "\r\n":
                self._fail(f"expected the end of the rule {name!r}, not {self._peek()!r}")
            self._skip(lines=True)
        return rules

    def check_references(self, rules: dict[str, Node]) -> None:
        for name, at in self._references:
            if name not in rules:
                self._fail(f"the rule {name!r} is not defined", at)

    def _choice(self, nested: bool) -> Node:
        items = [self._sequence(nested)]
        while self._next_is_another():
            self._skip(lines=True)
            items.append(self._sequence(nested))
        return items[0] if len(items) == 1 else Choice(tuple(items))

    def _next_is_another(self) -> bool:
        """Take a ``|``, which may begin the next line."""
        before = self._at
        self._skip(lines=True)
        if self._take("|"):
            return True
        self._at = before
        return False

    def _sequence(self, nested: bool) -> Node:
        items: list[Node] = []
        while True:
            character = self._peek()
            if character and character in "*+?{":
                if not items:
                    self._fail(f"nothing precedes {character!r} that could be repeated")
                items[-1] = self._repetition(items[-1])
            else:
                item = self._item(character)
                if item is None:
                    return items[0] if len(items) == 1 else Sequence(tuple(items))
                items.append(item)
            self._skip(lines=nested)

    def _item(self, character: str) -> Node | None:
        """The next item; None if the sequence ends here."""
        if character == '"':
            return self._literal()
        if character == "[":
            return self._class()
        if character == ".":
            self._at += 1
            return Characters([(0, _LAST_CODE_POINT)])
        if character == "(":
            return self._group()
        if character in ("<", "!"):
            self._fail("a reference to a token (<[id]>, <text>) is not supported: write its text, in quotes")
        if character and character in _NAME:
            begin = self._at
            name = self._name("a rule")
            self._references.append((name, begin))
            return Reference(name)
        return None

    def _group(self) -> Node:
        begin = self._at
        self._at += 1
        self._skip(lines=True)
        item = self._choice(nested=True)
        self._skip(lines=True)
        if not self._take(")"):
            self._fail("this parenthesis is not closed", begin)
        return item

    def _literal(self) -> Node:
        begin = self._at
        self._at += 1
        items = []
        while not self._take('"'):
            if not self._peek() or self._peek() in "\r\n":
                self._fail("this string is not closed", begin)
            code = self._character()
            items.append(Characters([(code, code)]))
        return Sequence(tuple(items))

    def _class(self) -> Node:
        begin = self._at
        self._at += 1
        negated = self._take("^")
        ranges: Ranges = []
        while not self._take("]"):
            if not self._peek() or self._peek() in "\r\n":
                self._fail("this class is not closed", begin)
            start = self._at
            low = high = self._character()
            if self._peek() == "-" and self._text[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                high = self._character()
            if low > high:
                self._fail("this range ends before it begins", start)
            ranges.append((low, high))
        found = complement(ranges) if negated else union(ranges)
        if not complement([*complement(found), _SURROGATES]):
            self._fail("no character is in this class", begin)
        return Characters(found)

    def _character(self) -> int:
        """One code point of a string or class."""
        begin, character = self._at, self._peek()
        self._at += 1
        if character != "\\":
            return ord(character)
        letter = self._peek()
        self._at += 1
        if letter in _ESCAPES:
            return ord(_ESCAPES[letter])
        n_digits = _HEX_DIGITS.get(letter)
        if n_digits is None:
            known = 'n r t \\ " [ ] xNN uNNNN UNNNNNNNN'
            self._fail(f"'\\{letter}' is not an escape; known after a backslash are {known}", begin)
        digits = self._text[self._at : self._at + n_digits]
        self._at += n_digits
        if len(digits) < n_digits or any(digit not in "0123456789abcdefABCDEF" for digit in digits):
            self._fail(f"'\\{letter}' takes {n_digits} hexadecimal digits, not {digits!r}", begin)
        code = int(digits, 16)
        if code > _LAST_CODE_POINT or _SURROGATES[0] <= code <= _SURROGATES[1]:
            self._fail(f"{digits} is not the number of a character", begin)
        return code

    def _repetition(self, item: Node) -> Node:
        begin, kind = self._at, self._peek()
        self._at += 1
        if kind != "{":
            return Repetition(item, int(kind == "+"), 1 if kind == "?" else None)
        self._skip(lines=True)
        low = self._count()
        high: int | None = low
        self._skip(lines=True)
        if self._take(","):
            self._skip(lines=True)
            high = None if self._peek() == "}" else self._count()
            self._skip(lines=True)
        if not self._take("}"):
            self._fail("expected '}' after the numbers of a repetition")
        if high is not None and low > high:
            self._fail(f"this repetition is of at least {low} and at most {high}", begin)
        return Repetition(item, low, high)

    def _count(self) -> int:
        begin = self._at
        while self._peek() and self._peek() in "0123456789":
            self._at += 1
        digits = self._text[begin : self._at]
        if not digits:
            self._fail("expected a number of repetitions")
        if len(digits) > 9 or int(digits) > _MAX_REPETITION:
            self._fail(f"{digits[:20]} repetitions are too many; the limit is {_MAX_REPETITION}", begin)
        return int(digits)

    def _name(self, what: str) -> str:
        begin = self._at
        while self._peek() and self._peek() in _NAME:
            self._at += 1
        if begin == self._at:
            found = repr(self._peek()) if self._peek() else "the end"
            self._fail(f"expected the name of {what}, not {found}")
        return self._text[begin : self._at]

    def _skip(self, lines: bool = False) -> None:
        """Skip spaces and comments; with ``lines`` also newlines."""
        while character := self._peek():
            if character == "#":
                while self._peek() and self._peek() not in "\r\n":
                    self._at += 1
            elif character in (" \t\r\n" if lines else " \t"):
                self._at += 1
            else:
                return

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _take(self, text: str) -> bool:
        found = self._text.startswith(text, self._at)
        self._at += len(text) * found
        return found

    def _fail(self, what: str, at: int | None = None) -> NoReturn:
        """at: position of the error; by default the current one."""
        at = min(self._at if at is None else at, len(self._text))
        line = self._text.count("\n", 0, at) + 1
        column = at - (self._text.rfind("\n", 0, at) + 1) + 1
        raise ValueError(f"line {line}, column {column}: {what}")


def _refuse_left_recursion(rules: dict[str, Node]) -> None:
    """A rule that may begin with itself has no expansion of limited depth that reads like it."""
    optional = _optional_rules(rules)
    first = {name: list(dict.fromkeys(_first_references(node, optional))) for name, node in rules.items()}
    for _, name in cycle_edges(first, rules):
        raise ValueError(
            f"the rule {name!r} is left-recursive (it may begin with itself), which is not"
            " supported: write a repetition, as in 'sum ::= term (\"+\" term)*'"
        )


def cycle_edges(references: Mapping[str, Iterable[str]], roots: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Pairs of a rule and one that it refers to which close a cycle, found in depth from the roots: every
    recursion uses such a pair.
    """
    finished: set[str] = set()
    for root in roots:
        path: dict[str, Iterator[str]] = {} if root in finished else {root: iter(references[root])}
        while path:
            name = next(reversed(path))
            following = next(path[name], None)
            if following is None:
                finished.add(name)
                del path[name]
            elif following in path:
                yield name, following
            elif following not in finished:
                path[following] = iter(references[following])


def _optional_rules(rules: dict[str, Node]) -> set[str]:
    """Rules that match the empty text."""
    optional: set[str] = set()
    names = list(rules)
    while True:
        before = len(optional)
        for name in names:
            if name not in optional and _may_be_empty(rules[name], optional):
                optional.add(name)
        if len(optional) == before:
            return optional
        names.reverse()  # a chain of rules, in whichever order, takes two rounds


def _may_be_empty(node: Node, optional: set[str]) -> bool:
    if isinstance(node, Reference):
        return node.rule in optional
    if isinstance(node, Sequence):
        return all(_may_be_empty(item, optional) for item in node.items)
    if isinstance(node, Choice):
        return any(_may_be_empty(item, optional) for item in node.items)
    return isinstance(node, Repetition) and (node.low == 0 or _may_be_empty(node.item, optional))


def _first_references(node: Node, optional: set[str]) -> Iterator[str]:
    """Rules whose text may be at the beginning of the node's."""
    if isinstance(node, Reference):
        yield node.rule
    elif isinstance(node, Repetition):
        yield from _first_references(node.item, optional) if node.high != 0 else ()
    elif isinstance(node, (Sequence, Choice)):
        for item in node.items:
            yield from _first_references(item, optional)
            if isinstance(node, Sequence) and not _may_be_empty(item, optional):
                return
