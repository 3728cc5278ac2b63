"""Conversion from repo ids, against a local server that speaks the hub's HTTP."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from gguf import GGUFReader
from support import checkpoint_folders as folders
from support.hub_server import TOKEN, Hub, environment, serving

from pydiffusion.convert import convert
from pydiffusion.convert.checkpoint.hub import find_checkpoint, repo_id
from pydiffusion.convert.checkpoint.quantized import settings
from pydiffusion.errors import ConversionError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = folders.make_folder(tmp_path_factory.mktemp("hub") / "open", n_shards=2)
    (made / "original").mkdir()
    (made / "original/consolidated.safetensors").write_bytes(b"nobody asked")
    (made / "README.md").write_text("nobody asked")
    # The only file with the template, as transformers once wrote it.
    template = (made / "chat_template.jinja").read_text("utf-8")
    (made / "chat_template.jinja").unlink()
    folders.write_json(made / "chat_template.json", {"chat_template": template})
    for name in settings.FILES:  # settings of quantized checkpoints; this one has no quantized tensors
        folders.write_json(made / name, {"quant_method": "gptq", "bits": 4, "of": name})
    return made


@pytest.fixture
def hub(folder: Path) -> Iterator[Hub]:
    with serving(folder) as server:
        yield server


def command(hub: Hub, folder: Path, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run ``pydiffusion`` with the local hub, in an empty folder."""
    work = folder / "work"
    work.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-m", "pydiffusion", *map(str, arguments)],
        env=environment(hub, folder / "home", **variables),
        cwd=work,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_repo_is_fetched_converted_and_kept(hub: Hub, folder: Path, tmp_path: Path) -> None:
    done = command(hub, tmp_path, "convert", "org/open", "--type", "q8_0")
    assert done.returncode == 0, done.stderr
    convert(folder, tmp_path / "open.gguf", "q8_0")  # a folder of the same name
    assert (tmp_path / "work/open-q8_0.gguf").read_bytes() == (tmp_path / "open.gguf").read_bytes()
    fields = GGUFReader(tmp_path / "open.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == folders.TEMPLATE
    assert "consolidated.safetensors" not in hub.fetched and "README.md" not in hub.fetched

    hub.fetched.clear()
    again = command(hub, tmp_path, "verify", "open-q8_0.gguf", "--against", "org/open")
    assert again.returncode == 0, again.stderr
    assert hub.fetched == [], "the cache has them"
    offline = command(hub, tmp_path, "convert", "org/open", "-o", "off.gguf", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr


def test_a_dry_run_fetches_no_weights(hub: Hub, tmp_path: Path) -> None:
    done = command(hub, tmp_path, "convert", "org/open@v1", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "token_embd" in done.stdout
    assert "config.json" in hub.fetched
    assert set(settings.FILES) <= set(hub.fetched)
    assert not any(name.endswith(".safetensors") for name in hub.fetched)


def test_a_private_repo_needs_the_token(hub: Hub, tmp_path: Path) -> None:
    refused = command(hub, tmp_path, "convert", "org/private", "--dry-run")
    assert refused.returncode == 1 and "if it is private" in refused.stderr
    done = command(hub, tmp_path, "convert", "org/private", "--dry-run", HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("source", "variables", "message"),
    [
        ("org/none", {"HF_TOKEN": TOKEN}, "org/none: neither a folder here nor a repo that can be seen"),
        ("org/gated", {}, "org/gated: access to this repo is restricted: accept its terms"),
        ("org/open@v9", {}, "org/open@v9: the repo has no such revision"),
        ("org/open", {"HF_HUB_OFFLINE": "1"}, "org/open: is not (wholly) in the cache, and HF_HUB_OFFLINE"),
        ("org/open", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub can't be reached"),
    ],
)
def test_unavailable_repos_are_refused_in_one_line(
    hub: Hub, tmp_path: Path, source: str, variables: dict[str, str], message: str
) -> None:
    done = command(hub, tmp_path, "convert", source, "-o", "m.gguf", **variables)
    assert done.returncode == 1
    assert done.stderr.startswith("pydiffusion: ") and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert list((tmp_path / "work").iterdir()) == []


def test_paths_are_not_repo_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for path in ("models/typo", "./a/b", "/a/b", "../a/b", "a", "a/b/c", "models", ""):
        assert repo_id(path) is None, path
    assert repo_id("org/name") == ("org/name", None)
    for page in ("https://huggingface.co/org/name", "hf.co/org/name", "https:/huggingface.co/org/name/"):
        assert repo_id(page) == ("org/name", None)  # the last is what a Path makes of an address
    assert repo_id(Path("org/name@v1.0")) == ("org/name", "v1.0")
    (tmp_path / "org/name").mkdir(parents=True)
    assert repo_id("org/name") is None
    assert find_checkpoint("models").path == Path("models")
    with pytest.raises(ConversionError, match="a revision belongs to a repo id"):
        find_checkpoint("models", "main")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["model-q4_k_m.gguf"], "org/open: has no config.json; model-q4_k_m.gguf is GGUF"),
        (["adapter_config.json", "adapter_model.safetensors"], "holds an adapter (LoRA)"),
    ],
)
def test_a_repo_of_other_files_is_explained(tmp_path: Path, files: list[str], words: str) -> None:
    (tmp_path / "repo").mkdir()
    for name in files:
        (tmp_path / "repo" / name).write_text("{}")
    with serving(tmp_path / "repo") as server:
        done = command(server, tmp_path, "convert", "org/open", "--type", "q8_0")
    assert done.returncode == 1
    assert words in done.stderr.splitlines()[-1]
    assert not [name for name in server.fetched if name.endswith((".gguf", ".bin"))]
