"""Compile a regular expression to a minimal DFA over UTF-8 bytes.

Existing libraries go through the model's whole vocabulary and take minutes for a string of limited length
(outlines-core 0.2). This is small: Python's own parser, Thompson's construction and subset construction, with
a limit on the number of states.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np

from .character_classes import Ranges, complement, ranges_of_class
from .regex import parse
from .regex_parser import sre

# With more states, the path search would take longer than a denoising step of most models.
MAX_STATES = 12_000
_SURROGATES = (0xD800, 0xDFFF)
# In an expression, single surrogates from the first on stand for the markers of a chat format: tokens that no
# text has. In the table they are the bytes that UTF-8 never has.
FIRST_MARKER, MAX_MARKERS = 0xD800, 8
FIRST_MARKER_BYTE = 0xF8
_Edge: TypeAlias = tuple[int, int, int]  # first byte, last byte + 1, next state
_UTF8_ENDS = (0x7F, 0x7FF, 0xFFFF, 0x10FFFF)  # the last code point of one, two, three, four bytes


def byte_dfa(expression: str) -> tuple[np.ndarray, np.ndarray]:
    """Compile an expression. Returns the transition table, int32 (n_states + 1, 256), in which n_states is
    the dead state, and the accepting states, bool (n_states,). State 0 is the initial one.

    Raises ValueError if it gets too large.
    """
    nfa = Nfa()
    start = nfa.new()
    end = nfa.sequence(parse(expression), start)
    return deterministic(nfa, start, end)


class TooLarge(ValueError):
    """An automaton has too many states."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"it is too large (more than {limit} states)")


class Nfa:
    """NFA with transitions on byte ranges and epsilon transitions."""

    def __init__(self) -> None:
        self.on_bytes: list[list[tuple[int, int, int]]] = []
        self.on_nothing: list[list[int]] = []

    def new(self) -> int:
        self.on_bytes.append([])
        self.on_nothing.append([])
        if len(self.on_bytes) > 40 * MAX_STATES:
            raise TooLarge(40 * MAX_STATES)
        return len(self.on_bytes) - 1

    def sequence(self, items: Iterable[Any], state: int) -> int:
        """Append the items after a state; returns the state after them."""
        for operation, value in items:
            state = self._item(operation, value, state)
        return state

    def _item(self, operation: Any, value: Any, state: int) -> int:
        if operation is sre.LITERAL:
            return self.characters([(value, value)], state)
        if operation is sre.NOT_LITERAL:
            return self.characters(complement([(value, value)]), state)
        if operation is sre.IN:
            return self.characters(ranges_of_class(value), state)
        if operation is sre.SUBPATTERN:
            return self.sequence(value[3], state)
        if operation is sre.BRANCH:
            end = self.new()
            for branch in value[1]:
                begin = self.new()
                self.on_nothing[state].append(begin)
                self.on_nothing[self.sequence(branch, begin)].append(end)
            return end
        assert operation is sre.MAX_REPEAT, operation  # regex.py emits nothing else
        return self._repeat(value, state)

    def _repeat(self, value: Any, state: int) -> int:
        low, high, items = value
        for _ in range(low):
            state = self.sequence(items, state)
        end = self.new()
        self.on_nothing[state].append(end)
        if high is sre.MAXREPEAT:
            begin = self.new()
            self.on_nothing[end].append(begin)
            self.on_nothing[self.sequence(items, begin)].append(end)
            return end
        for _ in range(high - low):
            state = self.sequence(items, state)
            self.on_nothing[state].append(end)
        return end

    def characters(self, ranges: Ranges, state: int, end: int | None = None) -> int:
        """Add a class of characters, to a new state or ``end``; returns it. Equal suffixes of multi-byte
        sequences share their states.
        """
        end = self.new() if end is None else end
        rest_to_state: dict[tuple[tuple[int, int], ...], int] = {(): end}
        for low, high in ranges:
            if FIRST_MARKER <= low and high < FIRST_MARKER + MAX_MARKERS:
                first = FIRST_MARKER_BYTE - FIRST_MARKER
                self.on_bytes[state].append((first + low, first + high, end))
                continue
            for parts in _utf8(low, high):
                at = state
                for i, (first, last) in enumerate(parts):
                    rest = tuple(parts[i + 1 :])
                    is_new = rest not in rest_to_state
                    if is_new:
                        rest_to_state[rest] = self.new()
                    self.on_bytes[at].append((first, last, rest_to_state[rest]))
                    if not is_new:
                        break  # what follows it exists already
                    at = rest_to_state[rest]
        return end

    def is_dead(self, state: int) -> bool:
        """Whether nothing follows a state."""
        return not (self.on_bytes[state] or self.on_nothing[state])

    def prune(self, start: int, end: int) -> None:
        """Remove the transitions to states from which ``end`` is out of reach."""
        sources: list[list[int]] = [[] for _ in self.on_bytes]
        for state, (edges, following) in enumerate(zip(self.on_bytes, self.on_nothing, strict=True)):
            for target in [*following, *(edge[2] for edge in edges)]:
                sources[target].append(state)
        alive, stack = {end}, [end]
        while stack:
            for source in sources[stack.pop()]:
                if source not in alive:
                    alive.add(source)
                    stack.append(source)
        self.on_bytes = [[edge for edge in edges if edge[2] in alive] for edges in self.on_bytes]
        self.on_nothing = [[t for t in following if t in alive] for following in self.on_nothing]


def _utf8(low: int, high: int) -> Iterator[list[tuple[int, int]]]:
    """Sequences of byte ranges that encode the code points from low to high, without surrogates."""
    if low <= _SURROGATES[1] and high >= _SURROGATES[0]:
        if low < _SURROGATES[0]:
            yield from _utf8(low, _SURROGATES[0] - 1)
        if high > _SURROGATES[1]:
            yield from _utf8(_SURROGATES[1] + 1, high)
        return
    for end in _UTF8_ENDS:
        if low <= end < high:
            yield from _utf8(low, end)
            yield from _utf8(end + 1, high)
            return
    # All of one length now: split until all but one of the trailing bytes cover their whole range.
    for n_bits in (6, 12, 18):
        mask = (1 << n_bits) - 1
        if high > 0x7F and low & ~mask != high & ~mask:
            if low & mask:
                yield from _utf8(low, low | mask)
                yield from _utf8((low | mask) + 1, high)
                return
            if high & mask != mask:
                yield from _utf8(low, (high & ~mask) - 1)
                yield from _utf8(high & ~mask, high)
                return
    yield list(zip(chr(low).encode(), chr(high).encode(), strict=True))


class _Closures:
    """Epsilon closures, reduced to the states that read bytes and the final one."""

    def __init__(self, nfa: Nfa, end: int) -> None:
        self._nfa = nfa
        self._end = end
        self._found: dict[int, frozenset[int]] = {}

    def of(self, state: int) -> frozenset[int]:
        found = self._found.get(state)
        if found is None:
            seen, stack = {state}, [state]
            while stack:
                for following in self._nfa.on_nothing[stack.pop()]:
                    if following not in seen:
                        seen.add(following)
                        stack.append(following)
            kept = (s for s in seen if self._nfa.on_bytes[s] or s == self._end)
            found = self._found[state] = frozenset(kept)
        return found


def deterministic(nfa: Nfa, start: int, end: int, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Transition table (n_states + 1, 256) and accepting states, by the subset construction.

    limit: maximum number of states, MAX_STATES or fewer. Raises TooLarge.
    """
    limit = MAX_STATES if limit is None else limit
    closures = _Closures(nfa, end)
    queue = [closures.of(start)]
    numbers = {queue[0]: 0}
    rows: list[list[_Edge]] = []
    while len(rows) < len(queue):
        edges = [edge for state in queue[len(rows)] for edge in nfa.on_bytes[state]]
        borders = sorted({edge[0] for edge in edges} | {edge[1] + 1 for edge in edges})
        row = []
        for first, behind in pairwise(borders):
            targets = [closures.of(t) for low, high, t in edges if low <= first <= high]
            if not targets:
                continue
            target = targets[0] if len(targets) == 1 else frozenset().union(*targets)
            if target not in numbers:
                numbers[target] = len(queue)
                queue.append(target)
                if len(queue) > limit:
                    raise TooLarge(limit)
            row.append((first, behind, numbers[target]))
        rows.append(row)
    rows, accepting = _merged(rows, [end in states for states in queue])
    table = np.full((len(rows) + 1, 256), len(rows), dtype=np.int32)
    for state, row in enumerate(rows):
        for first, behind, next_state in row:
            table[state, first:behind] = next_state
    return table, np.array(accepting)


class _Merging:
    """States merged so far: a forest whose roots stand for all below them."""

    def __init__(self, n_states: int) -> None:
        self._same = list(range(n_states))

    def merge(self, state: int, into: int) -> None:
        self._same[state] = into

    def same(self, state: int) -> int:
        """The state that this one was merged into."""
        while self._same[state] != state:
            self._same[state] = state = self._same[self._same[state]]
        return state

    def row(self, row: list[_Edge]) -> tuple[_Edge, ...]:
        """Transitions between merged states, adjacent byte ranges joined."""
        edges: list[_Edge] = []
        for first, behind, target in row:
            target = self.same(target)
            if edges and edges[-1][1:] == (first, target):
                first = edges.pop()[0]
            edges.append((first, behind, target))
        return tuple(edges)


def _merged(rows: list[list[_Edge]], accepting: list[bool]) -> tuple[list[list[_Edge]], list[bool]]:
    """Minimize: merge states with equal acceptance and equal transitions, repeatedly. Until here every
    position of the expression has its own states, even if it continues as another one does.
    """
    merging = _Merging(len(rows))
    sources: list[list[int]] = [[] for _ in rows]
    for state, row in enumerate(rows):
        for _, _, target in row:
            sources[target].append(state)
    key_to_state: dict[tuple[bool, tuple[_Edge, ...]], int] = {}
    to_do = list(range(len(rows)))  # from the end: states found last are usually near an end
    while to_do:
        state = to_do.pop()
        if merging.same(state) != state:
            continue
        found = key_to_state.setdefault((accepting[state], merging.row(rows[state])), state)
        if found != state:
            merging.merge(state, found)
            sources[found] += sources[state]
            to_do += sources[state]
    # The initial state stays first.
    kept = list(dict.fromkeys(merging.same(state) for state in range(len(rows))))
    numbers = {state: i for i, state in enumerate(kept)}
    merged_rows = [
        [(first, behind, numbers[target]) for first, behind, target in merging.row(rows[state])]
        for state in kept
    ]
    return merged_rows, [accepting[state] for state in kept]
