"""``pydiffusion serve``: serve OpenAI's API over HTTP."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import _open, _options
from ._text import say

if TYPE_CHECKING:
    from pydiffusion import DiffusionModel


@_options.takes(runtime=_options.CHAT_RUNTIME)
def command(
    model: _options.ModelPath,
    *,
    runtime: dict[str, Any],
    host: Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 for any free one.")
    ] = 8080,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", help="API key that requests must have; better set as PYDIFFUSION_API_KEY."),
    ] = None,
    parallel: Annotated[
        int,
        typer.Option("--parallel", min=1, max=256, help="Maximum number of sequences denoised in one batch."),
    ] = 4,
    sessions: Annotated[
        int,
        typer.Option(
            "--sessions", min=1, max=256, help="Number of KV caches kept for reuse; at least --parallel."
        ),
    ] = 4,
    queue: Annotated[
        int, typer.Option("--queue", min=0, help="Maximum number of waiting requests; further ones get 429.")
    ] = 64,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0, help="Maximum seconds per request; 0 for no limit.")
    ] = 600,
    grace: Annotated[
        float,
        typer.Option("--grace", min=0, help="Maximum seconds for running requests to finish at shutdown."),
    ] = 30,
    max_body: Annotated[
        int, typer.Option("--max-body", min=1024, help="Maximum size of a request body in bytes.")
    ] = 8388608,
    cors: Annotated[
        list[str] | None,
        typer.Option("--cors", help="Origin whose pages may call the server (CORS); may be repeated."),
    ] = None,
) -> None:
    """Serve a model over HTTP with OpenAI's API."""
    try:
        from pydiffusion.server.app import Settings
        from pydiffusion.server.run import Server
    except ImportError as error:
        raise ValueError(f"serve needs {error.name}: pip install fastapi uvicorn") from None
    key = api_key if api_key is not None else os.environ.get("PYDIFFUSION_API_KEY")
    if key is not None and not key.strip():
        raise typer.BadParameter("the API key is empty")
    listener = _bind(host, port)  # fail before loading the model
    opened = _open.open_model(model, runtime, max(parallel, sessions))
    _check_template(opened)
    settings = Settings(
        api_key=key,
        max_queue=queue,
        n_parallel=parallel,
        n_sessions=sessions,
        timeout=timeout or None,
        max_body=max_body,
        cors=tuple(cors or ()),
    )
    server = Server(opened, settings, grace=grace)
    if key is None and host not in ("127.0.0.1", "localhost", "::1"):
        say(f"anybody who can reach {host}:{port} can use this server: set PYDIFFUSION_API_KEY")
    server.on_started = lambda address: say(f"serving on http://{address} (Ctrl-C ends)")
    try:
        server.run(sockets=[listener])
    finally:
        server.scheduler.close()
        opened.close()
    if server.interrupted:
        raise KeyboardInterrupt


def _check_template(model: DiffusionModel) -> None:
    """Print now what is wrong with the chat template; raw completions work without one."""
    from pydiffusion import PyDiffusionError

    if not model.has_chat_template:
        return
    try:
        model.check_chat_template()
    except PyDiffusionError as error:
        say(f"pydiffusion: warning: chats will fail: {error}")


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise OSError(f"can't listen on {host}, port {port}: {error.strerror or error}") from None
    return listener
