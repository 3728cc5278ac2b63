"""A native model and vision tower for tests of what is around them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

from support.gguf_files import finish

INFO = {"patch_size": 4, "pooling": 3, "n_positions": 64, "max_soft_tokens": 70, "projection_dim": 8}


class FakeTower:
    """Features are the mean of the patches, in every element. ``fails``: raised by the next run."""

    def __init__(self, info: dict[str, Any]) -> None:
        self.info = info
        self.fails: BaseException | None = None
        self.n_runs = self.n_at_once = 0

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
        n = len(patches) // self.info["pooling"] ** 2
        return np.full((n, self.info["projection_dim"]), patches.mean(), np.float32)


class FakeNativeModel:
    """Of NativeModel what a vision tower needs. ``opened``: the files of the towers that were loaded."""

    def __init__(self, image_tokens: dict[str, int] | None = None, **info: Any) -> None:
        self.image_tokens = {"image": 90, "begin": 91, "end": 92} if image_tokens is None else image_tokens
        self.tower = FakeTower(INFO | info)
        self.opened: list[Path] = []

    def new_vision(self, path: Path) -> FakeTower:
        self.opened.append(path)
        return self.tower


def write_mmproj(path: Path, n_embd: int = 8, architecture: str = "clip", content: float = 0.0) -> Path:
    """A file that says it is a vision tower."""
    writer = GGUFWriter(path, architecture)
    writer.add_uint32("clip.vision.projection_dim", n_embd)
    finish(writer, {"v.patch_embd.weight": np.full((2, 4096), content, np.float32)})
    return path
