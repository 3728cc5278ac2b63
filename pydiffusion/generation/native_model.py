"""A model's weights and the native objects that use them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from pydiffusion import _native
from pydiffusion.errors import AdapterError, PyDiffusionError

if TYPE_CHECKING:
    from pydiffusion.adapters.adapter import Adapter


class NativeModel:
    """A model's weights until it is closed, and the native objects that use them. For this package only."""

    def __init__(self, model: _native.Model, path: Path) -> None:
        self._model: _native.Model | None = model
        self._path = path

    @property
    def file(self) -> _native.GgufFile:
        """The file that the weights are from."""
        return self._open_model().file

    def new_session(self, n_ctx: int, image_tokens: int = 0) -> _native.Session:
        """A session with a cache of ``n_ctx`` tokens; image_tokens: most of an image, that it is to have room
        for. Raises InsufficientMemoryError.
        """
        return _native.Session(self._open_model(), n_ctx, image_tokens)

    @property
    def image_tokens(self) -> dict[str, int]:
        """Ids of the tokens around and in the place of an image: "image", "begin", "end"; or empty."""
        return self._open_model().image_tokens

    def new_vision(self, path: Path) -> _native.Vision:
        """Load a vision tower onto the model's device. Raises as opening a model does."""
        return _native.Vision(os.fspath(path), self._open_model())

    def new_adapter(self, adapter: Adapter) -> _native.Adapter:
        """Load an adapter beside the weights. Raises AdapterError for one that does not fit them,
        InsufficientMemoryError.
        """
        return new_adapter(self._open_model(), adapter)

    def new_batch(self) -> _native.Batch:
        """A batch, which denoises several sessions in one graph."""
        return _native.Batch(self._open_model())

    def close(self) -> None:
        """Release the weights; sessions and batches keep them alive. Whatever follows raises
        PyDiffusionError.
        """
        self._model = None

    def _open_model(self) -> _native.Model:
        if self._model is None:
            raise PyDiffusionError(f"{self._path} is closed")
        return self._model


def new_adapter(model: _native.Model, adapter: Adapter) -> _native.Adapter:
    """See ``NativeModel.new_adapter``."""
    try:
        return _native.Adapter(model, adapter.name, adapter.scaled())
    except ValueError as error:
        raise AdapterError(f"{adapter.path}: {error}") from error
