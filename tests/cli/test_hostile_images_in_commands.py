"""Images that commands refuse: one line each, and a chat goes on."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

import pytest
from support.commands import Command, commands_on
from support.seeing_model import SeeingModel, png

pytestmark = pytest.mark.filterwarnings("default")  # as of the program, with any options of pytest

MODEL = SeeingModel(lambda prompt, i_answer: [f"answer {i_answer}"], n_ctx=2048)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return commands_on(MODEL, monkeypatch, capsys)


@pytest.mark.parametrize("side", [10_500, 30_000])
def test_a_bomb_is_refused_in_one_line(side: int, command: Command, tmp_path: Path) -> None:
    """Without Pillow's own warning beside it."""
    bomb = tmp_path / "bomb.pbm"
    bomb.write_bytes(b"P4\n%d %d\n" % (side, side))
    code, _, err = command("generate", "-m", "a.gguf", "-p", "x", "--image", str(bomb))
    assert code == 1 and len(err.splitlines()) == 1 and "bomb.pbm: " in err and "pixels" in err


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "path": "gone.png"},
        {"type": "image_url", "image_url": {"url": "gone.png"}},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
        {"type": "image_url", "image_url": None},
        {"type": "image"},
    ],
)
def test_a_chat_goes_on_after_a_loaded_one_with_a_broken_image(
    part: dict[str, object], command: Command, tmp_path: Path
) -> None:
    saved = tmp_path / "chat.json"
    messages = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "yes"}]
    saved.write_text(json.dumps({"messages": messages}))
    typed = f"/load {saved}\nWhat?\n/reset\nAnd now?\n"
    code, out, err = command("chat", "-m", "a.gguf", typed=typed)
    assert code == 0 and "answer" in out, err


@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes")
def test_an_image_from_a_pipe(command: Command, tmp_path: Path) -> None:
    """It can be read once only: `--image <(convert ...)`."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(png(),), daemon=True)
    writer.start()
    code, out, err = command("generate", "-m", "a.gguf", "-p", "x", "--image", str(pipe))
    assert code == 0 and "answer" in out, err
    writer.join()


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no such device")
def test_an_endless_file(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pydiffusion.generation.chat_images._MAX_FILE", 1 << 20)
    code, _, err = command("generate", "-m", "a.gguf", "-p", "x", "--image", "/dev/zero")
    assert code == 1 and "/dev/zero: more than 1 MiB" in err and len(err.splitlines()) == 1
