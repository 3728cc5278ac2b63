"""The vision tower: features of images, from a file with the tower and its projector (mmproj)."""

from __future__ import annotations

import hashlib
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pydiffusion import _native
from pydiffusion._util.files import check_is_gguf
from pydiffusion._util.log import logger
from pydiffusion.errors import ImageError, PyDiffusionError

from .loading import open_image
from .preprocessing import MAX_SOFT_TOKENS, PreparedImage, cut, image_key, permitted
from .recent import Recent

# Of an image at the released size, the patches have 8 MB and the features 3 MB.
_KEPT_BYTES = 64 << 20


@dataclass(frozen=True)
class _Loaded:
    """A loaded file. fingerprint: tells the tower from others in images' keys."""

    native: _native.Vision
    info: dict[str, Any]
    fingerprint: bytes


class TowerSource(Protocol):
    """Of a model (``generation.native_model.NativeModel``) what its vision tower needs."""

    @property
    def image_tokens(self) -> dict[str, int]:
        """Ids of the tokens around and in the place of an image: "image", "begin", "end"; or empty."""

    def new_vision(self, path: Path) -> _native.Vision:
        """Load a tower onto the model's device."""


class VisionTower:
    """The vision tower and projector of a model, loaded on first use; thread-safe.

    Attributes: ``path``; ``n_encoded``, how often the tower has run; ``prepared``, images prepared last, by
    keys of whoever prepares them.
    """

    def __init__(self, path: str | os.PathLike[str], native_model: TowerSource) -> None:
        """path: the file (mmproj). native_model: the model whose device and threads it shares."""
        self.path = Path(path)
        self.n_encoded = 0
        self._model: TowerSource | None = native_model
        self._loaded: _Loaded | None = None
        self._running = threading.Lock()  # while the tower loads or encodes
        self.prepared: Recent[PreparedImage] = Recent(_KEPT_BYTES)
        self._features: Recent[npt.NDArray[np.float32]] = Recent(_KEPT_BYTES)

    @property
    def info(self) -> dict[str, Any]:
        """The tower's hyperparameters."""
        return self.load().info

    @property
    def max_soft_tokens(self) -> int:
        """Soft tokens per image at most, unless asked for otherwise."""
        n: int = self.info["max_soft_tokens"]
        return n

    def load(self) -> _Loaded:
        """Load the file, unless it is. Raises as opening a model does; UnsupportedModelError for a tower of
        another model; PyDiffusionError once the model is closed.
        """
        loaded = self._loaded
        if loaded is not None:
            return loaded
        with self._running:
            return self._load()

    def _load(self) -> _Loaded:
        if self._loaded is None:
            if self._model is None:
                raise PyDiffusionError(f"{self.path} is closed")
            check_is_gguf(self.path)
            native = self._model.new_vision(self.path)
            self._loaded = _Loaded(native, native.info, _fingerprint(self.path))
            logger.info("opened the vision tower %s: %s", self.path, native.info)
        return self._loaded

    def prepare(self, image: Any, max_soft_tokens: int | None = None) -> PreparedImage:
        """Preprocess an image for this tower; a PreparedImage is returned as it is.

        max_soft_tokens: None takes the file's. Raises as ``preprocess``, and ImageError for an image with
        more rows or columns of patches than the tower has positions.
        """
        if isinstance(image, PreparedImage):
            return image
        loaded = self.load()
        n = _checked_max(max_soft_tokens, loaded.info["max_soft_tokens"])
        patch_size, pooling = loaded.info["patch_size"], loaded.info["pooling"]
        rgb = open_image(image)
        patches, positions = cut(rgb, n, patch_size, pooling)
        longest = int(positions.max()) + 1
        if longest > loaded.info["n_positions"]:
            raise ImageError(
                f"an image of {rgb.size[0]} x {rgb.size[1]} pixels has {longest} patches in a row, but the"
                f" vision tower has {loaded.info['n_positions']} positions: crop it, or lower max_soft_tokens"
            )
        key = image_key(patches, positions, loaded.fingerprint)
        return PreparedImage(patches, positions, len(patches) // pooling**2, key)

    def features(self, prepared: PreparedImage) -> npt.NDArray[np.float32]:
        """The soft tokens of an image, float32 (n_soft_tokens, d), read-only; those of the images used last
        are kept.

        Raises InsufficientMemoryError; PyDiffusionError once the model is closed.
        """
        kept = self._features.find(prepared.key)
        if kept is not None:
            return kept
        with self._running:
            kept = self._features.find(prepared.key)  # by a thread that was here first
            if kept is not None:
                return kept
            native = self._load().native
            features: npt.NDArray[np.float32] = native.encode(prepared.patches, prepared.positions)
            features.setflags(write=False)
            self.n_encoded += 1
            self._features.keep(prepared.key, features)
        return features

    def close(self) -> None:
        """Release the tower's weights; whatever needs them then raises PyDiffusionError."""
        self._model = self._loaded = None


def _checked_max(max_soft_tokens: int | None, own: int) -> int:
    if max_soft_tokens is None or max_soft_tokens == own:
        return own
    if max_soft_tokens not in MAX_SOFT_TOKENS:
        allowed = permitted(tuple(sorted({*MAX_SOFT_TOKENS, own})))
        raise ValueError(f"max_soft_tokens is {max_soft_tokens!r}; permitted are {allowed}")
    return max_soft_tokens


def _fingerprint(path: Path) -> bytes:
    """Tells towers apart without reading all of a file: its size and 256 blocks of 4 KB spread over it."""
    digest = hashlib.blake2b(digest_size=16)
    size = path.stat().st_size
    digest.update(str(size).encode())
    with path.open("rb") as file:
        for i in range(256):
            file.seek(max(0, size - 4096) * i // 255)
            digest.update(file.read(4096))
    return digest.digest()
