"""Sources of adapters: ``PATH[:SCALE]``, repos of the hub, what no adapter is."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
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
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "empty"),
        ("{a}:0.5", "goes beside it"),
        ("{a},{a}", "by itself"),
        ("/dev/null", "neither a folder nor a file"),
        ("{a}/adapter_config.json", "give its folder"),
    ],
)
def test_what_was_meant(text: str, part: str, tmp_path: Path) -> None:
    folder = folders.write_folder(tmp_path / "a")
    with pytest.raises(AdapterError, match=part):
        load_adapter(text.format(a=folder), MODEL)


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders.write_folder(tmp_path / "a")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert load_adapter("~/a", MODEL).name == "a"


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with serving(tmp_path_factory.mktemp("hub") / "repo") as hub:
        yield hub


@pytest.fixture
def folder(repo: Hub) -> Iterator[Path]:
    """What the hub has in each of its repos; empty."""
    repo.folder.mkdir()
    yield repo.folder
    shutil.rmtree(repo.folder)


# Loads each source of each step of a script; prints a line of JSON: names and fingerprints, or errors.
# huggingface_hub reads its variables when it is imported, so this is a process of its own.
_LOAD = """
import json, sys
from support.adapter_folders import MODEL
from pydiffusion import PyDiffusionError
from pydiffusion.adapters.loading import load_adapter
for line in sys.stdin:
    found = []
    for source in json.loads(line):
        try:
            adapter = load_adapter(source, MODEL)
            found.append([adapter.name, adapter.fingerprint.hex()])
        except PyDiffusionError as error:
            found.append([type(error).__name__, str(error)])
    print(json.dumps(found), flush=True)
"""
Load = Callable[..., list[list[str]]]


@contextlib.contextmanager
def loading(home: Path, hub: Hub, **variables: str) -> Iterator[Load]:
    """A process that loads sources, all of one call together."""
    with subprocess.Popen(
        [sys.executable, "-c", _LOAD],
        env=environment(hub, home, PYTHONPATH=os.pathsep.join(sys.path), **variables),
        cwd=home.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None

        def load(*sources: str) -> list[list[str]]:
            print(json.dumps(sources), file=process.stdin, flush=True)
            found: list[list[str]] = json.loads(process.stdout.readline())
            return found

        try:
            yield load
        finally:
            process.stdin.close()
            assert process.wait(120) == 0


@pytest.fixture(scope="module")
def load(repo: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Load]:
    with loading(tmp_path_factory.getbasetemp() / "home", repo) as load:
        yield load


def test_a_folder_of_the_hub(
    load: Load, repo: Hub, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What the adapter needs is fetched once; a checkpoint beside it is not. The cache serves offline."""
    folders.write_folder(folder)
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"nobody asked")
    (folder / "optimizer.pt").write_bytes(b"nobody asked")
    expected = [["open", load_adapter(folder, MODEL).fingerprint.hex()]]
    assert load("org/open") == load("org/open") == expected
    assert sorted(repo.fetched) == ["adapter_config.json", "adapter_model.safetensors"]
    with loading(tmp_path_factory.getbasetemp() / "home", repo, HF_HUB_OFFLINE="1") as load_offline:
        assert load_offline("org/open") == expected and len(repo.fetched) == 2


def test_a_gguf_of_the_hub_and_repos_without_an_adapter(load: Load, folder: Path, tmp_path: Path) -> None:
    adapter = load_adapter(folders.write_folder(tmp_path / "a"), MODEL)
    write_adapter_gguf(adapter, folder / "tuned.gguf", matrices_of(MODEL))
    wrong = ("org/none", "org/private", "org/open-one:none.gguf", "org/open-one")
    one, *refused = load("org/open-one:tuned.gguf", *wrong)
    assert one == ["a", adapter.fingerprint.hex()]
    for source, (kind, text) in zip(wrong, refused, strict=True):
        assert kind == "AdapterError" and source.partition(":")[0] in text and "\n" not in text
    assert "org/open-one:tuned.gguf" in refused[-1][1]  # not taken unasked: it might be a model of many GB
    (folder / "tuned.gguf").rename(folder / "config.json")
    ((kind, text),) = load("org/open-two")
    assert kind == "AdapterError" and "org/open-two" in text and "adapter" in text
    folders.write_folder(folder / "checkpoint-500")
    ((kind, text),) = load("org/open-three")
    assert kind == "AdapterError" and "checkpoint-500/adapter_config.json" in text
