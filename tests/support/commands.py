"""Run commands in this process, on a scripted model."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest

from pydiffusion.cli import _open, main
from support.server_fakes import ScriptedModel

Command = Callable[..., tuple[int, str, str]]


def commands_on(
    default: ScriptedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """``command(*arguments, typed="", model=default)`` returns the exit code and what was printed."""

    def run(*arguments: str, typed: str = "", model: ScriptedModel = default) -> tuple[int, str, str]:
        monkeypatch.setattr(_open, "open_model", lambda *_, **__: model)
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        capsys.readouterr()
        return main(list(arguments)), *capsys.readouterr()

    return run
