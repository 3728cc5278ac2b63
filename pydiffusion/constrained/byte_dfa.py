"""Compile a regular expression to a minimal DFA over UTF-8 bytes.

Existing libraries go through the model's whole vocabulary and take minutes for a string of limited length
(outlines-core 0.2). This is small: Python's own parser, Thompson's construction and subset construction, with
a limit on the number of states.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np

from .character_classes import Ranges, complement, ranges_of_class
from .multiples import multiple_of, multiple_table
from .regex import parse
from .regex_parser import sre

# With more states, the path search would take longer than a denoising step of most models.
MAX_STATES = 12_000
# Limits on what the construction looks at, some seconds and some hundred MB: a short expression with many
# parts that may be empty has few states, each of which stands for thousands of others.
_MAX_REACHED = 2_000_000
_MAX_COMPARED = 60_000_000
_SURROGATES = (0xD800, 0xDFFF)
# In an expression, single surrogates from the first on stand for the markers of a chat format: tokens that no
# text has. In the table they are the bytes that UTF-8 never has.
FIRST_MARKER, MAX_MARKERS = 0xD800, 8
FIRST_MARKER_BYTE = 0xF8
_Edge: TypeAlias = tuple[int, int, int]  # first byte, last byte + 1, next state
_Kind: TypeAlias = tuple[bool, int, bool]  # accepting, limit, counts: see ByteDfa
_UTF8_ENDS = (0x7F, 0x7FF, 0xFFFF, 0x10FFFF)  # the last code point of one, two, three, four bytes


@dataclass(frozen=True, eq=False)
class ByteDfa:
    """DFA over bytes. State 0 is the initial one.

    table: transitions, int32 (n_states + 1, 256), in which n_states is the dead state.
    accepting: bool (n_states,).
    limits: maximum number of characters of the counted repetition that a state is in, 0 for none, int64
        (n_states,). The states don't count; whoever runs them has to.
    counts: whether a transition from this state to one with a limit begins a character, bool (n_states,).
    """

    table: np.ndarray
    accepting: np.ndarray
    limits: np.ndarray
    counts: np.ndarray

    def accepts(self, text: bytes) -> bool:
        """Whether the text is one of the machine's; counted repetitions are taken as unlimited."""
        state = 0
        for byte in text:
            state = int(self.table[state, byte])
        return state < len(self.accepting) and bool(self.accepting[state])


def byte_dfa(expression: str) -> ByteDfa:
    """Compile an expression. Raises ValueError if it gets too large.

    Beside what ``regex`` describes it knows, with the meaning that Python's re gives them:
    - look-aheads ``(?=...)`` and ``(?!...)`` that begin a capturing group, whose content is all of the
      group's text and one character (or ``\\Z``) that follows it in every text: both hold for the text;
    - lazy repetitions ``x{m,n}?`` of a character: counted repetitions, see ``ByteDfa``;
    - conditions of ``multiples``.
    """
    return _machine(parse(expression))


def _machine(items: Iterable[Any]) -> ByteDfa:
    nfa = Nfa()
    start = nfa.new()
    end = nfa.sequence(items, start)
    if nfa.has_intersections:
        nfa.prune(start, end)
    return deterministic(nfa, start, end)


def restricted(machine: ByteDfa, table: np.ndarray, accepting: np.ndarray, is_not: bool = False) -> ByteDfa:
    """The machine's texts that the other one accepts too, or with ``is_not`` does not accept.

    table, accepting: as of ByteDfa, the other one. Raises TooLarge.
    """
    dead, other_dead = len(machine.accepting), len(accepting)
    accepts = np.append(accepting, False) ^ is_not
    n_others = other_dead + 1
    queue = [0]  # pairs of states, as numbers
    numbers = {0: 0}
    rows: list[np.ndarray] = []
    while len(rows) < len(queue):
        state, other = divmod(queue[len(rows)], n_others)
        pairs = machine.table[state].astype(np.int64) * n_others + table[other]
        is_dead = machine.table[state] == dead
        if not is_not:
            is_dead |= table[other] == other_dead
        pairs[is_dead] = -1
        row = np.empty(256, dtype=np.int32)
        for pair in np.unique(pairs).tolist():
            if pair >= 0 and pair not in numbers:
                numbers[pair] = len(queue)
                queue.append(pair)
                if len(queue) > MAX_STATES:
                    raise TooLarge(MAX_STATES)
            row[pairs == pair] = numbers.get(pair, -1)
        rows.append(row)
    found = np.array([*rows, np.full(256, -1, dtype=np.int32)])
    found[found < 0] = len(rows)
    states, others = np.divmod(np.array(queue), n_others)
    return ByteDfa(
        found, machine.accepting[states] & accepts[others], machine.limits[states], machine.counts[states]
    )


class TooLarge(ValueError):
    """An automaton has too many states."""

    def __init__(self, limit: int, what: str = "states") -> None:
        super().__init__(f"it is too large (more than {limit} {what})")


class Nfa:
    """NFA with transitions on byte ranges and epsilon transitions."""

    def __init__(self) -> None:
        self.on_bytes: list[list[tuple[int, int, int]]] = []
        self.on_nothing: list[list[int]] = []
        self.has_intersections = False
        # state within a counted repetition -> its limit, and whether a character begins here
        self.counted: dict[int, tuple[int, bool]] = {}

    def new(self) -> int:
        self.on_bytes.append([])
        self.on_nothing.append([])
        if len(self.on_bytes) > 40 * MAX_STATES:
            raise TooLarge(40 * MAX_STATES)
        return len(self.on_bytes) - 1

    def sequence(self, items: Iterable[Any], state: int) -> int:
        """Append the items after a state; returns the state after them."""
        items = list(items)
        for i, (operation, value) in enumerate(items):
            if operation in (sre.ASSERT, sre.ASSERT_NOT):
                return self._intersection(operation is sre.ASSERT_NOT, value[1], items[i + 1 :], state)
            state = self._item(operation, value, state)
        return state

    def _intersection(self, is_not: bool, condition: Any, items: list[Any], state: int) -> int:
        """Append the items, restricted to texts for which a look-ahead's condition holds."""
        self.has_intersections = True
        multiple = multiple_of(condition)
        if multiple is not None:
            return self._insert(restricted(_machine(items), *multiple_table(multiple)), state)
        other = _machine(list(condition)[:-1])  # without the character that follows
        return self._insert(restricted(_machine(items), other.table, other.accepting, is_not), state)

    def _insert(self, machine: ByteDfa, state: int) -> int:
        """Append a DFA."""
        first = len(self.on_bytes)
        for _ in machine.accepting:
            self.new()
        end = self.new()
        self.on_nothing[state].append(first)
        for i, row in enumerate(machine.table[:-1]):
            borders = [0, *(np.flatnonzero(np.diff(row)) + 1).tolist(), 256]
            for low, behind in pairwise(borders):
                if row[low] != len(machine.accepting):
                    self.on_bytes[first + i].append((low, behind - 1, first + int(row[low])))
            if machine.accepting[i]:
                self.on_nothing[first + i].append(end)
            if machine.limits[i]:
                self.counted[first + i] = int(machine.limits[i]), bool(machine.counts[i])
        return end

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
        if operation is sre.MIN_REPEAT:
            return self._counted_repeat(value, state)
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

    def _counted_repeat(self, value: Any, state: int) -> int:
        low, high, items = value
        for _ in range(low):
            state = self.sequence(items, state)
        first = len(self.on_bytes)
        end = self._repeat((0, sre.MAXREPEAT, items), state)
        self.count(first, self.on_nothing[end], high - low)  # nothing follows the repetition yet
        self.counted.pop(end)
        return end

    def count(self, first: int, begins: list[int], limit: int) -> None:
        """Limit how often one passes through the states from ``first`` on, all those of one item, that begin
        at ``begins``.
        """
        beginning = self._after_nothing(begins)
        for inside in range(first, len(self.on_bytes)):
            self.counted[inside] = limit, inside in beginning

    def _after_nothing(self, states: list[int]) -> set[int]:
        found, stack = set(states), list(states)
        while stack:
            for following in self.on_nothing[stack.pop()]:
                if following not in found:
                    found.add(following)
                    stack.append(following)
        return found

    def characters(self, ranges: Ranges, state: int, end: int | None = None) -> int:
        """Add a class of characters, to a new state or ``end``; returns it. Equal suffixes of multi-byte
        sequences share their states.
        """
        end = self.new() if end is None else end
        rest_to_state: dict[tuple[tuple[int, int], ...], int] = {(): end}
        for low, high in ranges:
            if low >= FIRST_MARKER and high < FIRST_MARKER + MAX_MARKERS:
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
        self._n_reached = 0

    def of(self, state: int) -> frozenset[int]:
        found = self._found.get(state)
        if found is None:
            seen, stack = {state}, [state]
            while stack:
                for following in self._nfa.on_nothing[stack.pop()]:
                    if following not in seen:
                        seen.add(following)
                        stack.append(following)
            self._n_reached += len(seen)
            if self._n_reached > _MAX_REACHED:
                raise TooLarge(_MAX_REACHED, "ways through parts that may be empty")
            kept = (s for s in seen if self._nfa.on_bytes[s] or s == self._end)
            found = self._found[state] = frozenset(kept)
        return found


def deterministic(nfa: Nfa, start: int, end: int, limit: int | None = None) -> ByteDfa:
    """DFA by the subset construction.

    limit: maximum number of states, MAX_STATES or fewer. Raises TooLarge.
    """
    limit = MAX_STATES if limit is None else limit
    closures = _Closures(nfa, end)
    queue = [closures.of(start)]
    numbers = {queue[0]: 0}
    rows: list[list[_Edge]] = []
    n_compared = 0
    while len(rows) < len(queue):
        edges = [edge for state in queue[len(rows)] for edge in nfa.on_bytes[state]]
        borders = sorted({edge[0] for edge in edges} | {edge[1] + 1 for edge in edges})
        n_compared += len(edges) * len(borders)
        row = []
        for first, behind in pairwise(borders):
            targets = [closures.of(t) for low, high, t in edges if low <= first <= high]
            if not targets:
                continue
            n_compared += sum(map(len, targets))
            if n_compared > _MAX_COMPARED:
                raise TooLarge(_MAX_COMPARED, "transitions to compare")
            target = targets[0] if len(targets) == 1 else frozenset().union(*targets)
            if target not in numbers:
                numbers[target] = len(queue)
                queue.append(target)
                if len(queue) > limit:
                    raise TooLarge(limit)
            row.append((first, behind, numbers[target]))
        rows.append(row)
    rows, kinds = _merged(rows, [_kind(nfa, states, end) for states in queue])
    table = np.full((len(rows) + 1, 256), len(rows), dtype=np.int32)
    for state, row in enumerate(rows):
        for first, behind, next_state in row:
            table[state, first:behind] = next_state
    accepting, limits, counts = map(np.array, zip(*kinds, strict=True))
    return ByteDfa(table, accepting, limits, counts)


def _kind(nfa: Nfa, states: frozenset[int], end: int) -> _Kind:
    """Of several limits, the lowest holds: an ambiguous state may allow less than one of them."""
    counted = [nfa.counted[state] for state in states if state in nfa.counted] if nfa.counted else []
    if not counted:
        return end in states, 0, False
    return end in states, min(limit for limit, _ in counted), any(begins for _, begins in counted)


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


def _merged(rows: list[list[_Edge]], kinds: list[_Kind]) -> tuple[list[list[_Edge]], list[_Kind]]:
    """Minimize: merge states of equal kind with equal transitions, repeatedly. Until here every
    position of the expression has its own states, even if it continues as another one does.
    """
    merging = _Merging(len(rows))
    sources: list[list[int]] = [[] for _ in rows]
    for state, row in enumerate(rows):
        for _, _, target in row:
            sources[target].append(state)
    key_to_state: dict[tuple[_Kind, tuple[_Edge, ...]], int] = {}
    to_do = list(range(len(rows)))  # from the end: states found last are usually near an end
    while to_do:
        state = to_do.pop()
        if merging.same(state) != state:
            continue
        found = key_to_state.setdefault((kinds[state], merging.row(rows[state])), state)
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
    return merged_rows, [kinds[state] for state in kept]
