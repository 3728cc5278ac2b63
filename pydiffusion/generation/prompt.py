"""The prompt of a generation: text, or token ids and images, encoded into a session."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydiffusion.vision.prompt import Prompt

from .image_prompt import has_images, read_prompt

if TYPE_CHECKING:
    from pydiffusion.model import DiffusionModel
    from pydiffusion.options import Lora
    from pydiffusion.session import Session

    from .image_prompt import AnyPrompt


def prefilled_session(
    model: DiffusionModel, prompt: str | AnyPrompt, session: Session | None = None, lora: Lora | None = None
) -> Session:
    """A session with the prompt as its tokens: the one given, its cached prefix reused, or a new one.

    lora: adapters that it is encoded with; None: the session's.

    Raises TypeError for anything but text, token ids and images, ValueError for an empty prompt or a session
    of another model, else as ``Session.prefill``.
    """
    given = given_prompt(model, prompt)
    session = session_for(model, session)
    session.prefill(given, lora=lora)
    return session


def session_for(model: DiffusionModel, session: Session | None) -> Session:
    """The session given, or a new one. Raises TypeError for no session, ValueError for another model's."""
    if session is None:
        return model.new_session()
    if not hasattr(session, "prefill"):
        kind = type(session).__name__
        raise TypeError(f"session must be one of model.new_session(), not {kind}")
    if getattr(session, "model", model) is not model:
        raise ValueError("the session belongs to another model")
    return session


def given_prompt(model: DiffusionModel, prompt: str | AnyPrompt) -> Prompt:
    """A text's tokens, or the token ids and images given, also from an iterator.

    Raises TypeError, saying what to call instead, for anything else; ValueError for an empty prompt or an id
    outside the vocabulary; for images as ``DiffusionModel.encode_image``.
    """
    if isinstance(prompt, str):
        ids: Any = model.tokenize(prompt)
    elif isinstance(prompt, Prompt):
        ids = prompt
    else:
        _refuse_others("prompt", prompt)
        ids = prompt if hasattr(prompt, "__len__") else list(prompt)
        if not has_images(ids):
            _refuse_several(ids)
    if len(ids) == 0:
        raise ValueError("the prompt has no tokens")
    return read_prompt(model, ids)


def check_text(name: str, text: Any) -> None:
    """Raise TypeError, saying what to give instead, unless it is text."""
    if isinstance(text, str):
        return
    _refuse_others(name, text)
    raise TypeError(f"{name} must be str, not {type(text).__name__}")


def check_prompts(prompts: Any, name: str, alone: str) -> None:
    """Raise TypeError for what is one prompt, or no collection. alone: the method for a single one."""
    if isinstance(prompts, (str, bytes, Mapping)) or not hasattr(prompts, "__iter__"):
        raise TypeError(
            f"{name} must be a list or another iterable of them, not {type(prompts).__name__}: give a list,"
            f" or call {alone} for a single one"
        )


def _refuse_others(name: str, given: Any) -> None:
    """Raise TypeError for what is neither text nor token ids, though other libraries take it."""
    kind = type(given).__name__
    if given is None:
        instead = "give a text or token ids"
    elif isinstance(given, (bytes, bytearray, memoryview)):
        instead = "decode it, as in bytes.decode('utf-8')"
    elif isinstance(given, os.PathLike):
        instead = "give the file's text, as from Path.read_text()"
    elif hasattr(type(given), "getbands"):  # a PIL image
        instead = "give a list of token ids and images, or call model.chat with it in a message"
    elif _is_message(given):
        instead = "call model.chat([message]) for an answer to messages"
    elif isinstance(given, Mapping) or hasattr(given, "input_ids"):
        name = _first_of(given, "input_ids", "prompt_token_ids", "prompt")
        instead = f"give its {name!r}" if name else "give a text or token ids"
    elif hasattr(given, "ids"):  # Encoding of the package tokenizers
        instead = "give its ids"
    elif isinstance(given, (set, frozenset)):
        instead = "a set has no order; give a list of token ids"
    elif getattr(given, "ndim", 1) == 0 or not hasattr(given, "__iter__"):
        instead = "give a text, or token ids in a list"
    else:
        return
    raise TypeError(f"{name} is of type {kind}: {instead}")


def _refuse_several(ids: Any) -> None:
    """Raise for a list of messages or of prompts."""
    first = next(iter(ids), None)
    if _is_message(first):
        raise TypeError(
            "the prompt is a list of messages: call model.chat(messages) for the answer, or"
            " model.chat_prompt(messages) for a prompt's token ids"
        )
    if isinstance(first, str):
        raise TypeError(
            "the prompt is a list of texts: call model.generate_batch(prompts), or join them into one"
        )
    if getattr(first, "ndim", int(hasattr(first, "__len__"))) > 0:
        raise ValueError(
            "the prompt is nested, but token ids must be one-dimensional: give one row of it, or call"
            " model.generate_batch(prompts) for several"
        )


def _is_message(value: Any) -> bool:
    return "role" in value if isinstance(value, Mapping) else hasattr(value, "role")


def _first_of(given: Any, *names: str) -> str:
    """The first of these names that a mapping or object has, or an empty text."""
    return next((n for n in names if (n in given if isinstance(given, Mapping) else hasattr(given, n))), "")
