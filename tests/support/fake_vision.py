"""A vision tower without weights: features are a fixed random projection of the pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pydiffusion import DiffusionModel
from pydiffusion.vision.tower import VisionTower

PATCH, N_TOKENS = 4, 24


class FakeNative:
    """In place of ``_native.Vision``."""

    def __init__(self, d: int, max_soft_tokens: int) -> None:
        self.info = {
            "patch_size": PATCH,
            "pooling": 1,
            "n_positions": 4096,
            "max_soft_tokens": max_soft_tokens,
        }
        self._matrix = np.random.default_rng(7).standard_normal((3 * PATCH**2, d)).astype(np.float32)

    def encode(self, patches: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return (patches - 0.5) @ self._matrix + 0.1 * positions.sum(axis=1, keepdims=True, dtype=np.float32)


class FakeSource:
    """What a tower needs of a model."""

    def __init__(self, model: DiffusionModel, max_soft_tokens: int) -> None:
        self.image_tokens = model.native.image_tokens
        self._native = FakeNative(model.hparams["n_embd"], max_soft_tokens)

    def new_vision(self, path: Path) -> Any:
        return self._native


def give_vision(model: DiffusionModel, max_soft_tokens: int = N_TOKENS) -> VisionTower:
    """Make a model read images, of up to that many soft tokens."""
    tower = VisionTower(model.path, FakeSource(model, max_soft_tokens))
    model._vision.tower = tower
    return tower


def picture(seed: int, width: int = 24, height: int = 16) -> Image.Image:
    """Coloured noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
