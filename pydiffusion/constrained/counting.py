"""Counted repetitions: a limit on characters that is kept beside the automaton's states, not in them.

A string of up to 10,000 characters would take as many states. In a counted one all characters share the same
few; the guide keeps the count of the best path to each state, and takes no token that exceeds the limit.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .byte_dfa import ByteDfa

_UNLIMITED = 2**60


class Counts(NamedTuple):
    """Of a token's transitions, in the order of ``Automaton.moves``, int64 but ``restarts``.

    room: the highest count at the source with which the transition stays within the limit.
    added: characters that it adds. restarts: whether the count begins at 0 within the token, bool.
    """

    room: np.ndarray
    added: np.ndarray
    restarts: np.ndarray


class Counter:
    """Counts the characters of tokens in the counted repetitions of a DFA."""

    def __init__(self, machine: ByteDfa) -> None:
        self._byte_to_next = machine.table.T
        # The dead state is the last one.
        self._limits = np.append(machine.limits, 0)
        self._begins = np.append(machine.counts, False)
        self._room = self._limits - self._characters_left(machine)  # highest count in a state

    def _characters_left(self, machine: ByteDfa) -> np.ndarray:
        """The fewest characters after which a repetition can be left; 0 outside."""
        inside = self._limits > 0
        left = np.where(inside, _UNLIMITED, 0)
        left[-1] = _UNLIMITED
        cost = self._begins[:-1, None] & inside[machine.table[:-1]]
        while True:
            better = left.copy()
            better[:-1] = np.minimum(left[:-1], (left[machine.table[:-1]] + cost).min(axis=1))
            if (better == left).all():
                left[-1] = 0
                return left
            left = better

    def of(self, token: bytes, sources: np.ndarray) -> Counts:
        """Counts of a token from these states, int64 (n_sources,), from which it is possible."""
        state = sources
        count = np.zeros(len(state), dtype=np.int64)
        room = np.full(len(state), _UNLIMITED)
        restarts = self._limits[state] == 0
        for byte in token:
            following = self._byte_to_next[byte].take(state)
            inside = self._limits[following] > 0
            count += self._begins[state] & inside
            restarts |= ~inside
            count[~inside] = 0
            left = np.where(inside, self._room[following] - count, _UNLIMITED)
            # After a restart the count at the source doesn't matter: possible with any, or with none.
            room = np.minimum(
                room, np.where(restarts & (left >= 0), _UNLIMITED, np.where(restarts, -1, left))
            )
            state = following
        return Counts(room, count, restarts)
