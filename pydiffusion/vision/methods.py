"""The methods of ``DiffusionModel`` for images."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pydiffusion.errors import UnsupportedModelError

from . import finding
from .tower import TowerSource, VisionTower

if TYPE_CHECKING:
    from pydiffusion.model import DiffusionModel


class VisionMethods:
    """Images as input, of a model with a vision tower."""

    _vision: ModelVision

    @property
    def vision(self) -> VisionTower | None:
        """The vision tower, which is loaded on first use; None if the model has none so far."""
        return self._vision.tower

    def require_vision(self) -> VisionTower:
        """The vision tower, loaded. Of a model from the Hugging Face Hub without one here, its repo's is
        downloaded.

        Raises UnsupportedModelError, saying what to do, if there is none or no single one; else as the model
        itself.
        """
        return self._vision.require()

    def encode_image(self, image: Any, max_soft_tokens: int | None = None) -> npt.NDArray[np.float32]:
        """The soft tokens of an image, float32 (n_soft_tokens, d): what takes the place of token embeddings.

        image: a PIL image, an array, a path or the bytes of a file. max_soft_tokens: None takes the file's,
            else 70, 140, 280, 560 or 1120. The array is read-only, since the last images' are kept.
        Raises ImageError for an image that can't be read or has too many patches, else as ``preprocess`` and
        ``require_vision``.
        """
        tower = self.require_vision()
        return tower.features(tower.prepare(image, max_soft_tokens))


class ModelVision:
    """The vision tower of a model: given, found beside it or on the hub, or none."""

    def __init__(
        self, model: DiffusionModel, native: TowerSource, mmproj: str | os.PathLike[str] | None
    ) -> None:
        """mmproj: a file, which is loaded at once; "auto" to look for one, which is loaded on first use;
        None for none.
        """
        self._native = native
        self._model_path = model.path
        self._searches = mmproj == finding.AUTO
        self._why_not = f"{model.path.name} was opened without a vision file (mmproj=None)"
        self._lock = threading.Lock()
        self.tower: VisionTower | None = None
        if self._searches:
            found = finding.beside(model.path, model.hparams["n_embd"])
            self._why_not = found.why_not
            if found.path is not None and native.image_tokens:
                self.tower = VisionTower(found.path, native)
        elif mmproj is not None:
            self._check_image_tokens()
            self.tower = VisionTower(mmproj, native)
            self.tower.load()

    def require(self) -> VisionTower:
        """See ``VisionMethods.require_vision``."""
        with self._lock:
            if self.tower is None and self._searches:
                self._check_image_tokens()
                path = finding.on_hub(self._model_path)
                self._searches = False  # each image would ask the hub again; after an error it is asked again
                self.tower = None if path is None else VisionTower(path, self._native)
        if self.tower is None:
            raise UnsupportedModelError(f"{self._why_not}: {finding.HOW_TO_GIVE_ONE}")
        self.tower.load()
        return self.tower

    def close(self) -> None:
        """Release the tower's weights."""
        if self.tower is not None:
            self.tower.close()

    def _check_image_tokens(self) -> None:
        if not self._native.image_tokens:
            raise UnsupportedModelError(
                f"{self._model_path.name} reads no images: its file and vocabulary name no image tokens"
            )
