"""Where a model's vision tower is looked for: beside it, and in its repo on the hub."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.fake_vision import FakeSource, write_mmproj
from support.hub_server import environment, serving
from support.paths import REPOSITORY

from pydiffusion.errors import UnsupportedModelError
from pydiffusion.vision.methods import ModelVision


def vision_of(folder: Path, native: FakeSource, mmproj: object = "auto") -> ModelVision:
    model = SimpleNamespace(path=folder / "m.gguf", hparams={"n_embd": 8})
    return ModelVision(model, native, mmproj)


def test_one_file_beside_the_model(tmp_path: Path) -> None:
    path = write_mmproj(tmp_path / "m-MMPROJ-f16.gguf")
    write_mmproj(tmp_path / "mmproj-other.gguf", n_embd=16)
    write_mmproj(tmp_path / "mmproj-no-tower.gguf", architecture="llama")
    (tmp_path / "mmproj.txt").write_text("no model")
    native = FakeSource()
    vision = vision_of(tmp_path, native)
    assert vision.tower is not None and vision.tower.path == path
    assert native.opened == [], "loaded on first use"
    assert vision.require() is vision.tower and native.opened == [path]
    assert vision_of(tmp_path, native, None).tower is None


def test_a_given_file_is_loaded_at_once(tmp_path: Path) -> None:
    path = write_mmproj(tmp_path / "tower.gguf")
    for given in (path, str(path)):
        native = FakeSource()
        assert vision_of(tmp_path, native, given).tower.path == path
        assert native.opened == [path]
    with pytest.raises(FileNotFoundError):
        vision_of(tmp_path, FakeSource(), tmp_path / "missing.gguf")
    with pytest.raises(UnsupportedModelError, match="no image tokens"):
        vision_of(tmp_path, FakeSource(image_tokens={}), path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"m\.gguf reads images with a vision file \(mmproj\) only; there is none in .*--mmproj FILE"),
        (
            {"mmproj-a.gguf": 8, "mmproj-b.gguf": 8},
            r"several in .*: mmproj-a\.gguf, mmproj-b\.gguf: give one",
        ),
        ({"mmproj-a.gguf": 16}, r"don't fit: mmproj-a\.gguf is another model's \(16 elements, not 8\)"),
    ],
)
def test_none_or_several(tmp_path: Path, files: dict[str, int], message: str) -> None:
    for name, n_embd in files.items():
        write_mmproj(tmp_path / name, n_embd)
    vision = vision_of(tmp_path, FakeSource())
    assert vision.tower is None
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        vision.require()
    assert "\n" not in str(caught.value)


def test_models_without_image_tokens(tmp_path: Path) -> None:
    write_mmproj(tmp_path / "mmproj.gguf")
    vision = vision_of(tmp_path, FakeSource(image_tokens={}))
    assert vision.tower is None
    with pytest.raises(UnsupportedModelError, match="no image tokens"):
        vision.require()
    with pytest.raises(UnsupportedModelError, match="mmproj=None"):
        vision_of(tmp_path, FakeSource(), None).require()


CODE = """
import sys
from pathlib import Path
from types import SimpleNamespace
from pydiffusion import PyDiffusionError
from pydiffusion._util import hub
from pydiffusion.vision.methods import ModelVision
from support.fake_vision import FakeSource, write_mmproj

def open_model():
    return ModelVision(SimpleNamespace(path=path, hparams={"n_embd": 8}), FakeSource(), "auto")

def need(vision):
    try:
        return vision.require().path.relative_to(hub.cached_repo(path).folder)
    except PyDiffusionError as error:
        return error

path = hub.fetch("org/open", "m.gguf")
vision = open_model()
print("before", vision.tower)
print(need(vision))
for name in sys.argv[1:]:
    write_mmproj(Path(name))
print(need(vision))
print("after", open_model().tower and "found", need(open_model()))
"""


def in_cache(folder: Path, home: Path, *added: Path) -> tuple[list[str], list[str]]:
    """What the code prints, and what it fetched. added: files that come to the repo in between."""
    tests = str(REPOSITORY / "tests")
    paths = os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", CODE, *map(str, added)]
    with serving(folder) as hub:
        variables = environment(hub, home, PYTHONPATH=paths)
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), hub.fetched


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    pytest.importorskip("huggingface_hub", reason="NOT CHECKED: vision towers on the hub")
    (tmp_path / "repo").mkdir()
    write_mmproj(tmp_path / "repo/m.gguf", architecture="toy")
    return tmp_path / "repo"


def test_the_hubs_file_is_fetched_when_it_is_needed(repo: Path, tmp_path: Path) -> None:
    (repo / "vision").mkdir()
    write_mmproj(repo / "vision/mmproj-F32.gguf")
    write_mmproj(repo / "vision/mmproj-BF16.gguf")
    lines, fetched = in_cache(repo, tmp_path / "home")
    path = "vision/mmproj-BF16.gguf"
    assert lines == ["before None", path, path, f"after found {path}"]
    assert fetched == ["m.gguf", "mmproj-BF16.gguf"]


def test_a_repo_without_one_and_one_with_several(repo: Path, tmp_path: Path) -> None:
    names = ["mmproj-a-Q8_0.gguf", "mmproj-b-Q8_0.gguf"]
    lines, fetched = in_cache(repo, tmp_path / "home", *(repo / name for name in names))
    assert "reads images with a vision file (mmproj) only" in lines[1]
    assert lines[2] == lines[1], "the hub is asked once"
    assert lines[3].startswith("after None org/open has several vision towers")
    assert ", ".join(names) in lines[3] and fetched == ["m.gguf"]
