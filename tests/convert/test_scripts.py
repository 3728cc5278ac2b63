"""Metadata edited in place, and the scripts in `examples`."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from support.paths import REPOSITORY

from pydiffusion.chat.template_source import find_template
from pydiffusion.convert import convert, edit_metadata, verify
from pydiffusion.convert.gguf.header import Value
from pydiffusion.errors import ConversionError

EXAMPLES = REPOSITORY / "examples"


@pytest.fixture
def model(folder: Path, tmp_path: Path) -> Path:
    convert(folder, tmp_path / "m.gguf", "q4_k_m")
    return tmp_path / "m.gguf"


def field(path: Path, key: str) -> object:
    found = GGUFReader(path).get_field(key)
    return None if found is None else found.contents()


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_keys_are_set_added_and_removed_and_nothing_else_changes(model: Path, folder: Path) -> None:
    before = GGUFReader(model)
    old = {name: value.contents() for name, value in before.fields.items() if not name.startswith("GGUF.")}
    weights = [(t.name, t.tensor_type, t.data.tobytes()) for t in before.tensors]
    del before
    edit_metadata(
        model,
        {
            "tokenizer.chat_template": "{{ messages[0].content }}",
            "diffusion.eb_max_steps": 7,
            "diffusion.eb_t_max": 0.75,
            "general.license": "mit",
            "test.list": Value("array[i32]", [1, 2]),
            "general.name": None,
        },
    )
    after = GGUFReader(model)
    new = {name: value.contents() for name, value in after.fields.items() if not name.startswith("GGUF.")}
    assert [(t.name, t.tensor_type, t.data.tobytes()) for t in after.tensors] == weights
    changed = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
    assert changed == {
        *("tokenizer.chat_template", "diffusion.eb_max_steps", "diffusion.eb_t_max"),
        *("general.license", "test.list", "general.name"),
    }
    assert new["tokenizer.chat_template"] == "{{ messages[0].content }}"
    assert (new["diffusion.eb_max_steps"], new["general.license"], new["test.list"]) == (7, "mit", [1, 2])
    assert new["diffusion.eb_t_max"] == np.float32(0.75) and "general.name" not in new
    assert after.get_field("diffusion.eb_max_steps").types[0].name == "UINT32"
    report = verify(model, folder)
    assert len(report.tensors) == len(weights)
    assert not any("does not agree" in problem for problem in report.problems)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "llama"}, "defines how the file is read"),
        ({"split.count": 2}, "defines how the file is read"),
        ({"no.such": None}, "no key 'no.such' to remove"),
        ({"no.such": 3}, "no known type"),
        ({"diffusion.eb_max_steps": -1}, "eb_max_steps"),
        ({"diffusion.eb_max_steps": "many"}, "eb_max_steps"),
        ({"diffusion.eb_max_steps": 0}, "eb_max_steps|steps is 0"),
        ({"diffusion.eb_t_min": 0.95}, "t_min"),
        ({"general.name": 3}, "should be a text"),
        ({"tokenizer.chat_template": "{% for %}"}, "chat template, line 1"),
    ],
)
def test_edits_that_would_break_the_file_are_refused(model: Path, changes: dict, message: str) -> None:
    before = model.read_bytes()
    with pytest.raises(ConversionError, match=message):
        edit_metadata(model, changes)
    assert model.read_bytes() == before
    assert list(model.parent.iterdir()) == [model]


def test_an_interruption_leaves_the_old_file(model: Path) -> None:
    before = model.read_bytes()

    def stop(state: object) -> None:
        if state.stage == "verify":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        edit_metadata(model, {"general.name": "x"}, progress=stop)
    assert model.read_bytes() == before and list(model.parent.iterdir()) == [model]


def test_another_target_leaves_the_file(model: Path, tmp_path: Path) -> None:
    before = model.read_bytes()
    edit_metadata(model, {"general.name": "x"}, tmp_path / "n.gguf")
    assert model.read_bytes() == before and field(tmp_path / "n.gguf", "general.name") == "x"
    with pytest.raises(ConversionError, match="one of the files being read"):
        edit_metadata(model, {"general.name": "x"}, model)


def test_the_script_edits(model: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ messages }}ü", encoding="utf-8")
    done = run(
        *("edit_metadata.py", model, "--chat-template", tmp_path / "t.jinja"),
        *("--set", "diffusion.eb_max_steps=9", "--set", "general.name=new name"),
    )
    assert done.returncode == 0, done.stderr
    assert field(model, "tokenizer.chat_template") == "{{ messages }}ü"
    assert field(model, "diffusion.eb_max_steps") == 9 and field(model, "general.name") == "new name"
    shown = run("edit_metadata.py", model)
    assert "general.name (str): 'new name'" in shown.stdout
    refused = run("edit_metadata.py", model, "--remove", "nothing")
    assert refused.returncode == 1 and "no key 'nothing'" in refused.stderr


def test_the_script_puts_a_built_in_template_into_a_file(model: Path) -> None:
    done = run("edit_metadata.py", model, "--chat-template", "diffusion-gemma")
    assert done.returncode == 0, done.stderr
    assert field(model, "tokenizer.chat_template") == find_template("diffusion-gemma")
    for wrong in ("gemma", model):  # no such name; not UTF-8
        refused = run("edit_metadata.py", model, "--chat-template", wrong)
        assert refused.returncode == 1 and str(wrong) in refused.stderr and refused.stderr.count("\n") == 1


def test_the_script_makes_a_family(folder: Path, tmp_path: Path) -> None:
    done = run("make_family.py", folder, "--folder", tmp_path / "out", "--types", "q8_0", "q4_k_m")
    assert done.returncode == 0, done.stderr
    found = re.findall(r"\| (\S+\.gguf) \| [\d.]+ \| (\d+) \| `(\w+)` \|", done.stdout)
    assert [name for name, _, _ in found] == ["small-q8_0.gguf", "small-q4_k_m.gguf"]
    for name, size, checksum in found:
        data = (tmp_path / "out" / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (int(size), checksum)
    assert done.stdout in (tmp_path / "out/README.md").read_text(encoding="utf-8")
