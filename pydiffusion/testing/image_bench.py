"""Benchmark of a vision tower: seconds per image."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pydiffusion.vision.tower import VisionTower

if TYPE_CHECKING:
    from .comparison import Setup

_N_RUNS = 3
_SIDES = (768, 1024)  # pixels of an image: about the proportions of a photograph


@dataclass(frozen=True)
class ImageBench:
    """Figures of a vision tower. Seconds of the tower; of the preprocessing before it.

    first_seconds: of the first image.  n_patches, n_soft_tokens: of one image.
    """

    vision_file: str
    n_weights: int
    n_bytes: int
    load_seconds: float
    n_patches: int
    n_soft_tokens: int
    preparation_seconds: float
    first_seconds: float
    seconds: float
    seconds_min: float

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)


def bench_images(setup: Setup, mmproj: Path, seed: int = 0) -> ImageBench:
    """Encode random images with a vision file. Raises as ``DiffusionModel``."""
    with setup.open(1, n_canvases=1, n_sessions=1) as model:
        tower = VisionTower(mmproj, model.native)
        loading = time.perf_counter()
        tower.load()
        load_seconds = time.perf_counter() - loading
        rng = np.random.default_rng(seed)
        preparing, encoding = [], []
        for _ in range(_N_RUNS + 1):
            image = rng.integers(0, 256, (*_SIDES, 3), dtype=np.uint8)
            started = time.perf_counter()
            prepared = tower.prepare(image)
            ready = time.perf_counter()
            tower.features(prepared)
            preparing.append(ready - started)
            encoding.append(time.perf_counter() - ready)
        return ImageBench(
            vision_file=mmproj.name,
            n_weights=tower.info["n_weights"],
            n_bytes=tower.info["n_bytes"],
            load_seconds=load_seconds,
            n_patches=len(prepared.patches),
            n_soft_tokens=prepared.n_soft_tokens,
            preparation_seconds=statistics.median(preparing),
            first_seconds=encoding[0],
            seconds=statistics.median(encoding[1:]),
            seconds_min=min(encoding[1:]),
        )
