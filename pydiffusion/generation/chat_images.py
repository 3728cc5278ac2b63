"""Images of messages, put into the prompt that a chat template rendered from the messages."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydiffusion.chat.image_parts import DETAILS, ImagePart, ImagePartError
from pydiffusion.errors import InsufficientMemoryError, PyDiffusionError, UnsupportedModelError
from pydiffusion.vision.loading import open_image
from pydiffusion.vision.preprocessing import MAX_SOFT_TOKENS
from pydiffusion.vision.prompt import Prompt, place

if TYPE_CHECKING:
    from pydiffusion.model import DiffusionModel
    from pydiffusion.vision.preprocessing import PreparedImage
    from pydiffusion.vision.tower import VisionTower

# Images being decoded at a time, whatever the number of threads that prepare prompts: one may take 1 GB.
_DECODING = threading.BoundedSemaphore(2)


def vision_of(model: DiffusionModel) -> VisionTower:
    """The model's vision tower. Raises UnsupportedModelError, saying what to do, if it reads no images."""
    if model.vision is None:
        raise UnsupportedModelError(
            f"{model.path.name} reads no images without a vision file: load one with --mmproj FILE, or"
            " DiffusionModel(path, mmproj=FILE)"
        )
    return model.vision


def with_images(model: DiffusionModel, ids: list[int], parts: Sequence[ImagePart]) -> list[int] | Prompt:
    """A chat's prompt with its images in place of the template's placeholders; without any, the ids.

    Raises UnsupportedModelError if the model reads no images, ImagePartError for one that can't be read,
    ValueError unless the template has written a placeholder for each.
    """
    if not parts:
        return ids
    vision, tokens = vision_of(model), model.native.image_tokens
    n_places = ids.count(tokens["image"]) if tokens else 0
    if n_places != len(parts):
        raise ValueError(
            f"the chat template has written {n_places} places for {len(parts)} images: it has none for the"
            f" messages with images, or not in every role ({parts[0].where})"
        )
    return place(ids, [prepare_part(vision, part) for part in parts], tokens)


def prepare_part(vision: VisionTower, part: ImagePart) -> PreparedImage:
    """Decode and preprocess an image of a message. Raises ImagePartError; OSError of a path."""
    try:
        source: Any = part.source() if callable(part.source) else part.source
        with _DECODING:
            return vision.prepare(source, _soft_tokens(part, vision.max_soft_tokens))
    except (InsufficientMemoryError, ImagePartError):
        raise
    except (PyDiffusionError, ValueError, TypeError) as error:
        raise ImagePartError(part.where, str(error)) from None


def _soft_tokens(part: ImagePart, own: int) -> int | None:
    """The maximum number of soft tokens; None for the model's own, which ``detail`` falls back on where the
    multiple of it is none that models are trained with.
    """
    if part.max_soft_tokens is not None:
        return part.max_soft_tokens
    wanted = own * DETAILS[part.detail]
    return int(wanted) if wanted in MAX_SOFT_TOKENS else None


def check_image(path: Path) -> None:
    """Decode an image file. Raises PyDiffusionError, naming it, for one that can't be read as an image;
    OSError.
    """
    with _DECODING:
        open_image(path)


def n_image_tokens(prompt: Sequence[int] | Prompt) -> int:
    """Number of a prompt's tokens that are images: soft tokens, begin and end tokens."""
    return sum(placed.image.n_soft_tokens + 2 for placed in getattr(prompt, "images", ()))
