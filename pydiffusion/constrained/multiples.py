"""Multiples of a number, as a condition on the digits of a decimal.

A multiple is exact for the decimals as they are written: 0.07 is a multiple of 0.01, which floats say
differently.
"""

from __future__ import annotations

from decimal import Decimal
from functools import lru_cache
from typing import Any

import numpy as np

from .regex_parser import sre

# Limit on the states before they are merged; each is a remainder and a number of decimals.
_MAX_STATES = 20_000
_SYMBOLS = "0123456789.-"


def condition(multiple: Decimal) -> str:
    """Expression to put before a number's, in one group: the number is a multiple of this one.

    To Python's re it holds for any text; ``byte_dfa`` knows it by its end, which no other expression has.
    """
    return rf"(?!{multiple:f}\b\B)".replace(".", r"\.")


def multiple_of(items: Any) -> Decimal | None:
    """The number of a ``condition``, given what its parentheses hold; None for another expression."""
    items = list(items)
    if items[-2:] != [(sre.AT, sre.AT_BOUNDARY), (sre.AT, sre.AT_NON_BOUNDARY)]:
        return None
    return Decimal("".join(chr(code) for _, code in items[:-2]))


@lru_cache(maxsize=64)
def multiple_table(multiple: Decimal) -> tuple[np.ndarray, np.ndarray]:
    """Transition table over bytes and accepting states, as of ``ByteDfa``, of decimals without an exponent
    that are multiples of a number above 0. Raises ValueError if there are too many remainders.
    """
    decimals = _decimals(multiple)
    digits = int(multiple.scaleb(decimals))
    if digits * (decimals + 2) > _MAX_STATES:
        raise ValueError(f"multiples of {multiple:f} have too many remainders to be counted")
    after = _transitions(digits, decimals)
    # A number with j decimals is its digits / 10**j: with the missing decimals, a multiple of ``digits``.
    missing = [pow(10, decimals - max(block - 1, 0), digits) for block in range(decimals + 2)]
    accepting = np.tile(np.arange(digits), decimals + 2) * np.repeat(missing, digits) % digits == 0
    after, accepting = _minimal(after, np.append(accepting, False))
    n = len(accepting) - 1
    table = np.full((n + 1, 256), n, dtype=np.int32)
    for i, symbol in enumerate(_SYMBOLS):
        table[:n, ord(symbol)] = after[:n, i]
    return table, accepting[:n]


def _decimals(multiple: Decimal) -> int:
    """Number of decimals, without zeros at the end."""
    exponent = multiple.normalize().as_tuple().exponent
    assert isinstance(exponent, int)  # finite
    return max(-exponent, 0)


def _transitions(digits: int, decimals: int) -> np.ndarray:
    """Next states, (n_states + 1, n_symbols): state r + digits * block is remainder r, before the point
    (block 0) or after it and block - 1 decimals; the last state is dead.
    """
    n_states = digits * (decimals + 2)
    after = np.full((n_states + 1, len(_SYMBOLS)), n_states)
    remainders = np.arange(digits)
    after[:digits, _SYMBOLS.index("-")] = remainders
    after[:digits, _SYMBOLS.index(".")] = digits + remainders
    for block in range(decimals + 2):
        rows = slice(digits * block, digits * (block + 1))
        if block == decimals + 1:  # no more decimals, other than 0
            after[rows, 0] = digits * block + remainders
            break
        for digit in range(10):
            after[rows, digit] = digits * (block + (block > 0)) + (remainders * 10 + digit) % digits
    return after


def _minimal(after: np.ndarray, accepting: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merge equivalent states, by refinement; state 0 stays first and the dead state last."""
    labels = accepting.astype(np.int64)
    n_labels = 0
    while True:
        _, labels = np.unique(np.hstack([labels[:, None], labels[after]]), axis=0, return_inverse=True)
        labels = labels.reshape(-1)
        if labels.max() + 1 == n_labels:
            break
        n_labels = int(labels.max()) + 1
    first_and_last = (labels[0], labels[-1])
    order = [labels[0], *(i for i in range(n_labels) if i not in first_and_last), labels[-1]]
    numbers = np.empty(n_labels, dtype=np.int64)
    numbers[order] = np.arange(n_labels)
    first = np.array([int(np.flatnonzero(labels == label)[0]) for label in order])
    return numbers[labels[after[first]]], accepting[first]
