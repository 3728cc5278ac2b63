"""The vision tower: features of images, from a file with the tower and its projector (mmproj)."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pydiffusion import _native
from pydiffusion.errors import PyDiffusionError

from .loading import open_image
from .preprocessing import MAX_SOFT_TOKENS, PreparedImage, cut, image_key, permitted

_KEPT_BYTES = 64 << 20  # of features; one image at the released size has 3 MB


class VisionTower:
    """The vision tower and projector of a model; thread-safe.

    Attributes: ``path``; ``info``, the tower's hyperparameters; ``max_soft_tokens``, per image by default;
    ``n_encoded``, how often the tower has run.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        native_model: Any,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        """Load the tower for a model (``_native.Model``), whose device it shares.

        Raises as ``DiffusionModel``; ValueError if the tower is another model's.
        """
        self.path = Path(path)
        native = _native.Vision(os.fspath(self.path), native_model, progress=progress)
        self.info: dict[str, Any] = native.info
        self.max_soft_tokens: int = self.info["max_soft_tokens"]
        self.n_encoded = 0
        self._native: Any = native
        self._fingerprint = _fingerprint(self.path)
        self._encoding = threading.Lock()
        self._lock = threading.Lock()  # of the kept features
        self._features: OrderedDict[bytes, npt.NDArray[np.float32]] = OrderedDict()

    def prepare(self, image: Any, max_soft_tokens: int | None = None) -> PreparedImage:
        """Preprocess an image for this tower; a PreparedImage is returned as it is.

        max_soft_tokens: None takes the file's. Raises as ``preprocess``, and ValueError for an image with
        more rows or columns of patches than the tower has positions.
        """
        if isinstance(image, PreparedImage):
            return image
        n = self._check_max(max_soft_tokens)
        patch_size, pooling = self.info["patch_size"], self.info["pooling"]
        rgb = open_image(image)
        patches, positions = cut(rgb, n, patch_size, pooling)
        longest = int(positions.max()) + 1
        if longest > self.info["n_positions"]:
            raise ValueError(
                f"an image of {rgb.size[0]} x {rgb.size[1]} pixels has {longest} patches in a row, but the"
                f" vision tower has {self.info['n_positions']} positions: crop it, or lower max_soft_tokens"
            )
        key = image_key(patches, positions, self._fingerprint)
        return PreparedImage(patches, positions, len(patches) // pooling**2, key)

    def features(self, prepared: PreparedImage) -> npt.NDArray[np.float32]:
        """The soft tokens of an image, float32 (n_soft_tokens, d), read-only; those of the images used last
        are kept.

        Raises InsufficientMemoryError; PyDiffusionError once the model is closed.
        """
        kept = self._kept(prepared.key)
        if kept is not None:
            return kept
        with self._encoding:
            kept = self._kept(prepared.key)  # by a thread that was here first
            if kept is not None:
                return kept
            if self._native is None:
                raise PyDiffusionError(f"{self.path} is closed")
            features: npt.NDArray[np.float32] = self._native.encode(prepared.patches, prepared.positions)
            features.setflags(write=False)
            self.n_encoded += 1
            self._keep(prepared.key, features)
        return features

    def close(self) -> None:
        """Release the tower's weights; whatever follows raises PyDiffusionError."""
        self._native = None

    def _check_max(self, max_soft_tokens: int | None) -> int:
        if max_soft_tokens is None or max_soft_tokens == self.max_soft_tokens:
            return self.max_soft_tokens
        if max_soft_tokens not in MAX_SOFT_TOKENS:
            allowed = permitted(MAX_SOFT_TOKENS)
            raise ValueError(f"max_soft_tokens is {max_soft_tokens!r}; permitted are {allowed}")
        return max_soft_tokens

    def _kept(self, key: bytes) -> npt.NDArray[np.float32] | None:
        with self._lock:
            found = self._features.get(key)
            if found is not None:
                self._features.move_to_end(key)
            return found

    def _keep(self, key: bytes, features: npt.NDArray[np.float32]) -> None:
        with self._lock:
            self._features[key] = features
            while len(self._features) > 1 and sum(f.nbytes for f in self._features.values()) > _KEPT_BYTES:
                self._features.popitem(last=False)


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
