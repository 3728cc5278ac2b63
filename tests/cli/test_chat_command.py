"""`pydiffusion chat`: commands, multi-line messages, and thinking apart from answers, on a scripted model."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.server_fakes import ScriptedModel

from pydiffusion.cli import _open, main

Chat = Callable[..., tuple[str, str]]


def echo(prompt: str, i_answer: int) -> list[str]:
    """Answer with the answer's number, the message and the number of turns."""
    asked = prompt.rpartition("<|turn>user\n")[2].partition("<turn|>")[0]
    if "think" in asked:
        return ["<|channel>thought\nWell, well.\n<channel|>It is so."]
    return [f"{i_answer}:{asked[:20]}|{prompt.count('<|turn>')}"]


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Chat:
    def run(typed: str, *arguments: str) -> tuple[str, str]:
        model = ScriptedModel(echo)
        monkeypatch.setattr(_open, "open_model", lambda *_: model)
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        assert main(["chat", "-m", "scripted.gguf", *arguments]) == 0
        return tuple(capsys.readouterr())  # type: ignore[return-value]

    return run


def test_thinking_is_separate_and_markers_are_hidden(chat: Chat) -> None:
    out, err = chat("think\nhi\n")
    assert out == "It is so.\n1:hi|4\n", "and the next turn goes on without the thought"
    assert "thinking: Well, well." in err
    assert "channel" not in out + err


def test_messages_of_several_lines(chat: Chat) -> None:
    assert chat("a\\\nb\n")[0] == "0:a\nb|2\n"
    assert chat('"""\na\n\nb\n"""\n')[0] == "0:a\n\nb|2\n"
    assert chat("a\\")[0] == "0:a|2\n"


def test_retry_asks_the_same_again(chat: Chat) -> None:
    out, _ = chat("hi\n/retry\nyo\n")
    assert out == "0:hi|2\n1:hi|2\n2:yo|4\n"
    assert "no message to answer" in chat("/retry\n")[1]


def test_an_edited_answer_is_what_the_model_sees(chat: Chat, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    out, err = chat(f"hi\n/edit better\n/save {file}\n/edit\n/reset\n/edit x\n")
    assert json.loads(file.read_text())["messages"] == [
        {"role": "user", "content": "hi"}, {"role": "assistant", "content": "better"},
    ]  # fmt: skip
    assert out == "0:hi|2\n"
    assert "2 messages saved" in err and "give the new answer" in err and "no answer to edit" in err
    out, err = chat(f"/load {file}\nyo\n")
    assert out == "0:yo|4\n" and "2 messages loaded" in err


def test_steps_and_seed(chat: Chat) -> None:
    _, err = chat("/steps 2\nhi\n/steps\nhi\n/seed 7\nhi\n/steps 0\n/seed x\n")
    assert "2.0 steps per canvas" in err and "3.0 steps per canvas" in err and "seed 7" in err
    assert "steps is 0; permitted" in err and "/seed takes a number" in err


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("/frob\n", "/frob is not a command"),
        ("/load\n", "/load FILE"),
        ("/load nowhere.json\n", "No such file"),
        ("/save /nowhere/x.json\n", "No such file"),
        ("/help\n", "/retry"),
    ],
)
def test_invalid_commands_do_not_end_the_chat(chat: Chat, typed: str, message: str) -> None:
    out, err = chat(typed + "hi\n")
    assert message in err and out == "0:hi|2\n"


def test_loading_a_file_that_is_not_a_chat(chat: Chat, tmp_path: Path) -> None:
    for content in ("[]", '{"messages": [3]}', "{", '{"messages": [{"role": "tool", "content": "x"}]}'):
        (tmp_path / "x.json").write_text(content)
        assert "is not a saved chat" in chat(f"/load {tmp_path / 'x.json'}\n")[1]
