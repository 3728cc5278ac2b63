"""``pydiffusion serve``: serve OpenAI's API over HTTP."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pydiffusion._util import log

from . import _open, _options
from ._text import say

if TYPE_CHECKING:
    from pydiffusion import DiffusionModel


@_options.takes(runtime=_options.IMAGE_RUNTIME)
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
    api_key_file: Annotated[
        Path | None,
        typer.Option("--api-key-file", help="File with the API key; also set as PYDIFFUSION_API_KEY_FILE."),
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
        int | None,
        typer.Option(
            "--max-body",
            min=1024,
            help="Maximum size of a request body in bytes. [default: 8388608, with a vision file 33554432]",
        ),
    ] = None,
    allow_image_urls: Annotated[
        bool,
        typer.Option(
            "--allow-image-urls",
            help="Fetch images that requests name by http(s) URLs, from public addresses only.",
        ),
    ] = False,
    cors: Annotated[
        list[str] | None,
        typer.Option("--cors", help="Origin whose pages may call the server (CORS); may be repeated."),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-host",
            help="Host name that clients may use besides the machine's own; may be repeated; * for any.",
        ),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Refuse request fields without effect, and other models' names."),
    ] = False,
    special: Annotated[
        bool, typer.Option("--special", help="Parse control tokens in the prompt texts of /v1/completions.")
    ] = False,
    lora_init_without_apply: Annotated[
        bool,
        typer.Option(
            "--lora-init-without-apply",
            help="Adapters are off until POST /lora-adapters, or in requests that choose them.",
        ),
    ] = False,
    log_level: Annotated[
        str | None,
        typer.Option(
            "--log-level",
            help="Lowest level of messages on stderr: debug, info (a line per request), warning, error."
            " [default: PYDIFFUSION_LOG_LEVEL, else warning]",
        ),
    ] = None,
) -> None:
    """Serve a model over HTTP with OpenAI's API."""
    try:
        from pydiffusion.server.app import Settings
        from pydiffusion.server.run import Server
    except ImportError as error:
        raise ValueError(f"serve needs {error.name}: pip install fastapi uvicorn") from None
    # What is wrong fails before the model is loaded.
    if log_level is not None and log_level not in log.LEVELS:
        raise typer.BadParameter(f"--log-level is {log_level!r}; permitted are {', '.join(log.LEVELS)}")
    try:
        settings = Settings(
            api_key=_find_key(api_key, api_key_file),
            max_queue=queue,
            n_parallel=parallel,
            n_sessions=sessions,
            timeout=timeout or None,
            max_body=max_body,
            cors=tuple(cors or ()),
            allowed_hosts=tuple(allowed_host or ()),
            strict=strict,
            special=special,
            fetch_images=allow_image_urls,
            apply_lora=not lora_init_without_apply,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    listener = _bind(host, port)
    opened = _open.open_model(model, runtime, max(parallel, sessions))
    _check_template(opened)
    if runtime["mmproj"] is None:
        find_vision(opened)
    _set_log_level(log_level)
    server = Server(opened, settings, grace=grace)
    if settings.api_key is None and host not in ("127.0.0.1", "localhost", "::1"):
        say(f"anybody who can reach {host}:{port} can use this server: set PYDIFFUSION_API_KEY")
    server.on_started = lambda address: say(f"serving on http://{address} (Ctrl-C ends)")
    try:
        server.run(sockets=[listener])
    finally:
        server.scheduler.close()
        opened.close()
    if server.interrupted:
        raise KeyboardInterrupt


def _find_key(given: str | None, file: Path | None) -> str | None:
    """The API key of the options, else of the environment."""
    if given is not None and file is not None:
        raise ValueError("give --api-key or --api-key-file, not both")
    if given is None and file is None:
        given = os.environ.get("PYDIFFUSION_API_KEY")
        named = os.environ.get("PYDIFFUSION_API_KEY_FILE")
        if given is not None and named is not None:
            raise ValueError("set PYDIFFUSION_API_KEY or PYDIFFUSION_API_KEY_FILE, not both")
        file = Path(named) if named else None
    return given if file is None else file.read_text(encoding="utf-8")


def _set_log_level(level: str | None) -> None:
    """Print messages from here on: warnings while loading have been printed already."""
    if level is not None or not os.environ.get(log.LEVEL_VARIABLE):
        log.print_from(level or "warning")


def _check_template(model: DiffusionModel) -> None:
    """Print now what is wrong with the chat template; raw completions work without one."""
    from pydiffusion import PyDiffusionError

    if not model.has_chat_template:
        return
    try:
        model.check_chat_template()
    except PyDiffusionError as error:
        say(f"pydiffusion: warning: chats will fail: {error}")


def find_vision(model: DiffusionModel) -> None:
    """Load the vision file that is beside the model or in its repo, if there is one."""
    from pydiffusion import PyDiffusionError, UnsupportedModelError

    try:
        model.require_vision()
    except PyDiffusionError as error:
        if model.vision is not None or not isinstance(error, UnsupportedModelError):
            say(f"pydiffusion: warning: images will fail: {error}")


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
