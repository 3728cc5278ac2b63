"""Prompts with images: token ids, in which an image is a begin token, soft tokens and an end token."""

from __future__ import annotations

import operator
import os
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
    if isinstance(item, (PreparedImage, bytes, bytearray, memoryview, os.PathLike)):
        return True
    if hasattr(type(item), "getbands"):  # a PIL image; asked of the class, since properties may copy pixels
        return True
    ndim = getattr(item, "ndim", 0)
    return isinstance(ndim, int) and ndim >= 2


def as_prompt(
    items: Sequence[Any] | npt.NDArray[np.integer[Any]],
    image_tokens: Mapping[str, int],
    prepare: Callable[[Any], PreparedImage],
) -> Prompt:
    """A prompt from a flat list of token ids and images; an image stands for its begin token, soft tokens and
    end token.

    image_tokens: ids by name, "image", "begin" and "end". prepare: of an image, ``VisionTower.prepare``.
    Raises TypeError for an item that is neither, UnsupportedModelError for an image where image_tokens is
    empty, else as ``prepare``. That ids are in the vocabulary is checked where they are used.
    """
    ids: list[int] = []
    images: list[PlacedImage] = []
    for item in items:
        if type(item) is int:
            ids.append(item)
        elif is_image(item):
            image = item if isinstance(item, PreparedImage) else prepare(item)
            images.append(PlacedImage(len(ids) + 1, image))
            ids += _block(image, image_tokens)
        else:
            ids.append(_token(item))
    return Prompt(_int32(ids), tuple(images))


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
    array = _int32(ids)
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
        block = _int32(_block(image, image_tokens))
        parts += [array[done:at], block]
        placed.append(PlacedImage(n + at - done + 1, image))
        n += at - done + len(block)
        done = at + 1
    parts.append(array[done:])
    return Prompt(np.concatenate(parts), tuple(placed))


def _block(image: PreparedImage, image_tokens: Mapping[str, int]) -> list[int]:
    """The ids of an image: begin, soft tokens, end."""
    token = _image_token(image_tokens)
    return [image_tokens["begin"], *[token] * image.n_soft_tokens, image_tokens["end"]]


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
        return operator.index(item)
    except TypeError:
        kind = type(item).__name__
        raise TypeError(f"a prompt's list has token ids and images; one item is of type {kind}") from None


def _int32(ids: Sequence[int] | npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int32]:
    array = np.asarray(ids, dtype=np.int64)
    if len(array) and not (_INT32.min <= array.min() and array.max() <= _INT32.max):
        raise ValueError("token ids must be within the vocabulary; one of them doesn't even fit in 32 bits")
    return array.astype(np.int32)


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
