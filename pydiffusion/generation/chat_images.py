"""Images of messages, put into the prompt that a chat template rendered from the messages."""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydiffusion.chat.image_parts import DETAILS, ImagePart, ImagePartError, take_images
from pydiffusion.errors import ImageError, InsufficientMemoryError, PyDiffusionError
from pydiffusion.vision.loading import decode_data_url, open_file, open_image, pixels_to_decode
from pydiffusion.vision.preprocessing import MAX_SOFT_TOKENS
from pydiffusion.vision.prompt import Prompt, place

if TYPE_CHECKING:
    from pydiffusion.model import DiffusionModel
    from pydiffusion.vision.preprocessing import PreparedImage
    from pydiffusion.vision.recent import Recent
    from pydiffusion.vision.tower import VisionTower

# Images being decoded at a time, whatever the number of threads that prepare prompts: one may take 1 GB.
_DECODING = threading.BoundedSemaphore(2)
# Of a prompt's files together. Decoding 100 million may take 2 s of a CPU, also of a file of a few KB.
MAX_PIXELS_TOGETHER = 400_000_000

_MAX_FILE = 256 << 20  # bytes of a file that the command line names


def images_of(model: DiffusionModel, messages: Any) -> tuple[Any, list[ImagePart]]:
    """Messages with places for their images, and these; see ``take_images``.

    Raises as ``DiffusionModel.require_vision`` if there are any, ImagePartError.
    """
    messages, images = take_images(messages)
    if images:
        model.require_vision()
    return messages, images


def with_images(model: DiffusionModel, ids: list[int], parts: Sequence[ImagePart]) -> list[int] | Prompt:
    """A chat's prompt with its images in place of the template's placeholders; without any, the ids.

    Raises as ``DiffusionModel.require_vision``, ImagePartError for an image that can't be read, ValueError
    unless the template has written a placeholder for each.
    """
    if not parts:
        return ids
    vision, tokens = model.require_vision(), model.native.image_tokens
    n_places = ids.count(tokens["image"]) if tokens else 0
    if n_places != len(parts):
        raise ValueError(
            f"the chat template has written {n_places} places for {len(parts)} images: it has none for the"
            f" messages with images, or not in every role ({parts[0].where})"
        )
    budget = _PixelBudget(vision.prepared)
    # What is here is counted before the first one is decoded; what has to be fetched, when its turn comes.
    here = [None if callable(part.source) else budget.take(part) for part in parts]
    prepared = [
        _prepare(vision, part, source or budget.take(part)) for part, source in zip(parts, here, strict=True)
    ]
    return place(ids, prepared, tokens)


@dataclass(frozen=True)
class _Source:
    """An image, fetched and out of its data URL. key: of what is prepared of it, in ``VisionTower.prepared``,
    or None for an object or a file, which may change.

    Each turn of a conversation has the earlier images again, and decoding a photograph takes a good part of a
    second.
    """

    image: Any
    key: bytes | None


class _PixelBudget:
    """How many pixels the images of a prompt may still have."""

    def __init__(self, kept: Recent[PreparedImage]) -> None:
        """kept: images that are not decoded again, and so don't count."""
        self._kept = kept
        self._n = 0

    def take(self, part: ImagePart) -> _Source:
        """Get a part's image and count it. Raises ImagePartError, also once there are too many pixels."""
        image = _image(part)
        key = _key(image, part)
        if key is None or self._kept.find(key) is None:
            self._n += pixels_to_decode(image)
        if self._n > MAX_PIXELS_TOGETHER:
            limit = MAX_PIXELS_TOGETHER // 10**6
            raise ImagePartError(
                part.where,
                f"the images up to this one have {self._n} pixels; at most {limit} million are decoded for a"
                " prompt: scale them down",
            )
        return _Source(image, key)


def _image(part: ImagePart) -> Any:
    """A part's image, fetched and out of its data URL. Raises ImagePartError."""
    source = part.source
    try:
        if callable(source):
            return source()
        return decode_data_url(source) if isinstance(source, str) else source
    except (PyDiffusionError, ValueError) as error:
        raise ImagePartError(part.where, str(error)) from None


def _key(image: Any, part: ImagePart) -> bytes | None:
    if not isinstance(image, bytes):
        return None
    digest = hashlib.blake2b(f"{part.detail} {part.max_soft_tokens} ".encode(), digest_size=32)
    digest.update(image)
    return digest.digest()


def _prepare(vision: VisionTower, part: ImagePart, source: _Source) -> PreparedImage:
    """Decode and preprocess an image of a message, or find it. Raises ImagePartError, also for a file that
    can't be read: one among the messages of many requests is that request's error.
    """
    image = None if source.key is None else vision.prepared.find(source.key)
    if image is not None:
        return image
    try:
        with _DECODING:
            if part.max_soft_tokens is not None:
                image = vision.prepare(source.image, part.max_soft_tokens)
            else:
                image = _in_detail(vision, source.image, DETAILS[part.detail])
    except InsufficientMemoryError:
        raise
    except (PyDiffusionError, ValueError, TypeError) as error:
        raise ImagePartError(part.where, str(error)) from None
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        raise ImagePartError(part.where, what) from None
    if source.key is not None:
        vision.prepared.keep(source.key, image)
    return image


def _in_detail(vision: VisionTower, source: Any, factor: float) -> PreparedImage:
    """factor: of the model's own number of soft tokens. Only a wish, as OpenAI's ``detail`` is: the model's
    own number is taken where models are not trained with that many, or the tower has too few positions.
    """
    wanted = vision.max_soft_tokens * factor
    if wanted in MAX_SOFT_TOKENS and factor != 1:
        opened = open_image(source)
        try:
            return vision.prepare(opened, int(wanted))
        except ImageError:
            source = opened
    return vision.prepare(source)


def read_image(path: Path) -> bytes:
    """The bytes of an image file, or a pipe, after decoding them. Raises PyDiffusionError, naming it, for one
    that can't be read as an image; OSError.
    """
    with path.open("rb") as file:
        data = file.read(_MAX_FILE + 1)
    if len(data) > _MAX_FILE:
        raise ImageError(f"{path}: more than {_MAX_FILE >> 20} MiB: not an image, or too large a one")
    with _DECODING:
        open_file(io.BytesIO(data), str(path))
    return data


def n_image_tokens(prompt: Sequence[int] | Prompt) -> int:
    """Number of a prompt's tokens that are images: soft tokens, begin and end tokens."""
    return sum(placed.image.n_soft_tokens + 2 for placed in getattr(prompt, "images", ()))


def n_image_bytes(prompt: Sequence[int] | Prompt) -> int:
    """Bytes of a prompt's images, until they are encoded."""
    return sum(placed.image.nbytes for placed in getattr(prompt, "images", ()))
