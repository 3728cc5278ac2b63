"""`pydiffusion chat` on a terminal: pasted text, Ctrl-C, bytes that are not UTF-8, saved conversations."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from support.terminal import needs_terminal, on_terminal

from pydiffusion.cli import main

pytestmark = needs_terminal
ANSWERED = "tokens/s"


@pytest.fixture(scope="module")
def model(gguf_file: Callable[..., Path]) -> str:
    return str(gguf_file("small"))


def chat(model: str, state: Path, typed: list[tuple[str, str]], *more: str) -> tuple[str, int]:
    options = ["-n", "8", "--steps", "1", "--seed", "4", "-t", "1", *more]
    return on_terminal(["chat", "-m", model, *options], typed, {"XDG_STATE_HOME": str(state)})


def conversations(state: Path) -> list[list[str]]:
    """What the user said, per saved conversation."""
    files = sorted((state / "pydiffusion/chats").glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
    messages = [json.loads(file.read_text("utf-8"))["messages"] for file in files]
    return [[m["content"] for m in chat if m["role"] == "user"] for chat in messages]


def test_pasted_lines_are_one_message(model: str, tmp_path: Path) -> None:
    """By a terminal that marks what is pasted (bracketed paste), and by one that only delivers it at once."""
    pytest.importorskip("readline")
    marked = "\x1b[200~def f():\n  return 1\n/exit\n\x1b[201~"
    seen, code = chat(model, tmp_path, [("> ", marked), ("/exit", "\n"), (ANSWERED, ""), ("> ", "/bye\n")])
    assert code == 0, seen
    assert "\x1b[?2004h" in seen, "the terminal is asked to mark it"
    assert conversations(tmp_path) == [["def f():\n  return 1\n/exit"]]
    plain = "one\ntwo\n/three\n"
    _, code = chat(model, tmp_path / "plain", [("> ", plain), (ANSWERED, ""), ("> ", "/bye\n")])
    assert code == 0 and conversations(tmp_path / "plain") == [["one\ntwo\n/three"]]


def test_ctrl_c_at_the_prompt_asks_once(model: str, tmp_path: Path) -> None:
    typed = [("> ", "half a line\x03"), ("Ctrl-C again ends the chat", ""), ("> ", "hi\n"), (ANSWERED, "")]
    seen, code = chat(model, tmp_path, [*typed, ("> ", "\x03")])
    assert code == 130, seen
    assert conversations(tmp_path) == [["hi"]], "the line that was given up is not sent"
    assert seen.count("Ctrl-C again ends") >= 2, "after an answer it asks anew"
    assert "pydiffusion: interrupted" in seen and "Traceback" not in seen


def test_a_byte_that_is_no_utf8_is_refused_once(model: str, tmp_path: Path) -> None:
    typed = [("> ", "ab\udcff\n"), ("UTF-8", ""), ("> ", "hi\n"), (ANSWERED, ""), ("> ", "/bye\n")]
    seen, code = chat(model, tmp_path, typed)
    assert code == 0 and conversations(tmp_path) == [["hi"]], seen


def test_conversations_are_saved_and_gone_on_with(model: str, tmp_path: Path) -> None:
    seen, code = chat(model, tmp_path, [("> ", "hi\n"), (ANSWERED, ""), ("> ", "/clear\n"), ("> ", "yo\n"),
                                        (ANSWERED, ""), ("> ", "\x04")])  # fmt: skip
    assert code == 0 and "chat --continue goes on with it" in seen
    assert conversations(tmp_path) == [["hi"], ["yo"]], "each in a file of its own"
    folder = tmp_path / "pydiffusion/chats"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}, "and nothing else"
    seen, _ = chat(model, tmp_path, [("> ", "more\n"), (ANSWERED, ""), ("> ", "/bye\n")], "--continue")
    assert "going on with" in seen and "1 message: yo" in seen
    assert conversations(tmp_path) == [["hi"], ["yo", "more"]], "in the same file"
    loading = [("> ", "/load\n"), ("/load NUMBER", ""), ("> ", "/load 2\n"), ("loaded from 2", "")]
    seen, _ = chat(model, tmp_path, [*loading, ("> ", "x\n"), (ANSWERED, ""), ("> ", "/bye\n")])
    assert conversations(tmp_path) == [["yo", "more"], ["hi", "x"]], seen


@pytest.mark.slow
def test_what_is_not_saved(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    typed = [("> ", "hi\n"), (ANSWERED, ""), ("> ", "/bye\n")]
    seen, _ = chat(model, tmp_path, typed, "--no-save")
    assert "--continue" not in seen and conversations(tmp_path) == []
    (tmp_path / "file").write_text("")
    seen, code = chat(model, tmp_path / "file", typed)  # no folder can be made
    assert code == 0 and "the conversation is not saved" in seen


def test_nothing_to_go_on_with(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert main(["chat", "-m", model, "--continue"]) == 1
    assert "no saved conversation" in capsys.readouterr().err
