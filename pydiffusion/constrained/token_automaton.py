"""Token automaton: the byte DFA of an expression or grammar lifted to the tokens of a vocabulary."""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .byte_dfa import FIRST_MARKER_BYTE, byte_dfa
from .counting import Counter, Counts
from .grammar import Grammar
from .grammar_dfa import grammar_dfa

if TYPE_CHECKING:
    from pydiffusion.tokenizer import Tokenizer

_NOWHERE = (np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))


class Automaton:
    """Automaton over tokens with states 0 to n_states - 1; 0 is the initial one.

    accepting: whether the text may end in a state, bool (n_states,).
    alphabet: tokens that can spell every accepted text.
    tokens_left: length, in tokens of the alphabet, of the shortest path from a state to an end, or -1.
    """

    def __init__(
        self,
        expression: str | Grammar,
        tokenizer: Tokenizer,
        ends: Collection[int] = (),
        markers: Sequence[str] = (),
    ) -> None:
        """expression: as from regex.py, or a grammar. ends: tokens that end a text, and so never are in it.
        markers: tokens of the chat format that the expression has, by index (``syntax.marker``).

        Raises ValueError if the automaton is too large, the vocabulary lacks a marker, or nothing satisfies
        the expression.
        """
        self._tokenizer = tokenizer
        self._ends = frozenset(ends)
        self._marker_to_byte = _marker_bytes(tokenizer, markers)
        self._byte_to_marker = {byte: token for token, byte in self._marker_to_byte.items()}
        self._markers = frozenset(tokenizer.chat_format.markers)
        machine = grammar_dfa(expression) if isinstance(expression, Grammar) else byte_dfa(expression)
        self.accepting = machine.accepting
        # By byte, then by state: a row fits the CPU cache.
        self._byte_to_next = np.ascontiguousarray(machine.table.T)
        self._counter = Counter(machine) if machine.limits.any() else None
        self._counts: dict[int, Counts] = {}
        self.n_states = len(self.accepting)
        self._moves: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._kinds: dict[int, int] = {}
        self._moves_to_kind: dict[tuple[bytes, ...], int] = {}
        self._lock = threading.Lock()
        self.alphabet = self._spelling_tokens()
        self.tokens_left = self._distances()
        if self.tokens_left[0] < 0:
            raise ValueError("no text that this model's tokens can spell satisfies it")
        # A shortest text usually takes fewer tokens than characters.
        ids = self._tokenized(self._shortest())
        self.alphabet += [t for t in dict.fromkeys(ids) if t not in self.alphabet and t not in self._ends]
        self.tokens_left = self._distances()

    def moves(self, token: int) -> tuple[np.ndarray, np.ndarray]:
        """Transitions of a token: source states and target states."""
        found = self._moves.get(token)
        if found is None:
            found = self._moves[token] = self._find_moves(token)
        return found

    @property
    def is_counting(self) -> bool:
        """Whether there are repetitions whose characters have to be counted beside the states."""
        return self._counter is not None

    def counts(self, token: int) -> Counts:
        """Counts of a token's transitions; only if ``is_counting``."""
        assert self._counter is not None
        found = self._counts.get(token)
        if found is None:
            found = self._counts[token] = self._counter.of(self._bytes(token), self.moves(token)[0])
        return found

    def after(self, marker: str) -> int:
        """The state after a marker at the beginning of a text, which the expression permits there."""
        token = self._tokenizer.token_id(marker)
        assert token is not None
        sources, targets = self.moves(token)
        return int(targets[np.searchsorted(sources, 0)])

    def kind(self, token: int) -> int:
        """Equivalence class of a token: tokens with equal transitions share a number."""
        found = self._kinds.get(token)
        if found is None:
            sources, targets = self.moves(token)
            counts = self.counts(token) if self.is_counting else ()
            key = tuple(values.tobytes() for values in (sources, targets, *counts))
            with self._lock:  # sessions in several threads share an automaton: no number for two classes
                found = self._moves_to_kind.setdefault(key, len(self._moves_to_kind))
            self._kinds[token] = found
        return found

    def _find_moves(self, token: int) -> tuple[np.ndarray, np.ndarray]:
        first, *rest = self._bytes(token) or [None]
        if first is None:
            return _NOWHERE
        after = self._byte_to_next[first, :-1]
        for byte in rest:
            after = self._byte_to_next[byte].take(after)
        possible = np.flatnonzero(after != self.n_states)
        return possible, after[possible].astype(np.int64)

    def _bytes(self, token: int) -> bytes:
        """The bytes that a token adds to a text; none if it can't be part of one."""
        if token in self._ends:
            return b""
        if token in self._marker_to_byte:
            return bytes((self._marker_to_byte[token],))
        piece = self._tokenizer.piece(token)
        if not piece or piece in self._markers:  # inside a text it would end it
            return b""
        if isinstance(piece, bytes):
            return piece if piece[0] < FIRST_MARKER_BYTE else b""
        return piece.encode()

    def _spelling_tokens(self) -> list[int]:
        """A single-byte token for each byte that occurs, a character token if there is one."""
        used = np.flatnonzero((self._byte_to_next[:, :-1] != self.n_states).any(axis=1)).tolist()
        found = [self._token_of_byte(byte) for byte in used]
        return [token for token in found if token is not None]

    def _token_of_byte(self, byte: int) -> int | None:
        tokenizer = self._tokenizer
        if byte in self._byte_to_marker:
            return self._byte_to_marker[byte]
        if byte < 128:
            ids = tokenizer.tokenize(chr(byte), add_bos=False)
            if len(ids) == 1 and tokenizer.piece(ids[0]) == chr(byte) and ids[0] not in self._ends:
                return ids[0]
        token = tokenizer.token_id(f"<0x{byte:02X}>")
        return token if token is not None and tokenizer.piece(token) == bytes((byte,)) else None

    def _distances(self) -> np.ndarray:
        pairs = [self.moves(token) for token in self.alphabet]
        sources = np.concatenate([pair[0] for pair in pairs]) if pairs else _NOWHERE[0]
        targets = np.concatenate([pair[1] for pair in pairs]) if pairs else _NOWHERE[1]
        order = np.argsort(targets, kind="stable")
        sources, targets = sources[order], targets[order]
        begins = np.searchsorted(targets, np.arange(self.n_states + 1))
        left = np.full(self.n_states, -1, dtype=np.int64)
        left[self.accepting] = 0
        queue = deque(np.flatnonzero(self.accepting).tolist())
        while queue:
            state = queue.popleft()
            for source in sources[begins[state] : begins[state + 1]].tolist():
                if left[source] < 0:
                    left[source] = left[state] + 1
                    queue.append(source)
        return left

    def _shortest(self) -> bytes:
        state, text = 0, b""
        while self.tokens_left[state] > 0:
            for token in self.alphabet:
                sources, targets = self.moves(token)
                at = int(np.searchsorted(sources, state))
                if at < len(sources) and sources[at] == state:
                    target = int(targets[at])
                    if self.tokens_left[target] == self.tokens_left[state] - 1:
                        break
            text += self._bytes(token)
            state = target
        return text

    def _tokenized(self, text: bytes) -> list[int]:
        """The usual tokens of a text, whose markers are tokens of their own."""
        ids: list[int] = []
        for part in _BETWEEN_MARKERS.split(text):
            marker = self._byte_to_marker.get(part[0]) if part else None
            ids += self._tokenizer.tokenize(part.decode(), add_bos=False) if marker is None else [marker]
        return ids


_BETWEEN_MARKERS = re.compile(rb"([\xf8-\xff])")


def _marker_bytes(tokenizer: Tokenizer, markers: Sequence[str]) -> dict[int, int]:
    """The byte of each marker's token. Raises ValueError if the vocabulary lacks one."""
    found = {}
    for i, marker in enumerate(markers):
        token = tokenizer.token_id(marker)
        if token is None:
            raise ValueError(f"this model's vocabulary has no token {marker!r}")
        found[token] = FIRST_MARKER_BYTE + i
    return found
