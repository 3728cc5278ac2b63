"""Prompts with images as a session takes them, and how much of one its cache holds already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pydiffusion.vision.prompt import PlacedImage, Prompt, as_prompt, image_number, is_image

from .token_ids import TokenIds, common_prefix, token_array

if TYPE_CHECKING:
    from pydiffusion.model import DiffusionModel
    from pydiffusion.options import Lora
    from pydiffusion.session import Session

# Token ids, a list of token ids and images, or what that stands for.
AnyPrompt = TokenIds | Sequence[Any] | Prompt


def has_images(given: Any) -> bool:
    """Whether it is a prompt with images, or a list with images among its token ids."""
    if isinstance(given, Prompt):
        return bool(given.images)
    if not isinstance(given, (list, tuple)):
        return False
    others = {kind for kind in set(map(type, given)) if not issubclass(kind, (int, np.integer))}
    return bool(others) and any(type(item) in others and is_image(item) for item in given)


def read_prompt(model: DiffusionModel, given: AnyPrompt) -> Prompt:
    """The prompt of token ids and images. Raises as ``token_array``, and for images as ``as_prompt``;
    UnsupportedModelError if the model reads none.
    """
    if has_images(given) and not isinstance(given, Prompt):
        tower = model.require_vision()
        given = as_prompt(given, model.native.image_tokens, tower.prepare)
    if isinstance(given, Prompt):
        return Prompt(token_array(given.ids, model.n_vocab), given.images)
    return Prompt(token_array(given, model.n_vocab))


def part_of(prompt: Prompt, begin: int, end: int | None = None) -> Prompt:
    """Tokens [begin, end) of a prompt, which must not cut an image."""
    ids = prompt.ids[begin:end]
    inside = (placed for placed in prompt.images if begin <= placed.begin and placed.end <= begin + len(ids))
    return Prompt(ids, tuple(PlacedImage(placed.begin - begin, placed.image) for placed in inside))


def end_of_part(prompt: Prompt, n: int) -> int:
    """Where a part of at most ``n`` tokens ends: before an image that does not fit, or after it, if that is
    where the prompt begins.
    """
    for placed in prompt.images:
        if placed.begin < n < placed.end:
            return placed.begin if placed.begin > 0 else placed.end
    return min(n, len(prompt))


def check_no_bare_image(model: DiffusionModel, prompt: Prompt, begin: int = 0) -> None:
    """Raise ValueError for an image token from ``begin`` on that no image belongs to, of a model with a
    vision tower; without one it is a token like others.
    """
    if model.vision is None or not model.native.image_tokens:
        return
    bare = prompt.ids == model.native.image_tokens["image"]
    bare[:begin] = False
    for placed in prompt.images:
        bare[placed.begin : placed.end] = False
    found = np.flatnonzero(bare)
    if len(found):
        raise ValueError(
            f"token {found[0]} of the prompt is the image token, but no image is given for it: give the image"
            " itself, which stands for its begin token, soft tokens and end token"
        )


def cached_length(session: Session, prompt: Prompt) -> int:
    """Length of the beginning of a prompt that the session's cache holds, which cuts no image.

    An image without its picture, as in ``session.tokens``, is the one that the session has there.
    """
    held = session.native.images
    keys = prompt.keys
    if held:
        keys = _with_held(session, prompt)
    n = common_prefix(keys, session_keys(session))
    ends = [(placed.begin, placed.end) for placed in prompt.images]
    ends += [(begin, begin + n_tokens) for begin, n_tokens, _ in held]
    return min([n, *(begin for begin, end in ends if begin < n < end)])


def begin_prompt(session: Session, prompt: Prompt, lora: Lora | None) -> int:
    """Apply adapters (None: the session's), truncate the cache to the beginning of a prompt that it holds
    with them, and return its length. Raises as ``check_no_bare_image``, for the rest of the prompt.
    """
    if session.adapters.apply(lora) and not session.native.images:  # which the prompt may refer to
        session.truncate(0)
    return keep_shared(session, prompt, check=True)


def keep_shared(session: Session, prompt: Prompt, *, check: bool) -> int:
    """Truncate a session's cache to the beginning of a prompt that it holds, and return its length.

    check: raise as ``check_no_bare_image``, with nothing changed, for the rest of the prompt.
    """
    n = cached_length(session, prompt)
    if check:
        check_no_bare_image(session.model, prompt, n)
    if n < session.n_past:
        session.truncate(n)
    return n


def session_keys(session: Session) -> npt.NDArray[np.int64]:
    """As ``Prompt.keys``, of what is in a session's cache."""
    keys = session.tokens.astype(np.int64)
    for begin, n, key in session.native.images:
        keys[begin : begin + n] = image_number(key)
    return keys


def _with_held(session: Session, prompt: Prompt) -> npt.NDArray[np.int64]:
    """The prompt's keys, with the session's images where it has image tokens only."""
    keys = prompt.keys.copy()
    token = session.model.native.image_tokens["image"]
    for begin, n, key in session.native.images:
        place = keys[begin : begin + n]  # at images that the prompt has, the keys are negative
        if len(place) == n and (place == token).all():
            place[:] = image_number(key)
    return keys
