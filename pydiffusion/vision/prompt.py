"""Prompts with images: token ids, in which an image is a begin token, soft tokens and an end token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from pydiffusion.errors import UnsupportedModelError

from .preprocessing import PreparedImage

_INT32 = np.iinfo(np.int32)


@dataclass(frozen=True)
class PlacedImage:
    """An image in a prompt. begin: index of its first soft token; the begin token is before it."""

    begin: int
    image: PreparedImage

    @property
    def end(self) -> int:
        """Index after the last soft token, which is that of the end token."""
        return self.begin + self.image.n_soft_tokens


@dataclass(frozen=True, eq=False)
class Prompt:
    """Token ids and the images among them.

    ids: int32 (n,), at soft tokens the id of the image token. images: in order.
    """

    ids: npt.NDArray[np.int32]
    images: tuple[PlacedImage, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def keys(self) -> npt.NDArray[np.int64]:
        """int64 (n,): the ids, and at soft tokens a negative number derived from the image's key, so that
        equal prefixes of two prompts' keys mean equal content of a cache.
        """
        keys = self.ids.astype(np.int64)
        for placed in self.images:
            keys[placed.begin : placed.end] = image_number(placed.image.key)
        keys.setflags(write=False)
        return keys


def image_number(key: bytes) -> int:
    """The number that stands for an image's soft tokens in ``Prompt.keys``: negative, int64."""
    return -1 - (int.from_bytes(key[:8], "little") >> 1)


def is_image(item: Any) -> bool:
    """Whether an item of a list is an image, rather than a token id or a mistake: a PreparedImage, a PIL
    image, an array of two or more dimensions, a path (no str), or bytes.
    """
    if isinstance(item, int):
        return False
    if isinstance(item, (PreparedImage, bytes, bytearray, memoryview)) or hasattr(item, "__fspath__"):
        return True
    ndim = getattr(item, "ndim", None)
    if isinstance(ndim, int):
        return ndim >= 2
    return hasattr(item, "__array_interface__") and hasattr(item, "getbands")


def as_prompt(
    items: Sequence[Any] | npt.NDArray[np.integer[Any]],
    image_tokens: Mapping[str, int],
    prepare: Callable[[Any], PreparedImage],
) -> Prompt:
    """A prompt from a flat list of token ids and images; an image stands for its begin token, soft tokens and
    end token.

    image_tokens: ids by name, "image", "begin" and "end". prepare: of an image, ``VisionTower.prepare``.
    Raises TypeError for an item that is neither, UnsupportedModelError for an image where image_tokens is
    empty, else as ``prepare``.
    """
    parts: list[npt.NDArray[np.int64]] = []
    images: list[PlacedImage] = []
    waiting: list[int] = []
    n = 0
    for item in items:
        if not is_image(item):
            waiting.append(_token(item))
            continue
        image = item if isinstance(item, PreparedImage) else prepare(item)
        block = _block(image, image_tokens)
        before = np.asarray(waiting, dtype=np.int64)
        waiting = []
        parts += [before, block]
        images.append(PlacedImage(n + len(before) + 1, image))
        n += len(before) + len(block)
    parts.append(np.asarray(waiting, dtype=np.int64))
    return Prompt(np.concatenate(parts).astype(np.int32), tuple(images))


def place(
    ids: Sequence[int] | npt.NDArray[np.integer[Any]],
    images: Iterable[PreparedImage],
    image_tokens: Mapping[str, int],
) -> Prompt:
    """A prompt from the ids of a tokenized chat prompt: each image token becomes the begin token, the soft
    tokens and the end token of the next image.

    Raises ValueError unless there are as many image tokens as images, UnsupportedModelError for images where
    image_tokens is empty.
    """
    array = np.asarray(ids, dtype=np.int32)
    images = tuple(images)
    if not images and not image_tokens:
        return Prompt(array)
    places = np.flatnonzero(array == _image_token(image_tokens))
    if len(places) != len(images):
        raise ValueError(
            f"the prompt has {_count(len(places), 'image token')}, but {_count(len(images), 'image')}: the"
            " chat template has to write one for each image"
        )
    parts: list[npt.NDArray[np.int32]] = []
    placed: list[PlacedImage] = []
    n = done = 0
    for at, image in zip(places.tolist(), images, strict=True):
        block = _block(image, image_tokens)
        parts += [array[done:at], block.astype(np.int32)]
        placed.append(PlacedImage(n + at - done + 1, image))
        n += at - done + len(block)
        done = at + 1
    parts.append(array[done:])
    return Prompt(np.concatenate(parts), tuple(placed))


def _block(image: PreparedImage, image_tokens: Mapping[str, int]) -> npt.NDArray[np.int64]:
    """The ids of an image: begin, soft tokens, end."""
    token = _image_token(image_tokens)
    block = np.full(image.n_soft_tokens + 2, token, dtype=np.int64)
    block[0], block[-1] = image_tokens["begin"], image_tokens["end"]
    return block


def _image_token(image_tokens: Mapping[str, int]) -> int:
    if not image_tokens:
        raise UnsupportedModelError("the model has no image tokens: its file and vocabulary name none")
    return image_tokens["image"]


def _token(item: Any) -> int:
    if isinstance(item, str):
        raise TypeError(
            f"a prompt's list has token ids and images, not text: tokenize {item[:40]!r}, or give"
            " pathlib.Path(...) for an image file"
        )
    try:
        token = item.__index__()
    except (AttributeError, TypeError):
        kind = type(item).__name__
        raise TypeError(f"a prompt's list has token ids and images; one item is a {kind}") from None
    if not _INT32.min <= token <= _INT32.max:
        raise ValueError(f"{token} is not a token id")
    return token


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
