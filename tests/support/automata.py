"""Run the tables that `byte_machine` gives."""

from __future__ import annotations

import numpy as np


def accepts(machine: tuple[np.ndarray, np.ndarray], text: str) -> bool:
    table, accepting = machine
    state = 0
    for byte in text.encode():
        state = table[state, byte]
    return state < len(accepting) and bool(accepting[state])
