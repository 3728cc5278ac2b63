"""Models by their name on the hub, against a local server that speaks its HTTP."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.hub_server import TOKEN, Hub, environment, serving

from pydiffusion._util.hub import ModelReference, model_reference
from pydiffusion.cli import main

hub_library = pytest.importorskip("huggingface_hub", reason="NOT CHECKED: models on the hub")
Run = Callable[..., list[tuple[int, str, str]]]


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory, gguf_file: Callable[..., Path]) -> Path:
    """A repo with two models, one of them split, and what is no model."""
    folder = tmp_path_factory.mktemp("repo") / "open"
    (folder / "BF16").mkdir(parents=True)
    shutil.copy(gguf_file("tiny", "q8_0"), folder / "tiny-Q8_0.gguf")
    whole, parts = str(gguf_file("tiny", "q4_0")), str(folder / "BF16/tiny-BF16.gguf")
    assert main(["split", whole, parts, "--split-max-size", "10K"]) == 0
    (folder / "mmproj").mkdir()
    for name in ("mmproj-tiny-Q8_0.gguf", "tiny.mmproj-Q8_0.gguf", "mmproj/tiny-Q8_0.gguf"):
        shutil.copy(gguf_file("tiny", "q8_0"), folder / name)
    (folder / "README.md").write_text("about it")
    return folder


@pytest.fixture
def hub(repo: Path) -> Iterator[Hub]:
    with serving(repo) as server:
        yield server


# Runs commands in one process, whose hub is set by its environment: a list of lists in, results out.
SCRIPT = """
import contextlib, io, json, sys
from pydiffusion.cli import main
done = []
for command in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(command)
    done.append((code, out.getvalue(), " ".join(err.getvalue().split())))
print(json.dumps(done))
"""


@pytest.fixture
def run(hub: Hub, tmp_path: Path) -> Run:
    """Run commands with the local hub and an empty cache, in an empty folder: (code, out, err) of each."""
    work = tmp_path / "work"
    work.mkdir()

    def call(*commands: str, **variables: str) -> list[tuple[int, str, str]]:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, json.dumps([shlex.split(command) for command in commands])],
            env=environment(hub, tmp_path / "home", **variables), cwd=work,
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return call


ANSWER = "-n 4 --steps 1 -s 1 -t 1"


def test_pull_list_show_and_run(run: Run, hub: Hub) -> None:
    pulled, listed, as_json, shown, *answers = run(
        "pull org/open:Q8_0", "ls", "list --json", "show org/open:q8_0 --json",
        f"run org/open:Q8_0 hi {ANSWER}", f"generate -hf org/open:Q8_0 -p hi {ANSWER}",
        "inspect -hf org/open:Q8_0",
    )  # fmt: skip
    path = Path(pulled[1].strip())
    assert pulled[0] == 0 and path.name == "tiny-Q8_0.gguf" and path.is_file(), pulled
    assert listed[1].splitlines()[1].startswith("org/open:tiny-Q8_0.gguf")
    assert json.loads(as_json[1])[0].items() >= {
        "name": "org/open:tiny-Q8_0.gguf", "path": str(path), "n_bytes": path.stat().st_size
    }.items()  # fmt: skip
    assert json.loads(shown[1])["path"] == str(path)
    assert answers[0][:2] == answers[1][:2] and answers[0][0] == 0
    assert "tiny-Q8_0.gguf: " in answers[0][2], "the file that was chosen is said"
    assert answers[2][0] == 0
    assert hub.fetched == ["tiny-Q8_0.gguf"], "all but the first had it in the cache"


def test_all_parts_of_a_split_model(run: Run, hub: Hub, repo: Path) -> None:
    n_parts = len(list((repo / "BF16").iterdir()))
    assert n_parts > 1
    pulled, listed, verified = run("pull org/open:BF16", "list --json", "verify org/open:BF16")
    assert Path(pulled[1].strip()).name == f"tiny-BF16-00001-of-{n_parts:05}.gguf", pulled
    (model,) = json.loads(listed[1])
    assert model["n_bytes"] == sum(file.stat().st_size for file in (repo / "BF16").iterdir())
    assert verified[0] == 0 and len(hub.fetched) == n_parts


def test_the_cache_serves_without_a_network(run: Run, hub: Hub) -> None:
    """ggml-org/llama.cpp#13128, ggml-org/llama.vscode#23, EricLBuehler/mistral.rs#1449."""
    names = ("org/open:Q8_0", "org/open", "org/open:*Q8_0.gguf", "org/open:tiny-Q8_0.gguf")
    ((code, _, err),) = run("inspect org/open:Q8_0", HF_HUB_OFFLINE="1")
    assert code == 1 and "HF_HUB_OFFLINE forbids" in err
    assert run("pull org/open:Q8_0")[0][0] == 0
    hub.fetched.clear()
    *found, again = run(*(f"inspect {name}" for name in names), "pull org/open:Q8_0", HF_HUB_OFFLINE="1")
    assert [code for code, _, _ in found] == [0] * len(names), found
    assert again[0] == 1 and "HF_HUB_OFFLINE" in again[2], "pull asks for a newer one"
    assert hub.fetched == []


def test_what_can_not_be_had_says_what_to_do(run: Run) -> None:
    command_to_words = {
        "generate -m org/open -p x": "has several models, name one (org/open:FILE or :TYPE): BF16/tiny",
        # ggml-org/llama.cpp#21413: what was asked for, or nothing
        "generate -m org/open:Q4_K_M -p x": "no file matches 'Q4_K_M'; it has BF16/tiny-BF16-00001",
        "chat -m org/open:none.gguf": "the repo has no such file",
        "serve -m org/private:Q8_0 --port 0": "no such repo, or it is private: check the name",
        "inspect org/gated:tiny-Q8_0.gguf": "access to this repo is restricted: accept its terms",
        "inspect org/open@v9:Q8_0": "the repo has no such revision",
        "inspect org/none": "nor is there such a file here",
    }
    for words, (code, out, err) in zip(command_to_words.values(), run(*command_to_words), strict=True):
        assert code == 1 and out == "" and words in err, err


def test_private_repos_revisions_and_pages(run: Run) -> None:
    page = "https://huggingface.co/org/open"
    names = ["org/private:Q8_0", "org/open@v1:Q8_0", f"{page}/blob/main/tiny-Q8_0.gguf"]
    names.append(f"{page}/resolve/main/tiny-Q8_0.gguf?download=true")
    for code, out, err in run(*(f"pull {name}" for name in names), HF_TOKEN=TOKEN):
        assert code == 0 and out.strip().endswith("tiny-Q8_0.gguf"), err


@pytest.mark.slow
def test_a_repo_without_a_model_and_where_a_quantized_one_is_written(
    run: Run, hub: Hub, tmp_path: Path
) -> None:
    ((code, _, err),) = run("quantize org/open:Q8_0 Q4_0")
    assert code == 0 and (tmp_path / "work/tiny-Q8_0-q4_0.gguf").is_file(), "here, not in the cache" + err
    hub.folder = tmp_path / "checkpoint"
    hub.folder.mkdir()
    (hub.folder / "config.json").write_text("{}")
    ((code, _, err),) = run("generate -m org/private -p x", HF_TOKEN=TOKEN)
    assert code == 1 and "pydiffusion convert org/private" in err


def test_paths_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert model_reference("org/name:Q8_0") == ModelReference("org/name", "Q8_0")
    assert model_reference("org/name@v1:sub/x.gguf") == ModelReference("org/name", "sub/x.gguf", "v1")
    assert model_reference(Path("hf.co/org/name")) == ModelReference("org/name")
    assert model_reference(Path("https://huggingface.co/org/name")) == ModelReference("org/name")
    page = "https://huggingface.co/org/name/tree/main"
    assert model_reference(page) == ModelReference("org/name", "", "main")
    paths = ["model.gguf", "folder/model.gguf", "./org/name", "../org/name", "/org/name", "~/org/name"]
    for path in [*paths, "name", "", "a/b/c", "C:\\a\\b.gguf", "C:/a/b.gguf", "llama3.2:3b"]:
        assert model_reference(path) is None, path
    (tmp_path / "org").mkdir()
    assert model_reference("org/name") is None, "the folder is there: a slip in the file's name"
    assert model_reference("hf.co/org/name") == ModelReference("org/name")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("modle.gguf", "did you mean model.gguf?"),
        ("model", "did you mean model.gguf?"),
        ("model.gguf ", "without the blanks or quotes"),
        ('"model.gguf"', "without the blanks or quotes"),
        ("nowhere/model.gguf", "there is no folder nowhere either"),
        ("C:\\models\\model.gguf", "it is a Windows path"),
        ("llama3.2:3b", "names of Ollama's library are not known here"),
        ("org/name/file.gguf", "it is named org/name:file.gguf"),
        (".", "it has model.gguf: give the file"),
        ("", "it has model.gguf: give the file"),
    ],
)
def test_names_of_files_that_are_not_there(
    name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"")
    assert main(["generate", "-m", name, "-p", "x"]) == 1
    assert words in capsys.readouterr().err
