"""Run the pages' commands and Python blocks in forks of one process that has imported the package already.

    python doc_worker.py SOCKET

A request is JSON with three file descriptors (stdin, stdout, stderr), and what is done for it happens in a
child: ``command`` runs the command line and replies with its exit code, ``python`` keeps its names and
executes one block per line. ``serve`` stays and is replied to once it listens; it ends with this
process, when its standard input closes, or when a ``stop`` comes.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
import select
import signal
import socket
import sys
import time
import traceback
from typing import Any

_servers: list[int] = []


def main(path: str) -> None:
    from pydiffusion.cli import main as command_line

    import_all()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    print("ready", flush=True)
    while True:
        readable, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in readable:
            break
        connection, _ = listener.accept()
        message, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 3)
        request = json.loads(message)
        if request["kind"] == "stop":
            stop()
            connection.sendall(b"0\n")
        elif request["kind"] == "serve":
            serve(request, connection, descriptors, command_line)
        elif os.fork() == 0:
            listener.close()
            adopt(request, descriptors)
            if request["kind"] == "python":
                blocks(connection)
            else:
                code = command(request["arguments"], command_line)
                connection.sendall(f"{code}\n".encode())
            end(0)
        for descriptor in descriptors:
            os.close(descriptor)
        connection.close()
        while _reaped():
            pass
    stop()


def import_all() -> None:
    """Import what the commands would import one by one, so that no child has to."""
    import pydiffusion

    rarely_needed = {
        name: None for name in ("torch", "transformers", "matplotlib") if name not in sys.modules
    }
    sys.modules |= rarely_needed  # type: ignore[arg-type]
    for module in pkgutil.walk_packages(pydiffusion.__path__, "pydiffusion."):
        if not module.name.endswith("__main__"):
            with contextlib.suppress(ImportError):  # of what is not installed, as torch
                importlib.import_module(module.name)
    for name in rarely_needed:
        del sys.modules[name]


def _reaped() -> bool:
    try:
        return os.waitpid(-1, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return False


def adopt(request: dict[str, Any], descriptors: list[int]) -> None:
    """Take the folder, environment and streams of the caller."""
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
        os.close(descriptor)
    sys.stdin = os.fdopen(0, "r", encoding="utf-8", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", buffering=1, closefd=False)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])


def command(arguments: list[str], command_line: Any) -> int:
    sys.argv = ["pydiffusion", *arguments]
    try:
        return int(command_line(None) or 0)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1


def blocks(connection: socket.socket) -> None:
    """Execute blocks one after the other in one set of names; reply with a traceback or null."""
    names: dict[str, Any] = {"__name__": "__main__"}
    sys.argv = ["page.py"]
    for line in connection.makefile("r", encoding="utf-8"):
        block = json.loads(line)
        error = None
        try:
            code = "\n" * (block["line"] - 1) + block["text"]  # a traceback gives the page's line
            exec(compile(code, block["page"], "exec"), names)
        except BaseException:
            error = traceback.format_exc()
        sys.stdout.flush()
        connection.sendall(json.dumps(error).encode() + b"\n")


def serve(
    request: dict[str, Any], connection: socket.socket, descriptors: list[int], command_line: Any
) -> None:
    """Start a server, in place of one at the same port, and reply when it listens or has ended."""
    stop()
    server = os.fork()
    if server == 0:
        adopt(request, descriptors)
        end(command(request["arguments"], command_line))
    code = _wait_until_it_listens(server, request["port"])
    if code == 0:
        _servers.append(server)
    connection.sendall(f"{code}\n".encode())


def _wait_until_it_listens(server: int, port: int) -> int:
    limit = time.monotonic() + 120
    while time.monotonic() < limit:
        ended, status = os.waitpid(server, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status) or 1
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return 0
        time.sleep(0.02)
    os.kill(server, signal.SIGKILL)
    return 1


def stop() -> None:
    while _servers:
        server = _servers.pop()
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)


def end(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1])
