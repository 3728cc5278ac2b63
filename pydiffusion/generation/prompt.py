"""The prompt of a generation: text or token ids, encoded into a session."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydiffusion.model import DiffusionModel
    from pydiffusion.session import Session

    from .token_ids import TokenIds


def prefilled_session(
    model: DiffusionModel, prompt: str | TokenIds, session: Session | None = None
) -> Session:
    """A session with the prompt as its tokens: the one given, its cached prefix reused, or a new one.

    Raises ValueError for an empty prompt or a session of another model, else as ``Session.prefill``.
    """
    ids = model.tokenize(prompt) if isinstance(prompt, str) else prompt
    if len(ids) == 0:
        raise ValueError("the prompt has no tokens")
    if session is None:
        session = model.new_session()
    elif session.model is not model:
        raise ValueError("the session belongs to another model")
    session.prefill(ids)
    return session
