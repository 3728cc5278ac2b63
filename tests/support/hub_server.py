"""Serve as much of the Hugging Face hub's HTTP as downloads need."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT, TOKEN = "c0ffee" * 6 + "c0ff", "hf_secret"


class Hub(ThreadingHTTPServer):
    """Serves one folder as ``org/open`` (also ``org/open-1`` ...) and, with the token, as ``org/private``.

    The files of ``org/gated`` are listed but access is refused.
    """

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.fetched: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    """A hub of that folder."""
    with Hub(folder) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            hub.shutdown()


def environment(hub: Hub, home: Path, **more: str) -> dict[str, str]:
    """Variables of a program that knows this hub alone and has its cache in ``home``."""
    outside = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "NO_PROXY": "*", "no_proxy": "*"}
    return outside | own | more


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
        if (
            owner != "org"
            or name.partition("-")[0] not in ("open", "gated", "private")
            or (name == "private" and not allowed)
        ):
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
