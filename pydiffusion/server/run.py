"""uvicorn server with graceful shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from socket import socket
from typing import TYPE_CHECKING

import uvicorn

from .app import Settings, create_app

if TYPE_CHECKING:
    from pydiffusion.model import DiffusionModel


class Server(uvicorn.Server):
    """Serves a model until SIGINT or SIGTERM, then rejects new requests and gives running ones ``grace``
    seconds to finish; those cut short get an error. A second SIGINT stops at once.

    ``interrupted`` tells afterwards whether it was SIGINT.
    """

    def __init__(
        self,
        model: DiffusionModel,
        settings: Settings,
        *,
        host: str = "127.0.0.1",
        port: int = 8080,
        grace: float = 30.0,
    ) -> None:
        app = create_app(model, settings)
        self.scheduler = app.state.scheduler
        self.interrupted = False
        self.on_started: Callable[[str], None] = lambda address: None
        self._grace = grace
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=max(1, round(grace) + 5),
            server_header=False,
        )
        super().__init__(config)

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Start, then call ``on_started`` with the address."""
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self.on_started(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        self.scheduler.begin_shutdown()
        timer = asyncio.get_running_loop().call_later(self._grace, self.scheduler.abort)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()
            await asyncio.to_thread(self.scheduler.close)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals without re-raising them afterwards: the exit code is ours."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {sig: signal.signal(sig, self._on_signal) for sig in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for sig, handler in handlers.items():
                signal.signal(sig, handler)

    def _on_signal(self, number: int, _: object) -> None:
        self.interrupted = self.interrupted or number == signal.SIGINT
        if self.should_exit and number == signal.SIGINT:
            self.force_exit = True
            self.scheduler.abort()
        self.should_exit = True
