"""Images in messages: content parts as OpenAI's API has them, and as transformers' chat templates do."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .messages import IMAGE_TYPES, NOT_LISTS, dumped

#: OpenAI's ``detail`` -> the number of soft tokens as a multiple of the model's own: 70, 280, 560 and 1120 of
#: the released model.
DETAILS = {"auto": 1.0, "low": 0.25, "high": 2.0, "original": 4.0}
_MAX_TOKENS = 1 << 20
# Fields of a part of type "image" that hold it, as transformers' templates have them.
_FIELDS = ("image", "url", "path", "base64")
_NOT_PARTS = (str, Mapping, *NOT_LISTS)


class ImagePartError(ValueError):
    """An image of a message that can't be read. where: the part, ``messages[0].content[1]``."""

    def __init__(self, where: str, what: str) -> None:
        super().__init__(f"{where}: {what}")
        self.where = where
        self.what = what

    def __reduce__(self) -> tuple[type[ImagePartError], tuple[str, str]]:
        return type(self), (self.where, self.what)


@dataclass(frozen=True)
class ImagePart:
    """An image of a message.

    where: the part in the messages, for errors.
    source: the image or where it is: what ``pydiffusion.vision`` opens, a data URL, or a function without
        arguments that returns its bytes.
    detail: a key of DETAILS.  max_soft_tokens: overrides it.
    """

    where: str
    source: Any
    detail: str = "auto"
    max_soft_tokens: int | None = None

    @property
    def size(self) -> float:
        """How many images of the released model's usual size it counts as, at least 1."""
        if self.max_soft_tokens is None:
            return max(1.0, DETAILS[self.detail])
        return max(1.0, self.max_soft_tokens / 280)


@dataclass(frozen=True)
class ImageRules:
    """Which images a sender may name instead of sending them.

    files: paths of files here.  fetch: gets the bytes of an http(s) URL; None: such URLs are refused.
    how_to_permit: said where they are refused.
    """

    files: bool = True
    fetch: Callable[[str], bytes] | None = None
    how_to_permit: str = "fetch it yourself, and give its bytes"


_LIBRARY = ImageRules()


def take_images(messages: Any) -> tuple[Any, list[ImagePart]]:
    """Take the images out of messages: each of their parts becomes ``{"type": "image"}``, for which a chat
    template puts a placeholder.

    Returns new messages and the images in their order. What is no list of messages is passed on as it is,
    for ``normalize_messages`` to refuse. Raises ImagePartError.
    """
    if isinstance(messages, _NOT_PARTS) or not isinstance(messages, Iterable):
        return messages, []
    images: list[ImagePart] = []
    return [_without_images(message, f"messages[{i}]", images) for i, message in enumerate(messages)], images


def _without_images(message: Any, where: str, images: list[ImagePart]) -> Any:
    message = dumped(message)
    content = message.get("content") if isinstance(message, Mapping) else None
    if isinstance(content, _NOT_PARTS) or not isinstance(content, Iterable) or hasattr(content, "dtype"):
        return message
    parts = []
    for i, given in enumerate(content):
        part = given if isinstance(given, ImagePart) else dumped(given)
        if not is_image(part):
            parts.append(part)
            continue
        at = f"{where}.content[{i}]"
        if message.get("tool_calls"):  # a template may write results of tools between them
            raise ImagePartError(at, "an assistant's message has an image or tool calls, not both")
        images.append(part if isinstance(part, ImagePart) else read_image_part(part, at))
        parts.append({"type": "image"})
    return {**message, "content": parts}


def is_image(part: Any) -> bool:
    """Whether a content part is an image."""
    return isinstance(part, ImagePart) or (isinstance(part, Mapping) and part.get("type") in IMAGE_TYPES)


def read_image_part(part: Mapping[str, Any], where: str, rules: ImageRules = _LIBRARY) -> ImagePart:
    """Validate an image's part; ``rules`` says what may stand for the image. Raises ImagePartError."""
    kind, options = part["type"], part
    if kind == "image":
        name, given = _only_field(part, where)
    else:
        name, given = "image_url", part.get("image_url")
        if isinstance(given, Mapping):
            options, given = {**part, **given}, given.get("url")
        if not isinstance(given, str):
            raise ImagePartError(where, 'must have image_url, {"url": "data:image/...;base64,..."}')
    detail = options.get("detail") or "auto"
    if not isinstance(detail, str) or detail not in DETAILS:
        raise ImagePartError(where, f"detail is {detail!r}; permitted are {', '.join(DETAILS)}"[:200])
    n = options.get("max_soft_tokens")
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= _MAX_TOKENS):
        raise ImagePartError(
            where, f"max_soft_tokens is {n!r:.40}; permitted is an integer from 1 to {_MAX_TOKENS}"
        )
    return ImagePart(where, _source(name, given, where, rules), detail, n)


def _only_field(part: Mapping[str, Any], where: str) -> tuple[str, Any]:
    given = {name: part[name] for name in _FIELDS if part.get(name) is not None}
    if len(given) != 1:
        there = f"it has {' and '.join(given)}" if given else "it has none"
        raise ImagePartError(where, f"an image needs one of {', '.join(_FIELDS)}; {there}")
    return next(iter(given.items()))


def _source(name: str, given: Any, where: str, rules: ImageRules) -> Any:
    """The source of an image from the field of this name."""
    if not isinstance(given, str):
        if name == "path" and hasattr(given, "__fspath__") and rules.files:
            return Path(given)
        if name != "image" or not rules.files:
            raise ImagePartError(where, f"{name} is a {type(given).__name__}; give a string"[:200])
        return given
    start = given[:8].lower()
    if start.startswith("data:"):
        return given
    if start.startswith(("http://", "https://")):
        if rules.fetch is None:
            raise ImagePartError(where, f"images are not fetched from URLs: {rules.how_to_permit}")
        fetch = rules.fetch
        return lambda: fetch(given)
    if name == "base64":
        return _decoded(given, where)
    if name in ("image", "path") and rules.files:
        return Path(given)
    what = "a data URL (data:image/png;base64,...)"
    raise ImagePartError(where, f"{name} is {_beginning(given)}; give {what}")


def _decoded(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImagePartError(where, f"base64 can't be decoded: {error}") from None


def _beginning(text: str) -> str:
    return repr(text) if len(text) <= 40 else repr(text[:40]) + "..."
