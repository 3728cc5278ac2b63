"""Adapter: low-rank changes of a model's matrices, whichever file they come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

Side = Literal["encoder", "decoder", "both"]


@dataclass(frozen=True)
class Target:
    """A matrix of the model, in one of its two modes.

    tensor: its name in a GGUF without ``.weight`` (``blk.3.attn_q``, ``self_cond_gate``).
    side: "encoder" (a prompt or a finished canvas is read), "decoder" (a canvas is denoised), or "both",
        of one set for both (or two that are the same). An adapter has a tensor with "both", or with one or
        two of the others, never mixed.
    """

    tensor: str
    side: Side

    def __str__(self) -> str:
        return self.tensor if self.side == "both" else f"{self.tensor} ({self.side})"


@dataclass(frozen=True)
class Factors:
    """The change ``scale * b @ a`` of a matrix (rows are outputs, as in torch's Linear).

    shape_a: (r, n_in), of experts (n_expert, r, n_in); shape_b: (n_out, r), of experts (n_expert, n_out, r).
    scale: alpha / r, or alpha / sqrt(r) of rsLoRA.
    read: () -> (a, b), float32 in these shapes. Read when called, so that an adapter of several GB is in
        memory a matrix at a time.
    """

    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]
    scale: float
    read: Callable[[], tuple[np.ndarray, np.ndarray]]

    @property
    def rank(self) -> int:
        return self.shape_a[-2]

    def delta(self) -> np.ndarray:
        """``scale * b @ a``, float32 (n_out, n_in), of experts (n_expert, n_out, n_in)."""
        a, b = self.read()
        return np.float32(self.scale) * np.matmul(b, a)


@dataclass(frozen=True, eq=False, repr=False)
class Adapter:
    """Low-rank changes of a model's matrices. Equal to those with the same results, whatever their names.

    name: for people: the folder's or file's. path: where it is from. factors: what it changes.
    fingerprint: 32 bytes (SHA-256 of what decides its results: targets, factors, scales), by which caches
        and session files tell adapters apart. metadata: what its file says besides (r, lora_alpha, ...).
    """

    name: str
    path: Path
    factors: Mapping[Target, Factors]
    fingerprint: bytes
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The largest of its factors'."""
        return max((factors.rank for factors in self.factors.values()), default=0)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Adapter) and other.fingerprint == self.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"Adapter({self.name!r}, {len(self.factors)} matrices, {self.fingerprint.hex()[:12]})"

    def scaled(self) -> Iterator[tuple[str, Side, np.ndarray, np.ndarray]]:
        """(tensor, side, a, scale * b), float32, one matrix at a time, as the native adapter takes them."""
        for target, factors in self.factors.items():
            a, b = factors.read()
            yield target.tensor, target.side, a, b * np.float32(factors.scale)
