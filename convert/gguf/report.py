"""Progress and report of a conversion."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class ConversionProgress:
    """Passed to the ``progress`` callback after every chunk.

    ``done_bytes`` and ``total_bytes`` count tensor bytes of the target and restart with each stage; bytes
    written by an earlier run count as done and as ``resumed_bytes``. ``seconds`` since the stage began.
    """

    stage: Literal["write", "verify", "evaluate", "imatrix"]
    tensor: str
    done_bytes: int
    total_bytes: int
    seconds: float = 0.0
    resumed_bytes: int = 0

    @property
    def bytes_per_second(self) -> float | None:
        """Mean rate of this stage; None while unknown."""
        fresh = self.done_bytes - self.resumed_bytes
        return fresh / self.seconds if fresh > 0 and self.seconds > 0 else None

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds until this stage ends."""
        rate = self.bytes_per_second
        return None if rate is None else (self.total_bytes - self.done_bytes) / rate


ProgressCallback = Callable[[ConversionProgress], None]


@dataclass(frozen=True)
class ConversionReport:
    """Result of :func:`convert` or :func:`quantize`.

    ``types`` counts tensors by ggml type. ``fallbacks`` names each tensor whose rows did not fit the recipe's
    type. ``notes``: what was skipped, values taken from the reference's defaults, tensors quantized a second
    time. ``files``: the file written, or the parts of a split one; ``n_bytes``: their total size.
    """

    source: Path
    target: Path
    type: str
    n_tensors: int
    n_weights: int
    n_bytes: int
    bits_per_weight: float
    types: dict[str, int]
    seconds: float
    fallbacks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """All fields, with paths as strings: ready for ``json.dumps``."""
        paths = {"source": str(self.source), "target": str(self.target)}
        return dataclasses.asdict(self) | paths | {"files": [str(path) for path in self.files]}
