"""Token automaton: the byte DFA of an expression or grammar lifted to the tokens of a vocabulary."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from .byte_dfa import byte_dfa
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

    def __init__(self, expression: str | Grammar, tokenizer: Tokenizer, ends: Collection[int] = ()) -> None:
        """expression: as from regex.py, or a grammar. ends: tokens that end a text, and so can't be part of it.

        Raises ValueError if the automaton is too large, or nothing satisfies the expression.
        """
        self._tokenizer = tokenizer
        self._ends = frozenset(ends)
        self._markers = frozenset(tokenizer.chat_format.markers)
        machine = grammar_dfa(expression) if isinstance(expression, Grammar) else byte_dfa(expression)
        table, self.accepting = machine
        self._byte_to_next = np.ascontiguousarray(table.T)  # by byte, then by state: a row fits the CPU cache
        self.n_states = len(self.accepting)
        self._moves: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._kinds: dict[int, int] = {}
        self._moves_to_kind: dict[tuple[bytes, bytes], int] = {}
        self.alphabet = self._spelling_tokens()
        self.tokens_left = self._distances()
        if self.tokens_left[0] < 0:
            raise ValueError("no text that this model's tokens can spell satisfies it")
        # A shortest text usually takes fewer tokens than characters.
        ids = tokenizer.tokenize(self._shortest(), add_bos=False)
        self.alphabet += [t for t in dict.fromkeys(ids) if t not in self.alphabet and t not in self._ends]
        self.tokens_left = self._distances()

    def moves(self, token: int) -> tuple[np.ndarray, np.ndarray]:
        """Transitions of a token: source states and target states."""
        found = self._moves.get(token)
        if found is None:
            found = self._moves[token] = self._find_moves(token)
        return found

    def kind(self, token: int) -> int:
        """Equivalence class of a token: tokens with equal transitions share a number."""
        found = self._kinds.get(token)
        if found is None:
            sources, targets = self.moves(token)
            key = (sources.tobytes(), targets.tobytes())
            found = self._kinds[token] = self._moves_to_kind.setdefault(key, len(self._moves_to_kind))
        return found

    def _find_moves(self, token: int) -> tuple[np.ndarray, np.ndarray]:
        piece = self._tokenizer.piece(token)
        if not piece or piece in self._markers or token in self._ends:  # inside a text these would end it
            return _NOWHERE
        first, *rest = piece if isinstance(piece, bytes) else piece.encode()
        after = self._byte_to_next[first, :-1]
        for byte in rest:
            after = self._byte_to_next[byte].take(after)
        possible = np.flatnonzero(after != self.n_states)
        return possible, after[possible].astype(np.int64)

    def _spelling_tokens(self) -> list[int]:
        """A single-byte token for each byte that occurs, a character token if there is one."""
        used = np.flatnonzero((self._byte_to_next[:, :-1] != self.n_states).any(axis=1)).tolist()
        found = [self._token_of_byte(byte) for byte in used]
        return [token for token in found if token is not None]

    def _token_of_byte(self, byte: int) -> int | None:
        tokenizer = self._tokenizer
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

    def _shortest(self) -> str:
        state, text = 0, b""
        while self.tokens_left[state] > 0:
            for token in self.alphabet:
                sources, targets = self.moves(token)
                at = int(np.searchsorted(sources, state))
                if at < len(sources) and sources[at] == state:
                    target = int(targets[at])
                    if self.tokens_left[target] == self.tokens_left[state] - 1:
                        break
            piece = self._tokenizer.piece(token) or ""
            text += piece if isinstance(piece, bytes) else piece.encode()
            state = target
        return text.decode()
