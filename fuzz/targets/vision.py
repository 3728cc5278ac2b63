"""Fuzz target for vision files (mmproj): the tower, an image's features, what ``inspect`` shows."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
from support import checkpoint_folders as folders
from support.gguf_mutator import U32, RawGguf, read_gguf
from support.vision_folders import FF, PATCH, TOWER, D, make_folder, vision_weights

from pydiffusion import _native
from pydiffusion.cli._image_facts import image_lines
from pydiffusion.convert import convert, convert_mmproj, open_parts
from pydiffusion.errors import PyDiffusionError
from pydiffusion.generation.native_model import NativeModel
from pydiffusion.vision.tower import VisionTower

from . import gguf, mutation
from .files import refusal

# Values that no tensor's shape bounds; larger ones are valid but slow.
_MAX_PATCHES, _MAX_VALUES = 1000, 1 << 20
_POSITIONS = 64  # enough for an image of 70 soft tokens


class Target:
    """Load a vision file beside a model and encode an image: done, or a typed error of one line."""

    def __init__(self, folder: Path) -> None:
        tensors = vision_weights()
        table = np.random.default_rng(1).standard_normal((2, _POSITIONS, D)).astype(np.float32)
        tensors[TOWER + "patch_embedder.position_embedding_table"] = table
        made = make_folder(folder / "with-vision", tensors, position_embedding_size=_POSITIONS)
        settings = {"max_soft_tokens": 70, "patch_size": PATCH}
        folders.write_json(made / "processor_config.json", {"image_processor": settings})
        convert(made, folder / "model.gguf", "f32")
        native = _native.Model(str(folder / "model.gguf"), n_threads=1)
        self._model = NativeModel(native, folder / "model.gguf")
        self._image = np.random.default_rng(2).integers(0, 256, (30, 50, 3), np.uint8)
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
        for _ in range(mutation.n_changes(draw)):
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
        """Load the tower, prepare an image for it, encode."""
        self._path.write_bytes(data)
        try:
            image_lines(open_parts(self._path))
            return self._encode(VisionTower(self._path, self._model))
        except (PyDiffusionError, ValueError, MemoryError) as error:
            return refusal(error)

    def _encode(self, tower: VisionTower) -> str:
        info = tower.info
        n_patches = info["max_soft_tokens"] * info["pooling"] ** 2
        width = max(3 * info["patch_size"] ** 2, info["n_embd"], info["n_ff"])
        if n_patches > _MAX_PATCHES or n_patches * width > _MAX_VALUES:
            return "long"
        prepared = tower.prepare(self._image)
        assert 0 < prepared.n_soft_tokens <= info["max_soft_tokens"]
        features = tower.features(prepared)
        assert features.shape == (prepared.n_soft_tokens, folders.D) and np.isfinite(features).all()
        return "done"


def _change_sizes(draw: random.Random, file: RawGguf) -> None:
    """Change a size and, as a file of that size would have it, the shapes of the tensors that have it."""
    sizes = {
        "embedding_length": D,
        "feed_forward_length": FF,
        "patch_size": PATCH,
        "projection_dim": folders.D,
    }
    name, old = draw.choice(list(sizes.items()))
    new = draw.choice((1, 2, 3, 32, 48, old // 2, old + 1, old * 2))
    file.set(f"clip.vision.{name}", U32, new)
    for tensor in file.tensors:
        tensor.dims = [new if dim == old else dim for dim in tensor.dims]
