"""Chat templates from a file or by name, and the recognition of outdated ones."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.chat_conversations import NEWEST, PUBLIC
from support.gguf_mutator import STRING, read_gguf
from support.paths import REFERENCE, REPOSITORY
from support.public_templates import MENDED_TEMPLATE, OLD_TEMPLATE, public_template
from support.server_fakes import ScriptedModel, script

from pydiffusion import DiffusionModel, PyDiffusionError, PyDiffusionWarning
from pydiffusion.chat.template import ChatTemplate
from pydiffusion.chat.template_source import MAX_TEMPLATE_BYTES, find_template, is_outdated

HI: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]


def test_a_name_gives_the_built_in_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "diffusion-gemma").mkdir()  # the folder of a checkpoint, say
    source = find_template("diffusion-gemma")
    assert ChatTemplate(source).render(HI) == "<|turn>user\nHi<turn|>\n<|turn>model\n"


def test_a_file_gives_its_text_without_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes("\ufeff{{ messages[0].content }}ü".encode())
    assert find_template(tmp_path / "t") == find_template(str(tmp_path / "t")) == "{{ messages[0].content }}ü"


def make_too_large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(MAX_TEMPLATE_BYTES + 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "nor a built-in template of this name; built-in: diffusion-gemma"),
        (lambda path: path.mkdir(), "can't be read: Is a directory"),
        (lambda path: path.write_bytes(b"{{ a }}\xff"), "not UTF-8 \\(byte 7\\)"),
        (lambda path: path.write_text("{{ messages }}\n{% for %}"), "given: chat template, line 2: "),
        (lambda path: path.write_text("{{ messages | nonesuch }}"), "line 1: No filter named 'nonesuch'"),
        (make_too_large, "larger than"),
        (
            lambda path: path.write_text("{{ messages | a" + 9999 * "b" + " }}"),
            "No filter named 'ab{400,484}$",
        ),
        (lambda path: path.write_text("You are a helpful assistant."), "is not a chat template"),
        (lambda path: path.write_text('{\n "chat_template": "{{ messages }}"}'), "is JSON, not a template"),
    ],
    ids=["missing", "folder", "latin-1", "syntax", "filter", "large", "long name", "prompt", "json"],
)
def test_a_file_that_is_no_template_is_refused(
    make: Callable[[Path], None], message: str, tmp_path: Path, gguf_file: Callable[..., Path]
) -> None:
    make(tmp_path / "given")
    with pytest.raises(PyDiffusionError, match=message) as caught:
        DiffusionModel(gguf_file("tiny"), chat_template=tmp_path / "given")
    assert "\n" not in str(caught.value)


# Names that llama.cpp has for templates of other models, and a template where its name or file is expected.
@pytest.mark.parametrize("given", ["gemma", "chatml", "llama3", "mistral-v7-tekken", "{{ bos_token }}", ""])
def test_names_of_others_are_refused_with_a_list_of_ours(given: str) -> None:
    with pytest.raises(PyDiffusionError, match="diffusion-gemma"):
        find_template(given)


def test_a_model_takes_the_given_template(gguf_file: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ bos_token }}[{{ messages[0].content }}]")
    with DiffusionModel(gguf_file("tiny"), chat_template=tmp_path / "t.jinja") as model:
        assert model.chat_prompt(HI) == model.tokenize("[Hi]", add_bos=True)
        assert (
            model.native.file.metadata["tokenizer.chat_template"] != model.metadata["tokenizer.chat_template"]
        )


def test_an_old_template_is_warned_of_once_when_it_is_first_used() -> None:
    model = ScriptedModel(script)
    model.metadata["tokenizer.chat_template"] = OLD_TEMPLATE
    with pytest.warns(PyDiffusionWarning, match="scripted.gguf: .*2026-07-09.*--chat-template") as told:
        model.chat_prompt(HI)
        model.chat_prompt(HI)
        model.check_chat_template()
    assert len(told) == 1 and told[0].filename == __file__ and "\n" not in str(told[0].message)


@pytest.mark.parametrize(
    "source",
    [
        MENDED_TEMPLATE,
        OLD_TEMPLATE.replace("format_parameters", "mine"),
        "{% set a = b.c.d %}" + OLD_TEMPLATE,
    ],
)
def test_mended_ones_and_those_of_others_are_not_warned_of(source: str) -> None:
    assert is_outdated(OLD_TEMPLATE) and not is_outdated(source)


def test_our_own_are_not_warned_of() -> None:
    demo = REPOSITORY / "pydiffusion/demo/checkpoint/chat_template.jinja"
    for path in (demo, REFERENCE / "chat_template.jinja"):
        assert not is_outdated(path.read_text(encoding="utf-8"))
    model = ScriptedModel(script)
    model.metadata["tokenizer.chat_template"] = find_template("diffusion-gemma")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.chat_prompt(HI)


@pytest.mark.reference
@pytest.mark.parametrize("name", PUBLIC)
def test_google_s_old_templates_are_recognised(name: str) -> None:
    assert is_outdated(public_template(name)) == (name not in NEWEST)


def test_the_warning_is_a_line_of_the_command_line(
    capfd: pytest.CaptureFixture[str], gguf_file: Callable[..., Path], tmp_path: Path
) -> None:
    from pydiffusion.cli import main

    (tmp_path / "t.jinja").write_text(OLD_TEMPLATE)
    arguments = ["-m", os.fspath(gguf_file("tiny")), "-p", "Hi", "-n", "1", "--steps", "1", "--threads", "1"]
    assert main(["generate", *arguments, "--chat-template", os.fspath(tmp_path / "t.jinja")]) == 0
    err = capfd.readouterr().err
    assert err.count("pydiffusion: warning: ") == 1 == err.count("2026-07-09")
    assert main(["generate", *arguments, "--chat-template", "diffusion-gemma"]) == 0
    assert "warning" not in capfd.readouterr().err
    assert main(["generate", *arguments, "--chat-template", "diffusion-gemma", "--raw"]) == 2
    assert "--chat-template needs --chat" in capfd.readouterr().err
    infill = ["infill", *arguments[:2], __file__, "--chat-template", "diffusion-gemma"]
    assert main(infill) == 2 and "needs --instruction" in capfd.readouterr().err
    assert main(["generate", *arguments, "--chat-template", "gemma"]) == 1
    assert capfd.readouterr().err.startswith("pydiffusion: chat template 'gemma': there is no such file")


def test_the_server_warns_of_the_template_at_start(gguf_file: Callable[..., Path], tmp_path: Path) -> None:
    """In its log, on stderr; with a broken one it serves raw completions."""
    file = read_gguf(gguf_file("tiny"))
    file.set("tokenizer.chat_template", STRING, "{% for %}")
    broken = file.write(tmp_path / "broken.gguf")
    (tmp_path / "old.jinja").write_text(OLD_TEMPLATE)
    for options, told in (
        ([], "chats will fail: chat template, line 1"),
        (["--chat-template", str(tmp_path / "old.jinja")], "2026-07-09"),
    ):
        command = [sys.executable, "-m", "pydiffusion", "serve", "-m", str(broken), "--port", "0"]
        with subprocess.Popen(
            [*command, "--threads", "1", *options], stderr=subprocess.PIPE, text=True
        ) as server:
            assert server.stderr is not None
            log = []
            for line in server.stderr:
                log.append(line)
                if "serving on" in line:
                    break
            server.kill()
        warned = [line for line in log if "warning" in line]
        assert "serving on" in log[-1] and len(warned) == 1 and told in warned[0], log
