"""A reader of a page: a folder with what the page assumes, in which its blocks run in order."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pydiffusion.convert import collect_imatrix, convert, convert_mmproj, repack
from pydiffusion.demo import checkpoint_path
from support import doc_adapters, hub_server
from support.doc_blocks import Block
from support.paths import REPOSITORY

# `pydiffusion` in the folder's PATH: hands arguments and streams to the worker.
_SHIM = """#!{python} -IS
import json, os, socket, sys
arguments = sys.argv[1:]
request = {{"kind": "command", "folder": os.getcwd(), "environment": dict(os.environ)}}
if arguments[:1] in (["serve"], ["llama-server"]) and not {{"-h", "--help"}} & set(arguments):
    ports = json.loads(os.environ["DOC_PORTS"])
    asked = "8080"
    if "--port" in arguments:
        i = arguments.index("--port")
        asked = arguments[i + 1]
        del arguments[i : i + 2]
    request |= {{"kind": "serve", "port": ports[asked]}}
    arguments += ["--port", str(ports[asked])]
worker = socket.socket(socket.AF_UNIX)
worker.connect({socket!r})
socket.send_fds(worker, [json.dumps(request | {{"arguments": arguments}}).encode()], [0, 1, 2])
sys.exit(int(worker.makefile().readline() or 139))
"""
_URL = re.compile(r"\b(127\.0\.0\.1|localhost|0\.0\.0\.0):(\d{4,5})\b")
_GGUF = re.compile(r"(?<![\w/.-])[\w-]+(?:\.imatrix)?\.gguf\b")
_IMAGE = re.compile(r"(?<![\w/.-])[\w-]+\.(?:png|jpe?g)\b")
_OUTPUT = re.compile(r"(?:-o|--output|--outfile|>)\s+(\S+)")
_TYPE = re.compile(r"(?<![a-z0-9])(f32|f16|bf16|q8_0|q6_k|q5_k_m|q4_k_m|iq4_xs)(?![a-z0-9])")
_SECONDS = 900
_TEXTS: dict[str, str] = {
    "text.txt": "The river runs to the sea. It rains in the hills, and the river rises.\n\n" * 20,
    "prompts.txt": "sort: b a c\nreverse: abc\nadd: 12 + 30\n",
    "prompts.jsonl": '"sort: b a c"\n{"id": 2, "messages": [{"role": "user", "content": "reverse: abc"}]}\n',
    "draft.py": "def add(a, b):\n    <|hole:8|>\n    return total\n",
    "template.jinja": (checkpoint_path() / "chat_template.jinja").read_text(encoding="utf-8"),
    "schema.json": '{"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}',
    "grammar.gbnf": 'root ::= "yes" | "no"\n',
}
_CHECKPOINTS = ("DiffusionGemma", "DIR")


class Files:
    """What pages assume to be there, made once from the demo checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def gguf(self, name: str) -> list[Path]:
        """A model for a file's name, of the type in the name (else q8_0): its file, or parts in order."""
        if name.endswith(".imatrix.gguf"):
            return [self._once(name, self._imatrix)]
        if "mmproj" in name:
            return [self._once("mmproj.gguf", lambda path: convert_mmproj(checkpoint_path(), path))]
        found = _TYPE.search(name.lower())
        type = found[1] if found else "q8_0"
        model = self._once(f"demo-{type}.gguf", lambda path: convert(checkpoint_path(), path, type))
        split = re.search(r"-00001-of-(\d{5})\.gguf$", name)
        return self._parts(model, int(split[1])) if split else [model]

    def _imatrix(self, path: Path) -> None:
        collect_imatrix(self.gguf("model-bf16.gguf")[0], _TEXTS["text.txt"], path)

    def _once(self, name: str, make: Callable[[Path], object]) -> Path:
        path = self.folder / name
        if not path.exists():
            make(path)
        return path

    def _parts(self, model: Path, count: int) -> list[Path]:
        """The model in so many parts, by whichever size gives them."""
        for share in range(20, 5, -1):
            folder = self.folder / f"{model.stem}-{count}-{share}"
            folder.mkdir(exist_ok=True)
            repack(model, folder / "model.gguf", split_max_size=model.stat().st_size * share // (10 * count))
            parts = sorted(folder.glob("model-*.gguf"))
            if len(parts) == count:
                return parts
        raise AssertionError(f"the demo model can't be split into {count} parts")


@dataclass(frozen=True)
class Worker:
    """The process whose forks run commands and Python blocks (doc_worker.py)."""

    socket_path: str
    environment: dict[str, str]


@contextmanager
def worker(folder: Path) -> Iterator[Worker]:
    """Start the worker, and a stand-in of the Hugging Face hub with the demo checkpoint under every name."""
    hub = _Hub(_hub_folder(folder / "on-the-hub"))
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    short = Path(tempfile.mkdtemp(prefix="docs-"))  # a socket's path has at most 107 characters
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "PYDIFFUSION_"))
    }
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hub"), "NO_PROXY": "*", "no_proxy": "*"}
    environment |= {name: str(folder / name) for name in ("XDG_CACHE_HOME", "XDG_STATE_HOME")}
    command = [sys.executable, str(Path(__file__).with_name("doc_worker.py")), str(short / "worker")]
    try:
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=folder,
            text=True,
            env=environment,
        ) as process:
            assert process.stdin is not None and process.stdout is not None
            try:
                assert process.stdout.readline() == "ready\n", "the worker ended before it was up"
                yield Worker(str(short / "worker"), environment)
            finally:
                process.stdin.close()
                process.wait(60)
    finally:
        hub.shutdown()
        hub.server_close()
        shutil.rmtree(short)


def _hub_folder(folder: Path) -> Path:
    """The demo checkpoint, and a GGUF of it beside."""
    folder.mkdir()
    for file in checkpoint_path().iterdir():
        (folder / file.name).symlink_to(file)
    convert(checkpoint_path(), folder / "demo-q8_0.gguf", "q8_0")
    return folder


class _AnyName(hub_server._Handler):
    """Every repository of the hub is the one that it serves."""

    def answer(self, send: bool) -> None:
        self.path = re.sub(r"^((?:/api/models)?)/[^/]+/[^/]+", r"\1/org/open", self.path)
        super().answer(send)


class _Hub(hub_server.Hub):
    def __init__(self, folder: Path):
        super().__init__(folder)
        self.RequestHandlerClass = _AnyName


class Reader:
    """Runs blocks of one page in its folder. AssertionError says which block failed, with what it printed."""

    def __init__(self, folder: Path, files: Files, worker: Worker) -> None:
        self.folder, self.files, self._worker = folder, files, worker
        self._ports: dict[str, int] = {"8080": _free_port()}
        self._python: socket.socket | None = None
        self._output = folder.with_name(folder.name + ".output")
        self._bin = folder.with_name(folder.name + ".bin")
        self._bin.mkdir()
        folder.mkdir()
        self._program("pydiffusion", _SHIM.format(python=sys.executable, socket=worker.socket_path))
        self._program("python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        for name in ("examples", "scripts", "benchmarks"):
            (folder / name).symlink_to(REPOSITORY / name)

    def run(self, block: Block) -> str:
        """Run a block; returns what it printed on stdout and stderr."""
        text = _URL.sub(lambda found: f"{found[1]}:{self._port(found[2])}", block.script)
        for asked in re.findall(r"--port[ =](\d+)", text):
            self._port(asked)
        self._prepare(text)
        error = self._run_python(block, text) if block.language == "python" else self._run_shell(text)
        printed = self._output.read_text(encoding="utf-8", errors="replace")
        assert not error, f"{block.place}: {error}\n{block.text}\n--- printed:\n{printed[-4000:]}"
        return printed

    def close(self) -> None:
        if self._python:
            self._python.close()
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(self._worker.socket_path)
            self._send(connection, {"kind": "stop"})
            connection.recv(16)

    def _prepare(self, text: str) -> None:
        """Put what the block's text names and nothing before it made."""
        made = {Path(name.strip("'\"")) for name in _OUTPUT.findall(text)}
        for name, sets in doc_adapters.ADAPTERS.items():
            path = self.folder / name
            if re.search(rf"(?<![\w/-]){name}(?![\w.-])", text) and not path.exists():
                doc_adapters.write(path, sets)
        for name in _GGUF.findall(text):
            if "lora" in name:  # an adapter, which the page makes
                continue
            if Path(name) not in made and not (self.folder / name).exists():
                for i, path in enumerate(self.files.gguf(name)):
                    shutil.copy(path, self.folder / name.replace("-00001-of-", f"-{i + 1:05d}-of-"))
        for name in _IMAGE.findall(text):
            if Path(name) not in made and not (self.folder / name).exists():
                Image.linear_gradient("L").save(self.folder / name)
        for name, content in _TEXTS.items():
            if name in text and Path(name) not in made and not (self.folder / name).exists():
                (self.folder / name).write_text(content, encoding="utf-8")
        for name in _CHECKPOINTS:
            if re.search(rf"(?<![\w/]){name}\b", text) and not (self.folder / name).exists():
                (self.folder / name).symlink_to(checkpoint_path())
        for port in set(_URL.findall(text)):
            self._serve_if_needed(port[1], text)

    def _serve_if_needed(self, port: str, text: str) -> None:
        """A page may speak to a server without saying how to start one."""
        with socket.socket() as probe:
            if (
                re.search(r"pydiffusion (serve|llama-server)", text)
                or probe.connect_ex(("127.0.0.1", int(port))) == 0
            ):
                return
        shown = next(key for key, value in self._ports.items() if value == int(port))
        if not (self.folder / "model.gguf").exists():
            shutil.copy(self.files.gguf("model.gguf")[0], self.folder / "model.gguf")
        error = self._run_shell(f"pydiffusion serve -m model.gguf --port {shown}\n")
        assert not error, f"the server that the page assumes: {error}\n{self._output.read_text()}"

    def _run_shell(self, text: str) -> str:
        with self._output.open("w") as output:
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", text],
                cwd=self.folder,
                input="add: 12 + 30\n",
                stdout=output,
                stderr=output,
                env=self._environment(),
                text=True,
                timeout=_SECONDS,
            )
        return f"exit code {done.returncode}" if done.returncode else ""

    def _run_python(self, block: Block, text: str) -> str:
        if self._python is None:
            self._python = socket.socket(socket.AF_UNIX)
            self._python.settimeout(_SECONDS)
            self._python.connect(self._worker.socket_path)
            with self._output.open("a") as output, Path(os.devnull).open() as nothing:
                files = [nothing.fileno(), output.fileno(), output.fileno()]
                self._send(self._python, {"kind": "python"}, files)
            self._replies = self._python.makefile("r", encoding="utf-8")
        os.truncate(self._output, 0)
        request = {"page": block.page, "line": block.line, "text": text}
        self._python.sendall(json.dumps(request).encode() + b"\n")
        reply = self._replies.readline()
        return json.loads(reply) or "" if reply else "the interpreter died"

    def _send(self, connection: socket.socket, request: dict[str, object], files: list[int] = []) -> None:  # noqa: B006
        request |= {"folder": str(self.folder), "environment": self._environment()}
        socket.send_fds(connection, [json.dumps(request).encode()], files)

    def _environment(self) -> dict[str, str]:
        path = f"{self._bin}{os.pathsep}{os.environ['PATH']}"
        return {**self._worker.environment, "PATH": path, "DOC_PORTS": json.dumps(self._ports)}

    def _port(self, shown: str) -> int:
        if int(shown) in self._ports.values():  # substituted already
            return int(shown)
        return self._ports.setdefault(shown, _free_port())

    def _program(self, name: str, text: str) -> None:
        path = self._bin / name
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
