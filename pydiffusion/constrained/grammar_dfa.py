"""Compile a GBNF grammar to a DFA over UTF-8 bytes.

Rules are built backwards, from what follows them. A rule that ends with itself, and so continues as itself,
is a loop, exactly; other recursion is expanded to a limited depth. Deeper texts belong to the grammar but are
never generated.
"""

from __future__ import annotations

from .byte_dfa import MAX_STATES, ByteDfa, Nfa, TooLarge, deterministic
from .grammar import Characters, Choice, Grammar, Node, Reference, Repetition, Sequence, cycle_edges

_MAX_DEPTH = 6
# A grammar is expanded to more than the first depth that has a text only within this: states cost time at
# every step.
_MAX_STATES_OF_RECURSION = 3000

# Limits before states are merged: without counted repetitions, and with them.
_MAX_NFA_STATES = (2 * MAX_STATES, 8 * MAX_STATES)
# Repetitions of fewer are always counted by states.
_SHORTEST_COUNTED = 16


def grammar_dfa(grammar: Grammar) -> ByteDfa:
    """Compile a grammar. Repetitions are counted by states, or if these are too many beside them.

    Raises ValueError if it gets too large or has no text.
    """
    try:
        return _compile(grammar, counts=False)
    except TooLarge:
        return _compile(grammar, counts=True)


def _compile(grammar: Grammar, counts: bool) -> ByteDfa:
    back = _back_references(grammar)
    found = None
    for depth in range(_MAX_DEPTH + 1):
        builder = _Builder(grammar, back, depth, counts)
        try:
            start = builder.rule("root", builder.end, depth, is_back=False)
            builder.nfa.prune(start, builder.end)
            limit = None if found is None else _MAX_STATES_OF_RECURSION
            if builder.nfa.is_dead(start):
                machine = None
            else:
                machine = deterministic(builder.nfa, start, builder.end, limit)
        except TooLarge:
            if found is None:
                raise
            break
        except RecursionError:
            raise ValueError("its rules are nested too deeply") from None
        found = machine or found
        if not builder.was_cut:
            break
    if found is None:
        raise ValueError("no text matches the rule 'root': its recursion has no end")
    return found


def _back_references(grammar: Grammar) -> set[tuple[str, str]]:
    """Pairs of a rule and one it refers to that closes a cycle: every recursion uses such a pair."""
    references = {name: list(dict.fromkeys(_references(node))) for name, node in grammar.rules.items()}
    return set(cycle_edges(references, ["root"]))


def _references(node: Node) -> list[str]:
    if isinstance(node, Reference):
        return [node.rule]
    if isinstance(node, Repetition):
        return _references(node.item)
    if isinstance(node, (Sequence, Choice)):
        return [name for item in node.items for name in _references(item)]
    return []


class _Builder:
    """NFA of a grammar with its recursion expanded to some depth."""

    def __init__(self, grammar: Grammar, back: set[tuple[str, str]], depth: int, counts: bool) -> None:
        """counts: whether long repetitions are counted beside the states."""
        self._counts = counts
        self._rules = grammar.rules
        self._back = back
        self.nfa = Nfa()
        self.end = self.nfa.new()
        self._dead = self.nfa.new()
        self._n_built = 0
        self._starts: dict[tuple[str, int, int], int] = {}
        self.was_cut = False  # whether any recursion was left out

    def rule(self, name: str, end: int, depth: int, is_back: bool) -> int:
        """State from which the rule leads to ``end``, with as many recursions left as ``depth``."""
        found = self._starts.get((name, end, depth))
        if found is not None:  # also one that is being built: a rule that ends with itself
            return found
        if is_back:
            if depth == 0:
                self.was_cut = True
                return self._dead
            return self.rule(name, end, depth - 1, is_back=False)
        start = self._starts[name, end, depth] = self.nfa.new()
        self.nfa.on_nothing[start].append(self._build(self._rules[name], end, depth, name))
        return start

    def _build(self, node: Node, end: int, depth: int, rule: str) -> int:
        """rule: the one that the node is in."""
        limit = _MAX_NFA_STATES[self._counts]
        self._n_built += 1
        if max(len(self.nfa.on_bytes), self._n_built // 4) > limit:  # an empty part takes no state, but time
            raise TooLarge(limit)
        if isinstance(node, Characters):
            start = self.nfa.new()
            self.nfa.characters(node.ranges, start, end)
            return start
        if isinstance(node, Sequence):
            for item in reversed(node.items):
                end = self._build(item, end, depth, rule)
            return end
        if isinstance(node, Choice):
            start = self.nfa.new()
            for item in node.items:
                self.nfa.on_nothing[start].append(self._build(item, end, depth, rule))
            return start
        if isinstance(node, Reference):
            return self.rule(node.rule, end, depth, (rule, node.rule) in self._back)
        return self._repeat(node, end, depth, rule)

    def _repeat(self, node: Repetition, end: int, depth: int, rule: str) -> int:
        state = end
        if node.high is None:
            state = self.nfa.new()
            self.nfa.on_nothing[state] += [end, self._build(node.item, state, depth, rule)]
        elif self._counts and node.high - node.low >= _SHORTEST_COUNTED and self._is_countable(node.item):
            state = self.nfa.new()
            first = self.nfa.new() + 1
            start = self._build(node.item, state, depth, rule)
            self.nfa.count(first, [start], node.high - node.low)
            self.nfa.on_nothing[state] += [end, start]
        else:
            for _ in range(node.high - node.low):
                before = self.nfa.new()
                self.nfa.on_nothing[before] += [end, self._build(node.item, state, depth, rule)]
                state = before
        for _ in range(node.low):
            state = self._build(node.item, state, depth, rule)
        return state

    def _is_countable(self, node: Node, names: tuple[str, ...] = ()) -> bool:
        """Whether the node matches at least a character and has no repetition without a low limit within."""
        if isinstance(node, Reference):
            return node.rule not in names and self._is_countable(self._rules[node.rule], (*names, node.rule))
        if isinstance(node, Sequence):
            return len(node.items) > 0 and all(self._is_countable(item, names) for item in node.items)
        if isinstance(node, Choice):
            return all(self._is_countable(item, names) for item in node.items)
        if isinstance(node, Repetition):
            is_short = node.low > 0 and node.high is not None and node.high < _SHORTEST_COUNTED
            return is_short and self._is_countable(node.item, names)
        return True
