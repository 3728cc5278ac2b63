"""Run the tables that `byte_dfa` and `grammar_dfa` give, and write texts that an automaton accepts."""

from __future__ import annotations

import random
from functools import lru_cache

import numpy as np

from pydiffusion.constrained import Automaton, Guide
from pydiffusion.constrained.byte_dfa import ByteDfa
from pydiffusion.tokenizer import Tokenizer


def accepts(machine: ByteDfa, text: str) -> bool:
    """Counted repetitions are taken to have no limit."""
    table, accepting = machine.table, machine.accepting
    state = 0
    for byte in text.encode():
        state = table[state, byte]
    return state < len(accepting) and bool(accepting[state])


def random_text(machine: ByteDfa, rng: random.Random, n_bytes: int = 60) -> str:
    """A text that the table accepts: random bytes, and after ``n_bytes`` the shortest way to an end."""
    table, accepting = machine.table, machine.accepting
    left = _bytes_left(machine)
    state, text = 0, b""
    while True:
        if accepting[state] and (len(text) >= n_bytes or rng.random() < 0.05):
            return text.decode()
        alive = [byte for byte in range(256) if left[table[state, byte]] >= 0]
        if not alive:
            return text.decode()
        if len(text) >= n_bytes:
            byte = min(alive, key=lambda byte: left[table[state, byte]])
        else:
            byte = rng.choice(alive)
        text += bytes((byte,))
        state = table[state, byte]


@lru_cache(maxsize=4)  # a machine is compared by identity
def _bytes_left(machine: ByteDfa) -> list[int]:
    """Length of the shortest text from each state to an end, -1 for none; the dead state is the last."""
    table, accepting = machine.table, machine.accepting
    left = [0 if end else -1 for end in accepting] + [-1]
    sources: list[set[int]] = [set() for _ in left]
    for state, row in enumerate(table[:-1].tolist()):
        for target in set(row):
            sources[target].add(state)
    queue = [state for state, n in enumerate(left) if n == 0]
    for state in queue:
        for source in sources[state]:
            if left[source] < 0:
                left[source] = left[state] + 1
                queue.append(source)
    return left


def write(
    automaton: Automaton, tokenizer: Tokenizer, n_canvas: int, budget: int, rng: np.random.Generator
) -> str:
    """Text that the guide writes when the model's distributions are noise."""
    n_vocab = tokenizer.n_vocab
    guide = Guide(automaton, n_canvas, budget, [1], n_vocab)
    written: list[int] = []
    while not guide.finished:
        logits = rng.normal(scale=3, size=(n_canvas, n_vocab)).astype(np.float32)
        order = np.argsort(-logits, axis=1).astype(np.int32)[:, : guide.n_likeliest]
        path = guide.choose(order, np.take_along_axis(logits, order, 1), logits[:, guide.extra])
        guide.commit()
        canvas = path.tolist()[: budget - len(written)]
        written += canvas[: canvas.index(1)] if guide.finished and 1 in canvas else canvas
    assert len(written) <= budget
    return tokenizer.detokenize(written)
