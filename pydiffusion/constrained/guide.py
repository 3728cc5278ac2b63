"""Guide of constrained decoding: the most likely canvas that the automaton accepts, at every denoising step.

Positions are independent given the logits, so the most likely accepted canvas is the best path through the
automaton, found by dynamic programming (Viterbi). Candidates are the ``N_LIKELIEST`` tokens of each position
and the automaton's alphabet, which alone can spell every accepted text, so a path always exists. A complete
text is followed by an eos and then by the most likely tokens, which don't matter.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pydiffusion.errors import OptionError, PyDiffusionError

from .token_automaton import Automaton

N_LIKELIEST = 48


class Guide:
    """Constrains one generation: ``choose`` at every step, ``commit`` when a canvas is finished."""

    def __init__(
        self,
        automaton: Automaton,
        n_canvas: int,
        budget: int,
        eos: Sequence[int],
        n_vocab: int,
        state: int = 0,
    ) -> None:
        """budget: maximum number of tokens of the text. state: the automaton's, where the text begins.

        Raises OptionError if no accepted text fits.
        """
        self._automaton = automaton
        self._n_canvas = n_canvas
        self._left = budget
        self._eos = list(eos)
        self._state = state
        self._chosen: tuple[np.ndarray, int, int, bool] | None = None
        self.finished = False
        if not eos:
            raise OptionError(
                "eos", "constrained output needs an eos, but neither the options nor the file have one"
            )
        needed = automaton.tokens_left[state]
        if needed > budget:
            raise OptionError(
                "max_tokens",
                f"the shortest text that satisfies the constraint takes {needed} tokens,"
                f" but max_tokens and the context leave {budget}",
            )
        self.n_likeliest = min(N_LIKELIEST, n_vocab)
        self.extra = np.asarray([*automaton.alphabet, *eos], dtype=np.int32)
        # Among the alphabet's tokens with equal transitions, only the most likely counts.
        kinds = np.array([automaton.kind(token) for token in automaton.alphabet])
        self._groups = [np.flatnonzero(kinds == kind) for kind in dict.fromkeys(kinds.tolist())]
        pairs = [automaton.moves(automaton.alphabet[group[0]]) for group in self._groups]
        self._sources = np.concatenate([pair[0] for pair in pairs])
        self._targets = np.concatenate([pair[1] for pair in pairs])
        self._group = np.repeat(np.arange(len(pairs)), [len(pair[0]) for pair in pairs])
        # Of counted repetitions, see ``counting``: the count at the beginning, and by position and state.
        self._count = 0
        self._counts = np.zeros((0, 0), dtype=np.int64)
        self._own_counts = (
            [automaton.counts(automaton.alphabet[group[0]]) for group in self._groups]
            if automaton.is_counting
            else []
        )

    def choose(self, tokens: np.ndarray, logits: np.ndarray, extra: np.ndarray) -> np.ndarray:
        """Choose the canvas, int32 (n_canvas,).

        tokens, logits: top-k of each position, best first, (n_canvas, n_likeliest); extra: the logits of
        ``self.extra``, (n_canvas, n_extra).
        """
        a = self._automaton
        n, n_states = self._n_canvas, a.n_states
        n_text = min(n, self._left)  # positions available to the text
        scores = np.full((n_text + 1, n_states), -np.inf)
        scores[0, self._state] = 0.0
        if a.is_counting:
            self._counts = np.zeros((n_text + 1, n_states), dtype=np.int64)
            self._counts[0, self._state] = self._count
        before = np.zeros((n_text, n_states), dtype=np.int64)
        taken = np.zeros((n_text, n_states), dtype=np.int32)
        best = np.stack([group[extra[:, group].argmax(axis=1)] for group in self._groups], axis=1)
        spelled = self.extra[best], np.take_along_axis(extra, best, axis=1)
        for i in range(n_text):
            self._extend(i, tokens[i], logits[i], spelled[0][i], spelled[1][i], scores, before, taken)
        # After an end at position i: an eos, then the most likely tokens.
        free = np.concatenate([np.cumsum(logits[::-1, 0].astype(np.float64))[::-1], [0.0]])
        eos_logits = extra[:, len(a.alphabet) :].astype(np.float64)
        ends = np.full(n_text + 1, -np.inf)
        complete = np.where(a.accepting, scores, -np.inf).max(axis=1)
        for i in range(n_text + 1):
            if i < n_text:
                ends[i] = complete[i] + eos_logits[i].max() + free[i + 1]
            elif self._left <= n:  # the budget ends here
                ends[i] = complete[i] + free[i]
        going_on = -np.inf
        if self._left > n:
            reachable = (a.tokens_left >= 0) & (a.tokens_left <= self._left - n)
            last = np.where(reachable, scores[n_text], -np.inf)
            going_on = last.max()
        path = tokens[:, 0].astype(np.int32).copy()
        end = int(np.argmax(ends))
        ended = bool(ends[end] >= going_on)
        if ended:
            state = int(np.argmax(np.where(a.accepting, scores[end], -np.inf)))
            if end < n_text:
                path[end] = self._eos[int(np.argmax(eos_logits[end]))]
        else:
            end, state = n_text, int(np.argmax(last))
        if max(ends[end], going_on) == -np.inf:
            raise PyDiffusionError(
                "the limits of lengths and max_tokens leave no text that the constraint allows"
            )
        final_state, count = state, int(self._counts[end, state]) if a.is_counting else 0
        for i in range(end - 1, -1, -1):
            path[i] = taken[i, state]
            state = int(before[i, state])
        self._chosen = path, final_state, count, ended
        return path

    def _extend(
        self,
        i: int,
        tokens: np.ndarray,
        logits: np.ndarray,
        spelled: np.ndarray,
        spelled_logits: np.ndarray,
        scores: np.ndarray,
        before: np.ndarray,
        taken: np.ndarray,
    ) -> None:
        """Extend the best paths by one token."""
        a = self._automaton
        first_of_kind: dict[int, int] = {}
        for column, token in enumerate(tokens.tolist()):  # best first
            first_of_kind.setdefault(a.kind(token), column)
        columns = list(first_of_kind.values())
        tokens, logits = tokens[columns], logits[columns]
        moves = [a.moves(token) for token in tokens.tolist()]
        counts = [len(pair[0]) for pair in moves]
        sources = np.concatenate([self._sources, *(pair[0] for pair in moves)])
        targets = np.concatenate([self._targets, *(pair[1] for pair in moves)])
        gained = np.concatenate([spelled_logits[self._group], np.repeat(logits, counts)]).astype(np.float64)
        which = np.concatenate([spelled[self._group], np.repeat(tokens, counts)])
        reached = scores[i, sources] > -np.inf
        if a.is_counting:
            every = (*self._own_counts, *map(a.counts, tokens.tolist()))
            room, added, restarts = (np.concatenate(column) for column in zip(*every, strict=True))
            reached &= self._counts[i, sources] <= room
            counted = (np.where(restarts, 0, self._counts[i, sources]) + added)[reached]
        sources, targets = sources[reached], targets[reached]
        gained, which = gained[reached], which[reached]
        totals = scores[i, sources] + gained
        following = scores[i + 1]
        np.maximum.at(following, targets, totals)
        best = np.flatnonzero(totals == following[targets])[::-1]  # on ties, the first wins
        before[i, targets[best]] = sources[best]
        taken[i, targets[best]] = which[best]
        if a.is_counting:
            self._counts[i + 1, targets[best]] = counted[best]

    def commit(self) -> None:
        """Advance past the canvas chosen last."""
        assert self._chosen is not None
        _, self._state, self._count, self.finished = self._chosen
        self._left -= self._n_canvas
