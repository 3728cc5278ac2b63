"""The examples of the library's pages run unchanged; api.md names all that the package exports."""

from __future__ import annotations

import inspect
import re
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from support.paths import REPOSITORY

import pydiffusion
from pydiffusion import ChatCompletion, DiffusionModel, GenerationOptions, Session
from pydiffusion.generation.async_methods import AsyncMethods

DOCS = REPOSITORY / "docs"
# Methods that the commands and the server use, documented in the code.
_UNLISTED = ("automaton", "check_chat_template")
PAGE = (DOCS / "api.md").read_text(encoding="utf-8")


def test_the_examples_run(
    gguf_file: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copy(gguf_file("small"), tmp_path / "model.gguf")
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(examples) >= 5
    names: dict[str, object] = {}
    for example in examples:
        exec(compile(example, "docs/api.md", "exec"), names)
    assert "canvas 0 took" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["coming-from-llama-cpp-python.md", "coming-from-transformers.md"])
def test_the_migration_examples_run(
    gguf_file: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    shutil.copy(gguf_file("small"), tmp_path / "model.gguf")
    monkeypatch.chdir(tmp_path)
    page = (DOCS / name).read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(example.replace("n_ctx=2048", "n_ctx=256"), name, "exec"), {})
    assert capsys.readouterr().out.strip(), "each prints an answer"


def test_every_option_error_and_method_is_described() -> None:
    for field in fields(GenerationOptions):
        assert f"`{field.name}`" in PAGE, field.name
    for name in pydiffusion.__all__:
        if name not in ("Event", "__version__"):
            assert name in PAGE, name
    for name in [*vars(DiffusionModel), *vars(AsyncMethods)]:
        if inspect.isfunction(getattr(DiffusionModel, name)) and not name.startswith("_"):
            assert name in _UNLISTED or f"{name}(" in PAGE, name
    for field in fields(ChatCompletion):
        assert f"`{field.name}`" in PAGE, field.name
    for name in vars(Session):
        if not name.startswith("_") and callable(getattr(Session, name)):
            assert f"`{name}(" in PAGE, name
