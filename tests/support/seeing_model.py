"""A scripted model that reads images: a vision tower without weights, real prompts and messages."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from PIL import Image

from pydiffusion.chat.formats.registry import BUILT_IN_TEMPLATES
from pydiffusion.errors import ImageError
from pydiffusion.tokenizer import Tokenizer, TokenType
from pydiffusion.vision.loading import open_image
from pydiffusion.vision.preprocessing import PreparedImage, cut, image_key
from pydiffusion.vision.recent import Recent
from support.images import file_bytes
from support.server_fakes import Script, ScriptedModel, metadata

_PATCH, _POOLING = 4, 2
_TOKENS = {"image": "<|image|>", "begin": "<|image>", "end": "<image|>"}


class FakeTower:
    """Prepares images as a tower with small patches would; their features are zeros.

    images: the pixels of what was prepared, as arrays.
    """

    max_soft_tokens = 280
    n_positions = 1 << 20

    def __init__(self) -> None:
        self.n_encoded = 0
        self.prepared: Recent[PreparedImage] = Recent(64 << 20)
        self.images: list[np.ndarray] = []
        self._known: set[bytes] = set()

    def prepare(self, image: Any, max_soft_tokens: int | None = None) -> PreparedImage:
        if isinstance(image, PreparedImage):
            return image
        opened = open_image(image)
        self.images.append(np.asarray(opened))
        patches, positions = cut(opened, max_soft_tokens or self.max_soft_tokens, _PATCH, _POOLING)
        if positions.max() >= self.n_positions:
            raise ImageError("too few positions")
        key = image_key(patches, positions, b"fake")
        return PreparedImage(patches, positions, len(patches) // _POOLING**2, key)

    def features(self, prepared: PreparedImage) -> np.ndarray:
        if prepared.key not in self._known:
            self.n_encoded += 1
            self._known.add(prepared.key)
        return np.zeros((prepared.n_soft_tokens, 8), np.float32)


class SeeingModel(ScriptedModel):
    """Has the built-in chat template, and the tokens that it needs for images."""

    def __init__(self, script: Script, **options: Any) -> None:
        super().__init__(script, **options)
        self.metadata = seeing_metadata()
        self.n_vocab = len(self.metadata["tokenizer.ggml.tokens"])
        self.tokenizer = Tokenizer(self.metadata, self.n_vocab)
        tokens = self.metadata["tokenizer.ggml.tokens"]
        self.native.image_tokens = {name: tokens.index(text) for name, text in _TOKENS.items()}
        self.vision = FakeTower()

    def require_vision(self) -> FakeTower:
        return self.vision


def seeing_metadata() -> dict[str, Any]:
    found = metadata()
    found["tokenizer.ggml.tokens"] += _TOKENS.values()
    found["tokenizer.ggml.token_type"] += [int(TokenType.CONTROL)] * len(_TOKENS)
    found["tokenizer.chat_template"] = BUILT_IN_TEMPLATES["diffusion-gemma"].read_text("utf-8")
    return found


def png(color: int = 128, size: tuple[int, int] = (40, 30)) -> bytes:
    """A PNG of one grey."""
    return file_bytes(Image.new("L", size, color), "PNG")


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def image_part(data: bytes, kind: str = "image/png", **more: Any) -> dict[str, Any]:
    """A file as a part of a message, as OpenAI's API has it."""
    return {"type": "image_url", "image_url": {"url": data_url(data, kind), **more}}


def grey_part(color: int = 128, **more: Any) -> dict[str, Any]:
    """A picture of one grey as a part of a message."""
    return image_part(png(color), **more)
