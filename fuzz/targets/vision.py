"""Fuzz target for vision files (mmproj): the tower, an image's features, what ``inspect`` shows."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
from support import checkpoint_folders as folders
from support.gguf_mutator import U32, RawGguf, read_gguf
from support.vision_folders import FF, PATCH, D, make_folder

from pydiffusion import _native
from pydiffusion.cli._image_facts import image_lines
from pydiffusion.convert import convert, convert_mmproj, open_parts
from pydiffusion.errors import PyDiffusionError

from . import gguf
from .files import refusal

# Values that no tensor's shape bounds; larger ones are valid but slow.
_MAX_VALUES = 1 << 20


class Target:
    """Load a vision file beside a model and encode an image: done, or a typed error of one line."""

    def __init__(self, folder: Path) -> None:
        made = make_folder(folder / "with-vision")
        convert(made, folder / "model.gguf", "f32")
        self._model = _native.Model(str(folder / "model.gguf"), n_threads=1)
        self._good = []
        for type in ("f32", "bf16", "q8_0"):
            convert_mmproj(made, folder / "vision.gguf", type)
            self._good.append(read_gguf(folder / "vision.gguf"))
        self._path = folder / "input.gguf"
        for good in self._good:
            assert self.one(good.to_bytes()) == "done"

    def close(self) -> None:
        pass

    def make(self, draw: random.Random) -> bytes:
        """Create an input: a file's content."""
        file = draw.choice(self._good).copy()
        for _ in range(1 if draw.random() < 0.7 else draw.randrange(2, 4)):
            kind = draw.randrange(20)
            if kind < 9:
                gguf.change_pair(draw, file, lambda key: True)
            elif kind < 17:
                gguf.change_tensor(draw, file)
            elif kind < 19:
                _change_sizes(draw, file)
            else:
                gguf.change_frame(draw, file)
        return file.to_bytes()

    def one(self, data: bytes) -> str:
        """Load the tower and encode."""
        self._path.write_bytes(data)
        try:
            image_lines(open_parts(self._path).metadata)
            return self._encode(_native.Vision(str(self._path), self._model))
        except (PyDiffusionError, ValueError, MemoryError) as error:
            return refusal(error)

    def _encode(self, tower: _native.Vision) -> str:
        info = tower.info
        side, patch = 2 * info["pooling"], info["patch_size"]
        if side * side * max(3 * patch**2, info["n_embd"], info["n_ff"]) > _MAX_VALUES:
            return "long"
        positions = np.array([(x, y) for y in range(side) for x in range(side)], np.int32)
        patches = np.random.default_rng(0).random((side * side, 3 * patch**2), np.float32)
        features = tower.encode(patches, positions)
        assert features.shape == (4, folders.D) and np.isfinite(features).all()
        return "done"


def _change_sizes(draw: random.Random, file: RawGguf) -> None:
    """Change a size and, as a file of that size would have it, the shapes of the tensors that have it."""
    name, old = draw.choice((("embedding_length", D), ("feed_forward_length", FF), ("patch_size", PATCH)))
    new = draw.choice((1, 2, 3, 32, 48, old // 2, old + 1, old * 2))
    file.set(f"clip.vision.{name}", U32, new)
    for tensor in file.tensors:
        tensor.dims = [new if dim == old else dim for dim in tensor.dims]
