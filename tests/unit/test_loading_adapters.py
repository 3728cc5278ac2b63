"""Sources of adapters: ``PATH[:SCALE]``, repos of the hub, what no adapter is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import adapter_folders as folders
from support.adapter_folders import MODEL
from support.hub_server import Hub, environment, serving

from pydiffusion import AdapterError, OptionError
from pydiffusion.adapters.gguf_file import write_adapter_gguf
from pydiffusion.adapters.loading import load_adapter, matrices_of, parse_lora


@pytest.mark.parametrize(
    ("text", "source", "scale"),
    [
        ("adapter", "adapter", 1.0),
        ("adapter:0.5", "adapter", 0.5),
        ("adapter:-1e-3", "adapter", -0.001),
        ("adapter:.25", "adapter", 0.25),
        ("adapter:2.", "adapter", 2.0),
        ("adapter:+0", "adapter", 0.0),
        ("a:b:0.5", "a:b", 0.5),
        (r"C:\adapters\one", r"C:\adapters\one", 1.0),
        (r"C:\adapters\one:0.5", r"C:\adapters\one", 0.5),
        ("C:/adapters/one", "C:/adapters/one", 1.0),
        ("owner/name", "owner/name", 1.0),
        ("owner/name:0.5", "owner/name", 0.5),
        ("owner/name:file.gguf", "owner/name:file.gguf", 1.0),
        ("owner/name@main:file.gguf:0.5", "owner/name@main:file.gguf", 0.5),
        ("https://huggingface.co/owner/name", "https://huggingface.co/owner/name", 1.0),
        ("adapter:", "adapter:", 1.0),
        ("adapter:1_0", "adapter:1_0", 1.0),
        ("adapter: 1", "adapter: 1", 1.0),
        ("adapter:0x1", "adapter:0x1", 1.0),
        ("adapter:\u0661", "adapter:\u0661", 1.0),  # a digit of another script
    ],
)
def test_a_path_and_its_scale(text: str, source: str, scale: float) -> None:
    assert parse_lora(text) == (source, scale)


def test_a_path_that_exists_keeps_its_colon(tmp_path: Path) -> None:
    (tmp_path / "a:0.5").mkdir()
    assert parse_lora(f"{tmp_path}/a:0.5") == (f"{tmp_path}/a:0.5", 1.0)
    assert parse_lora(f"{tmp_path}/a:0.5:2") == (f"{tmp_path}/a:0.5", 2.0)


@pytest.mark.parametrize("text", ["", "  ", ":0.5", "a:nan", "a:inf", "a:-Infinity", "a:1e999", "a:1e31"])
def test_scales_refused(text: str) -> None:
    with pytest.raises(OptionError) as error:
        parse_lora(text)
    assert error.value.param == "lora" and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["a\0b", "x" * 5000, "~nobody/none", "none/at/all", "", "no such/thing"])
def test_paths_of_nothing(text: str) -> None:
    with pytest.raises(AdapterError) as error:
        load_adapter(text, MODEL)
    assert "\n" not in str(error.value) and len(str(error.value)) < 6000


@pytest.fixture
def repo(tmp_path: Path) -> Iterator[Hub]:
    with serving(tmp_path / "repo") as hub:
        yield hub


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Hub], None]:
    """Point huggingface_hub at a hub; it reads its variables when it is imported."""

    def use(hub: Hub) -> None:
        from huggingface_hub import constants

        for key, value in environment(hub, tmp_path / "home").items():
            monkeypatch.setitem(os.environ, key, value)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home/hub"))

    return use


def test_a_folder_of_the_hub(tmp_path: Path, repo: Hub, online: Callable[[Hub], None]) -> None:
    """What the adapter needs is fetched once; a checkpoint beside it is not."""
    folder = folders.write_folder(tmp_path / "repo")
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"nobody asked")
    (folder / "optimizer.pt").write_bytes(b"nobody asked")
    online(repo)
    adapter = load_adapter("org/open", MODEL)
    assert adapter.fingerprint == load_adapter(folder, MODEL).fingerprint
    assert adapter.name == "open"
    fetched = [path for path in repo.fetched if "/resolve/" in path]
    assert sorted({Path(path).name for path in fetched}) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_gguf_of_the_hub(tmp_path: Path, repo: Hub, online: Callable[[Hub], None]) -> None:
    adapter = load_adapter(folders.write_folder(tmp_path / "a"), MODEL)
    (tmp_path / "repo").mkdir()
    write_adapter_gguf(adapter, tmp_path / "repo/tuned.gguf", matrices_of(MODEL))
    online(repo)
    for source in ("org/open", "org/open:tuned.gguf"):
        assert load_adapter(source, MODEL).fingerprint == adapter.fingerprint


def test_repos_without_an_adapter(tmp_path: Path, repo: Hub, online: Callable[[Hub], None]) -> None:
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo/config.json").write_text("{}")
    online(repo)
    for source in ("org/open", "org/none", "org/private", "org/open:none.gguf"):
        with pytest.raises(AdapterError) as error:
            load_adapter(source, MODEL)
        assert source.partition(":")[0] in str(error.value) and "\n" not in str(error.value)
