"""Images on the command line: `generate --image`, `run --image`, `/image` of a chat, lines of a batch."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from support.commands import Command, commands_on
from support.seeing_model import SeeingModel, grey_part, image_part, png
from support.server_fakes import ScriptedModel, ask

from pydiffusion import ModelFormatError, UnsupportedModelError
from pydiffusion.cli import serve


def answer(prompt: str, i_answer: int) -> list[str]:
    """The text of each turn, images as <n>: how many soft tokens there are."""
    turns = [turn.partition("\n")[2] for turn in prompt.split("<|turn>")[1:-1]]
    shown = [
        turn.replace("<|image>", "{").replace("<image|>", "}").replace("<|image|>", "") for turn in turns
    ]
    return [" / ".join(text.removesuffix("<turn|>\n") for text in shown)[-60:]]


MODEL = SeeingModel(answer, n_ctx=2048)
TEXT_MODEL = ScriptedModel(answer)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return commands_on(MODEL, monkeypatch, capsys)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a picture.png"
    path.write_bytes(png(70))
    return path


@pytest.mark.parametrize("verb", ["generate", "run", "llama-mtmd-cli"])
def test_a_prompt_with_images(command: Command, file: Path, verb: str) -> None:
    code, out, err = command(verb, "-m", "a.gguf", "-p", "What?", "--image", str(file), "--image", str(file))
    assert (code, out) == (0, "{}{}What?\n"), err


def test_an_image_needs_a_chat_and_a_model_that_reads_it(command: Command, file: Path) -> None:
    code, _, err = command("generate", "-m", "a.gguf", "--raw", "-p", "x", "--image", str(file))
    assert code == 2 and "--image needs --chat" in err
    code, _, err = command("generate", "-m", "a.gguf", "-p", "x", "--image", str(file), model=TEXT_MODEL)
    assert code == 1 and "without a vision file" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["generate", "-p", "x"], ["chat"]])
def test_a_file_that_is_no_image(command: Command, file: Path, arguments: list[str]) -> None:
    broken, none = file.with_name("broken.png"), file.with_name("none.png")
    broken.write_bytes(png()[:60])
    code, _, err = command(*arguments, "-m", "a.gguf", "--image", str(broken))
    assert code == 1 and "broken.png: damaged or truncated image" in err and len(err.splitlines()) == 1
    code, _, err = command(*arguments, "-m", "a.gguf", "--image", "https://example.com/a/b.png")
    assert code == 1 and "https://example.com/a/b.png is not fetched: download" in err
    code, _, err = command(*arguments, "-m", "a.gguf", "--image", str(none))
    assert code == 1 and "none.png: No such file" in err and len(err.splitlines()) == 1


def test_an_image_of_a_chat_s_next_message(command: Command, file: Path) -> None:
    escaped = str(file).replace(" ", "\\ ")
    typed = f'/image {file}\nWhat?\nSure?\n/image "{file}"\n/image {escaped}\nAnd?\n'
    _, out, err = command("chat", "-m", "a.gguf", typed=typed)
    assert out.splitlines()[0] == "{}What?"
    assert out.splitlines()[1] == "{}What? / {}What? / Sure?", "the image stays in the conversation"
    assert out.splitlines()[2].endswith("/ {}{}And?")
    assert "the next message is about this image" in err and "the next message is about 2 images" in err


def test_a_chat_begun_with_an_image(command: Command, file: Path) -> None:
    _, out, _ = command("chat", "-m", "a.gguf", "--image", str(file), typed="What?\n")
    assert out == "{}What?\n"


def test_images_attached_are_kept_until_there_is_an_answer(command: Command, file: Path) -> None:
    _, out, err = command("chat", "-m", "a.gguf", typed=f"/image {file}\n/image\n/image\nhi\n")
    assert out == "hi\n" and "1 attached image forgotten" in err and "give a file: /image FILE" in err
    silent = SeeingModel(lambda prompt, i: [""] if i == 0 else answer(prompt, i), n_ctx=2048)
    _, out, _ = command("chat", "-m", "a.gguf", typed=f"/image {file}\nhi\nho\n", model=silent)
    assert out.strip() == "{}ho"


@pytest.mark.parametrize(
    ("typed", "what"),
    [("/image none.png", "none.png: No such file"), ("/image {broken}", "broken.png: damaged or truncated")],
)
def test_a_chat_goes_on_after_a_file_that_is_no_image(
    command: Command, file: Path, typed: str, what: str
) -> None:
    broken = file.with_name("broken.png")
    broken.write_bytes(png()[:60])
    _, out, err = command("chat", "-m", "a.gguf", typed=typed.format(broken=broken) + "\nhi\n")
    assert out == "hi\n" and what in err


def test_a_chat_with_a_model_without_vision(command: Command, file: Path) -> None:
    model = ScriptedModel(lambda *_: ["ok"])
    code, out, err = command("chat", "-m", "a.gguf", typed=f"/image {file}\nhi\n", model=model)
    assert (code, out) == (0, "ok\n") and "without a vision file" in err
    code, _, err = command("chat", "-m", "a.gguf", "--image", str(file), model=model)
    assert code == 1 and "without a vision file" in err


def test_a_saved_chat_has_its_images(command: Command, file: Path, tmp_path: Path) -> None:
    saved = tmp_path / "chat.json"
    command("chat", "-m", "a.gguf", typed=f"/image {file}\nWhat?\n/save {saved}\n")
    messages = json.loads(saved.read_text())["messages"]
    image, text = messages[0]["content"]
    kind, _, data = image["image_url"]["url"].partition(",")
    assert (kind, base64.b64decode(data)) == ("data:image/png;base64", png(70))
    assert text == {"type": "text", "text": "What?"}
    file.unlink()
    _, out, _ = command("chat", "-m", "a.gguf", typed=f"/load {saved}\nSure?\n")
    assert out == "{}What? / {}What? / Sure?\n"
    for content in ([{"type": "text"}], [5], [{"type": "audio"}], {"type": "image"}, 5):
        saved.write_text(json.dumps({"messages": [{"role": "user", "content": content}]}))
        assert "is not a saved chat" in command("chat", "-m", "a.gguf", typed=f"/load {saved}\n")[2]


def test_lines_of_a_batch(command: Command, file: Path, tmp_path: Path) -> None:
    """In both forms; whoever runs a batch may name files in it."""
    here = [{"type": "image", "path": str(file)}, {"type": "text", "text": "here"}]
    sent = [{"type": "text", "text": "sent"}, grey_part(3)]
    remote = [{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]
    body = {"model": "x", "messages": ask(sent)}
    lines: list[dict[str, Any]] = [
        {"messages": ask(here)},
        {"custom_id": "b", "method": "POST", "url": "/v1/chat/completions", "body": body},
        {"messages": ask(remote)},
        {"messages": ask([{"type": "image", "path": str(tmp_path / "none.png")}])},
        {"messages": ask([image_part(b"x")])},
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, _, _ = command("batch", "-m", "a.gguf", "-o", str(target), str(source))
    assert code == 1
    read = [json.loads(line) for line in target.read_text().splitlines()]
    answers = {entry.get("line", 2): entry for entry in read}
    assert answers[1]["text"] == "{}here"
    whole = answers[2]["response"]["body"]
    assert whole["choices"][0]["message"]["content"] == "sent{}"
    assert whole["usage"]["prompt_tokens_details"]["image_tokens"] > 100
    assert "not fetched from URLs" in answers[3]["error"]
    assert "none.png" in answers[4]["error"]
    assert "not an image in a known format" in answers[5]["error"]


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (None, ""),
        (UnsupportedModelError("there is none"), ""),
        (ModelFormatError("mmproj.gguf is damaged"), "warning: images will fail: mmproj.gguf is damaged"),
    ],
)
def test_a_server_s_vision_file_is_loaded_at_its_start(
    error: Exception | None, what: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that can't be read keeps nobody from texts."""
    model = TEXT_MODEL if isinstance(error, UnsupportedModelError) else MODEL
    asked = []

    def require() -> None:
        asked.append(model)
        if error is not None:
            raise error

    monkeypatch.setattr(model, "require_vision", require)
    serve.find_vision(model)
    assert asked == [model]
    assert capsys.readouterr().err == (f"pydiffusion: {what}\n" if what else "")
