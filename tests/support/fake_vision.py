"""Vision towers without weights: for tests of what is around a tower, and of models that read images."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter
from PIL import Image

from pydiffusion import DiffusionModel
from pydiffusion.vision.tower import VisionTower
from support.gguf_files import finish

INFO = {"patch_size": 4, "pooling": 3, "n_positions": 64, "max_soft_tokens": 70, "projection_dim": 8}
N_TOKENS = 24

Encode = Callable[[np.ndarray, np.ndarray], np.ndarray]


class FakeNative:
    """In place of ``_native.Vision``. ``fails``: raised by the next run."""

    def __init__(self, info: dict[str, Any], encode: Encode | None) -> None:
        self.info = info
        self.fails: BaseException | None = None
        self.n_runs = self.n_at_once = 0
        self._encode = encode or self._mean

    def encode(self, patches: np.ndarray, positions: np.ndarray) -> np.ndarray:
        self.n_runs += 1
        self.n_at_once += 1
        assert self.n_at_once == 1
        threading.Event().wait(0.01)
        self.n_at_once -= 1
        if self.fails is not None:
            error, self.fails = self.fails, None
            raise error
        assert patches.dtype == np.float32 and positions.dtype == np.int32
        return self._encode(patches, positions)

    def _mean(self, patches: np.ndarray, _: np.ndarray) -> np.ndarray:
        n = len(patches) // self.info["pooling"] ** 2
        return np.full((n, self.info["projection_dim"]), patches.mean(), np.float32)


class FakeSource:
    """What a vision tower needs of a model. ``opened``: the files of the towers that were loaded.

    encode: features of patches and positions; by default the mean of the patches, in every element.
    """

    def __init__(
        self, image_tokens: dict[str, int] | None = None, encode: Encode | None = None, **info: Any
    ) -> None:
        self.image_tokens = {"image": 90, "begin": 91, "end": 92} if image_tokens is None else image_tokens
        self.tower = FakeNative(INFO | info, encode)
        self.opened: list[Path] = []

    def new_vision(self, path: Path) -> Any:
        self.opened.append(path)
        return self.tower


def give_vision(model: DiffusionModel) -> VisionTower:
    """Make a model read images, of up to N_TOKENS soft tokens: a fixed random projection of the pixels."""
    d = model.hparams["n_embd"]
    matrix = np.random.default_rng(7).standard_normal((3 * INFO["patch_size"] ** 2, d)).astype(np.float32)

    def encode(patches: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return (patches - 0.5) @ matrix + 0.1 * positions.sum(axis=1, keepdims=True, dtype=np.float32)

    info = {"pooling": 1, "n_positions": 4096, "max_soft_tokens": N_TOKENS, "projection_dim": d}
    tower = VisionTower(model.path, FakeSource(model.native.image_tokens, encode, **info))
    model._vision.tower = tower
    return tower


def noise(seed: int, width: int = 24, height: int = 16) -> Image.Image:
    """A picture of coloured noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_mmproj(path: Path, n_embd: int = 8, architecture: str = "clip", content: float = 0.0) -> Path:
    """A file that says it is a vision tower."""
    writer = GGUFWriter(path, architecture)
    writer.add_uint32("clip.vision.projection_dim", n_embd)
    finish(writer, {"v.patch_embd.weight": np.full((2, 4096), content, np.float32)})
    return path
