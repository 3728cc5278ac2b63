"""`DiffusionModel.from_pretrained`, against a local server that speaks the hub's HTTP."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.hub_server import TOKEN, Hub, environment, serving

pytest.importorskip("huggingface_hub", reason="NOT CHECKED: from_pretrained (huggingface_hub is missing)")

CODE = (
    "import sys; from pydiffusion import DiffusionModel, PyDiffusionError\n"
    "try: model = DiffusionModel.from_pretrained(*sys.argv[1:], n_threads=1, n_ctx=128)\n"
    "except PyDiffusionError as error: sys.exit(str(error))\n"
    "print(model.path.name, model.generate('a', seed=1, steps=1, max_tokens=2).steps)"
)


@pytest.fixture
def hub(tmp_path: Path, gguf_file: Callable[..., Path]) -> Iterator[Hub]:
    from pydiffusion.cli import main

    folder = tmp_path / "repo"
    (folder / "parts").mkdir(parents=True)
    shutil.copy(gguf_file("small"), folder / "small-f32.gguf")
    shutil.copy(gguf_file("small", "q8_0"), folder / "small-q8_0.gguf")
    whole, parts = str(gguf_file("small", "q8_0")), str(folder / "parts/two.gguf")
    assert main(["split", whole, parts, "--split-max-size", "1M"]) == 0
    with serving(folder) as server:
        yield server


def load(hub: Hub, home: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CODE, *arguments], env=environment(hub, home, **more), cwd=home.parent,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_a_file_is_fetched_once_and_opened(hub: Hub, tmp_path: Path) -> None:
    done = load(hub, tmp_path / "home", "org/open", "small-f32.gguf")
    assert done.stdout == "small-f32.gguf 1\n", done.stderr
    assert hub.fetched == ["small-f32.gguf"]
    again = load(hub, tmp_path / "home", "org/open", "small-f32.gguf", HF_HUB_OFFLINE="1")
    assert again.returncode == 0 and hub.fetched == ["small-f32.gguf"], "the cache has it"


def test_a_pattern_and_all_parts_of_a_split_model(hub: Hub, tmp_path: Path) -> None:
    assert load(hub, tmp_path / "home", "org/open", "small-q8*").stdout == "small-q8_0.gguf 1\n"
    done = load(hub, tmp_path / "home", "org/open", "parts/*")
    n_parts = len(list((hub.folder / "parts").iterdir()))
    assert n_parts > 1 and len([name for name in hub.fetched if name.startswith("two-")]) == n_parts
    assert done.stdout == f"two-00001-of-{n_parts:05}.gguf 1\n", done.stderr


@pytest.mark.parametrize(
    ("repo", "name", "variables", "message"),
    [
        ("org/open", "none.gguf", {}, "org/open/none.gguf: the repo has no such file"),
        ("org/open", "small*", {}, "several files match 'small*'; it has small-f32.gguf, small-q8_0.gguf"),
        ("org/open", "large*", {}, "no file matches 'large*'; it has parts/two-00001"),
        ("org/none", "x.gguf", {"HF_TOKEN": TOKEN}, "no such repo, or it is private"),
        ("org/gated", "small-f32.gguf", {}, "access to this repo is restricted"),
        ("org/open", "small-f32.gguf", {"HF_HUB_OFFLINE": "1"}, "not in the cache"),
        ("org/open", "small-f32.gguf", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "can't be reached"),
    ],
)
def test_unavailable_files_are_explained(
    hub: Hub, tmp_path: Path, repo: str, name: str, variables: dict[str, str], message: str
) -> None:
    done = load(hub, tmp_path / "home", repo, name, **variables)
    assert done.returncode == 1 and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
