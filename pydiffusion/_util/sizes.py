"""Sizes in bytes as text, read and written by one rule.

K, M, G and T are powers of 1000 (SI), Ki, Mi, Gi and Ti powers of 1024 (IEC).
"""

from __future__ import annotations

import re

_PREFIXES = "KMGT"
_TOO_MANY = 2**63  # bytes: more than a file or a memory can have
_SIZE = re.compile(rf"\s*(\d+(?:\.\d+)?)\s*(?:([{_PREFIXES}])(i?))?B?\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Parse ``5G``, ``5GB`` (5 * 1000**3), ``4GiB``, ``4Gi`` (4 * 1024**3) or ``900``; case doesn't matter.

    Returns bytes. Raises ValueError.
    """
    match = _SIZE.fullmatch(text)
    n_bytes = 0
    if match is not None:
        power = 1 + _PREFIXES.index(match[2].upper()) if match[2] else 0
        number = float(match[1])
        n_bytes = int(number * (1024 if match[3] else 1000) ** power) if number < _TOO_MANY else 0
    if not 0 < n_bytes < _TOO_MANY:
        raise ValueError(f"{text!r:.60} is not a size; write for example 16GiB or 5G")
    return n_bytes


def format_size(n_bytes: float) -> str:
    """Format bytes with three digits: ``16.7 GB``."""
    return count(n_bytes, "B")


def count(number: float, unit: str = "") -> str:
    """Format a number with an SI prefix: ``25.2 G``, ``438 M``, ``12 k``."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}{unit}"
    return f"{number:.3g} {unit}".rstrip()
