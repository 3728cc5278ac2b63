"""Repo ids as source, against a server of our own that speaks as much of the hub's HTTP as is needed."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import convert_folders as folders
import pytest

from pydiffusion.convert import convert
from pydiffusion.convert.checkpoint.hub import find_checkpoint, repo_id
from pydiffusion.errors import ConversionError

COMMIT, TOKEN = "c0ffee" * 6 + "c0ff", "hf_secret"


class Hub(ThreadingHTTPServer):
    """Serves one folder as ``org/open`` and, to those who have the token, ``org/private``; the files of
    ``org/gated`` are seen and not had.
    """

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.fetched: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(send=False)

    def do_GET(self) -> None:
        self.answer(send=True)

    def answer(self, send: bool) -> None:
        path = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        is_api = path[:2] == ["api", "models"]
        owner, name, *rest = path[2:] if is_api else path
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if owner != "org" or name not in ("open", "gated", "private") or (name == "private" and not allowed):
            self.refuse(404 if allowed else 401, "RepoNotFound", send)
        elif rest[:1] in (["revision"], ["tree"]) or not rest:
            revision = rest[1] if rest else "main"
            if revision not in ("main", "v1", COMMIT):
                self.refuse(404, "RevisionNotFound", send)
            elif rest[:1] == ["tree"]:
                self.reply(json.dumps(self.tree()).encode(), send)
            else:
                info = {"id": f"org/{name}", "modelId": f"org/{name}", "sha": COMMIT, "tags": []}
                info |= {"private": False, "siblings": [{"rfilename": e["path"]} for e in self.tree()]}
                self.reply(json.dumps(info).encode(), send)
        elif rest[0] == "resolve":
            file = self.server.folder.joinpath(*rest[2:])
            if name == "gated":
                self.refuse(403, "GatedRepo", send)
            elif not file.is_file():
                self.refuse(404, "EntryNotFound", send)
            else:
                self.server.fetched += [file.name] if send else []
                data = file.read_bytes()
                tag = f'"{hashlib.sha1(data).hexdigest()}"'
                self.reply(data, send, {"ETag": tag, "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"})
        else:
            self.refuse(404, "EntryNotFound", send)

    def tree(self) -> list[dict[str, object]]:
        files = sorted(path for path in self.server.folder.rglob("*") if path.is_file())
        return [
            {
                "type": "file",
                "path": path.relative_to(self.server.folder).as_posix(),
                "size": path.stat().st_size,
                "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
            }
            for path in files
        ]

    def reply(
        self, data: bytes, send: bool, headers: dict[str, str] | None = None, status: int = 200
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if send:
            self.wfile.write(data)

    def refuse(self, status: int, code: str, send: bool) -> None:
        self.reply(b"{}", send, {"X-Error-Code": code, "X-Error-Message": code}, status)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = folders.make_folder(tmp_path_factory.mktemp("hub") / "open", n_shards=2)
    (made / "original").mkdir()
    (made / "original/consolidated.safetensors").write_bytes(b"nobody asked")
    (made / "README.md").write_text("nobody asked")
    return made


@pytest.fixture
def hub(folder: Path) -> Iterator[Hub]:
    server = Hub(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def command(
    hub: Hub, folder: Path, *arguments: object, **environment: str
) -> subprocess.CompletedProcess[str]:
    """``pydiffusion`` in a process whose hub is ours, in an empty folder."""
    outside = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    home = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "NO_PROXY": "*", "no_proxy": "*"}
    work = folder / "work"
    work.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-m", "pydiffusion", *map(str, arguments)],
        env=outside | home | environment,
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
    assert not any(name.endswith(".safetensors") for name in hub.fetched)


def test_a_private_repo_needs_the_token(hub: Hub, tmp_path: Path) -> None:
    refused = command(hub, tmp_path, "convert", "org/private", "--dry-run")
    assert refused.returncode == 1 and "if it is private" in refused.stderr
    done = command(hub, tmp_path, "convert", "org/private", "--dry-run", HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("source", "environment", "message"),
    [
        ("org/none", {"HF_TOKEN": TOKEN}, "org/none: neither a folder here nor a repo that can be seen"),
        ("org/gated", {}, "org/gated: access to this repo is restricted: accept its terms"),
        ("org/open@v9", {}, "org/open@v9: the repo has no such revision"),
        ("org/open", {"HF_HUB_OFFLINE": "1"}, "org/open: is not (wholly) in the cache, and HF_HUB_OFFLINE"),
        ("org/open", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub can't be reached"),
    ],
)
def test_what_can_not_be_had_is_told_in_a_line(
    hub: Hub, tmp_path: Path, source: str, environment: dict[str, str], message: str
) -> None:
    done = command(hub, tmp_path, "convert", source, "-o", "m.gguf", **environment)
    assert done.returncode == 1
    assert done.stderr.startswith("pydiffusion: ") and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert list((tmp_path / "work").iterdir()) == []


def test_paths_are_no_repos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for path in ("models/typo", "./a/b", "/a/b", "../a/b", "a", "a/b/c", "models", ""):
        assert repo_id(path) is None, path
    assert repo_id("org/name") == ("org/name", None)
    assert repo_id(Path("org/name@v1.0")) == ("org/name", "v1.0")
    (tmp_path / "org/name").mkdir(parents=True)
    assert repo_id("org/name") is None
    assert find_checkpoint("models").path == Path("models")
    with pytest.raises(ConversionError, match="a revision belongs to a repo id"):
        find_checkpoint("models", "main")
