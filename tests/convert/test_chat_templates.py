"""The chat template of a checkpoint folder: which file it is from, what is refused, what is left out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from support import checkpoint_folders as folders
from support.public_templates import OLD_TEMPLATE

from pydiffusion.chat.template_source import find_template
from pydiffusion.cli import main
from pydiffusion.convert import convert, quantize
from pydiffusion.errors import ConversionError

JINJA, CONFIG, LEGACY = "chat_template.jinja", "tokenizer_config.json", "chat_template.json"
BROKEN = "{{ bos_token }}\n{% for m in messages %}"

Make = Callable[..., Path]


@pytest.fixture
def make(folder: Path, tmp_path: Path) -> Make:
    """Make a folder with these templates by file, and in none of the others."""

    def made(templates: dict[str, Any]) -> Path:
        copy = tmp_path / "checkpoint"
        copy.mkdir()
        for path in folder.iterdir():
            if path.name not in (JINJA, CONFIG):
                (copy / path.name).symlink_to(path)
        settings = json.loads((folder / CONFIG).read_text("utf-8"))
        settings.pop("chat_template", None)
        for name, template in templates.items():
            (copy / name).parent.mkdir(exist_ok=True)
            if name.endswith(".jinja"):
                (copy / name).write_text(template, encoding="utf-8")
            elif name == CONFIG:
                settings["chat_template"] = template
            else:
                folders.write_json(copy / name, {"chat_template": template})
        folders.write_json(copy / CONFIG, settings)
        return copy

    return made


def written(path: Path) -> str | None:
    field = GGUFReader(path).get_field("tokenizer.chat_template")
    return None if field is None else field.contents()


def reference(folder: Path) -> str | None:
    """The template that transformers' tokenizer has from this folder."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return None if tokenizer.chat_template is None else tokenizer.get_chat_template()


NAMED = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
LEFT_OUT = "left out, only the template named default is kept: tool_use"
FOLDERS: list[tuple[dict[str, Any], str | None, str | None]] = [
    ({JINJA: "A", CONFIG: "B"}, "A", None),
    ({CONFIG: "B"}, "B", None),
    ({CONFIG: NAMED}, "D", f"{CONFIG}: {LEFT_OUT}"),
    ({CONFIG: {"default": "D", "tool_use": "T"}}, "D", f"{CONFIG}: {LEFT_OUT}"),
    ({JINJA: "A", "additional_chat_templates/tool_use.jinja": "T"}, "A", "left out, one.*: tool_use.jinja"),
    ({JINJA: "A", LEGACY: "A"}, "A", None),
    ({JINJA: "A", LEGACY: "C"}, "A", f"{LEGACY}: left out.*{JINJA}"),
    ({CONFIG: "B", LEGACY: "C"}, "B", f"{LEGACY}: left out.*{CONFIG}"),
    ({}, None, "no chat template"),
]
# Transformers reads this file for image models only, and llama.cpp's converter too.
LEGACY_ALONE: list[tuple[dict[str, Any], str | None, str | None]] = [
    ({LEGACY: "C"}, "C", None),
    ({LEGACY: NAMED}, "D", f"{LEGACY}: {LEFT_OUT}"),
    ({LEGACY: None}, None, "no chat template"),
]


@pytest.mark.parametrize(("templates", "expected", "note"), [*FOLDERS, *LEGACY_ALONE])
def test_which_template_is_written(
    templates: dict[str, Any], expected: str | None, note: str | None, make: Make, tmp_path: Path
) -> None:

    report = convert(make(templates), tmp_path / "m.gguf", "q8_0")
    assert written(tmp_path / "m.gguf") == expected
    notes = [line for line in report.notes if "template" in line]
    assert len(notes) == (note is not None)
    assert note is None or re.search(note, notes[0])


@pytest.mark.reference
@pytest.mark.parametrize(("templates", "expected", "note"), FOLDERS)
def test_it_is_the_one_that_transformers_takes(
    templates: dict[str, Any], expected: str | None, note: str | None, make: Make
) -> None:
    assert reference(make(templates)) == expected


@pytest.mark.parametrize("name", [JINJA, CONFIG, LEGACY])
def test_one_that_does_not_compile_is_refused_by_file_and_line(name: str, make: Make, tmp_path: Path) -> None:
    source = make({name: BROKEN})
    with pytest.raises(ConversionError, match=rf"checkpoint/{name}: chat template, line 2: ") as caught:
        convert(source, tmp_path / "m.gguf", "q8_0")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [source], "nothing is written"


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ({LEGACY: 5}, f"{LEGACY}: 'chat_template' should be a string, is 5"),
        ({CONFIG: [{"name": "default", "template": 5}]}, f"{CONFIG}: .*is 5"),
    ],
)
def test_one_that_is_no_text_is_refused(
    templates: dict[str, Any], message: str, make: Make, tmp_path: Path
) -> None:
    with pytest.raises(ConversionError, match=message):
        convert(make(templates), tmp_path / "m.gguf", "q8_0")


def test_a_legacy_file_that_is_no_json_is_refused(make: Make, tmp_path: Path) -> None:
    source = make({})
    (source / LEGACY).write_text('{"chat_template": ')
    with pytest.raises(ConversionError, match=f"{LEGACY}: not valid JSON"):
        convert(source, tmp_path / "m.gguf", "q8_0")


@pytest.mark.parametrize("own", [{}, {JINJA: BROKEN}, {JINJA: OLD_TEMPLATE}, {CONFIG: "B"}])
def test_a_given_one_takes_the_place_of_the_folder_s(own: dict[str, Any], make: Make, tmp_path: Path) -> None:
    report = convert(make(own), tmp_path / "m.gguf", "q8_0", chat_template="diffusion-gemma")
    assert written(tmp_path / "m.gguf") == find_template("diffusion-gemma")
    assert not [line for line in report.notes if "template" in line]


def test_an_old_one_is_noted_each_time_that_it_is_written(make: Make, tmp_path: Path) -> None:
    report = convert(make({JINJA: OLD_TEMPLATE}), tmp_path / "m.gguf", "f32")
    again = quantize(tmp_path / "m.gguf", tmp_path / "q.gguf", "q8_0")
    for notes in (report.notes, again.notes):
        (note,) = (line for line in notes if "template" in line)
        assert "2026-07-09" in note and "--chat-template diffusion-gemma" in note and "\n" not in note


def test_a_given_one_on_the_command_line(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make({JINJA: "A"})
    (tmp_path / "t.jinja").write_text("{{ messages }}é", encoding="utf-8")
    arguments = ["convert", str(source), "-o", str(tmp_path / "m.gguf"), "--type", "q8_0", "--chat-template"]
    assert main([*arguments, str(tmp_path / "t.jinja")]) == 0
    assert written(tmp_path / "m.gguf") == "{{ messages }}é"
    (tmp_path / "m.gguf").unlink()
    (tmp_path / "t.jinja").write_text(BROKEN)
    for wrong in (str(tmp_path / "t.jinja"), "chatml", str(tmp_path)):
        capsys.readouterr()
        assert main([*arguments, wrong]) == 1
        err = capsys.readouterr().err
        assert wrong in err and err.startswith("pydiffusion: ") and err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "t.jinja"]
