"""api.md names all that the package exports. That its examples run: tests/cli/test_docs_run.py."""

from __future__ import annotations

import inspect
from dataclasses import fields

from support.paths import REPOSITORY

import pydiffusion
from pydiffusion import ChatCompletion, DiffusionModel, GenerationOptions, Session

DOCS = REPOSITORY / "docs"
# Methods that the commands and the server use, documented in the code.
_UNLISTED = ("automaton", "check_chat_template")
PAGE = (DOCS / "api.md").read_text(encoding="utf-8")


def test_every_option_error_and_method_is_described() -> None:
    for field in fields(GenerationOptions):
        assert f"`{field.name}`" in PAGE, field.name
    for name in pydiffusion.__all__:
        if name not in ("Event", "__version__"):
            assert name in PAGE, name
    for name, _ in inspect.getmembers(DiffusionModel, inspect.isfunction):
        if not name.startswith("_"):
            assert name in _UNLISTED or f"{name}(" in PAGE, name
    for field in fields(ChatCompletion):
        assert f"`{field.name}`" in PAGE, field.name
    for name in vars(Session):
        if not name.startswith("_") and callable(getattr(Session, name)):
            assert f"`{name}(" in PAGE, name
