"""Middleware around all endpoints: paths as clients write them, access, request ids, access log, errors."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable, Collection
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pydiffusion.openai.errors import ApiError, from_exception

from .access import Access
from .http import Disconnected
from .metrics import Metrics

log = logging.getLogger("pydiffusion.server")
access_log = logging.getLogger("pydiffusion.server.access")

_CLIENT_CLOSED = 499  # nginx's status for a client that left
_REQUEST_ID = "x-request-id"
_PERMITTED_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Guard:
    """Middleware: refuses what may not be used, reports every response, turns exceptions into responses."""

    def __init__(
        self,
        app: ASGIApp,
        access: Access,
        metrics: Metrics,
        open_paths: Collection[str],
        respond: Callable[[ApiError], Response],
    ) -> None:
        """open_paths: need no key and serve all pages.  respond: an error as a response."""
        self._app = app
        self._access = access
        self._metrics = metrics
        self._open_paths = open_paths
        self._respond = respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = re.sub("/{2,}", "/", scope["path"]).rstrip("/") or "/"
        scope = {**scope, "path": path, "raw_path": quote(path).encode("ascii")}
        headers = Headers(scope=scope)
        answer = _Reported(send, scope, _request_id(headers), self._metrics)
        try:
            self._check(path, headers, scope)
            await self._app(scope, receive, answer)
        except Disconnected:
            pass
        except Exception as error:
            if answer.status is not None:
                log.error("unexpected error in request %s", answer.request_id, exc_info=error)
                raise
            await self._respond(from_exception(error))(scope, receive, answer)
        finally:
            answer.report()

    def _check(self, path: str, headers: Headers, scope: Scope) -> None:
        server = scope.get("server")
        self._access.check_host(headers, server[0] if server else None)
        if path not in self._open_paths:
            self._access.check_origin(headers)
            self._access.check_key(headers)


class PrivateNetwork:
    """Middleware outside of CORS: lets permitted pages reach a private address from a public one.

    Browsers ask for it in the preflight, which Starlette before 0.51 knows nothing of.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        wanted = b"access-control-request-private-network"
        if scope["type"] != "http" or not any(name == wanted for name, _ in scope["headers"]):
            await self._app(scope, receive, send)
            return
        scope = {**scope, "headers": [pair for pair in scope["headers"] if pair[0] != wanted]}

        async def permit(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] < 300:
                headers = MutableHeaders(raw=message["headers"])
                if "access-control-allow-origin" in headers:
                    headers["access-control-allow-private-network"] = "true"
            await send(message)

        await self._app(scope, receive, permit)


class _Reported:
    """Sends the messages of one response, and reports it: its count, its line in the access log."""

    def __init__(self, send: Send, scope: Scope, request_id: str, metrics: Metrics) -> None:
        self.request_id = request_id
        self.status: int | None = None
        self._send = send
        self._scope = scope
        self._metrics = metrics
        self._started = time.monotonic()

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(raw=message["headers"])[_REQUEST_ID] = self.request_id
            self._metrics.count(self._scope["path"], self.status)
        await self._send(message)

    def report(self) -> None:
        """Neither the query nor a header is logged: they may hold a key."""
        client = self._scope.get("client")
        access_log.info(
            '%s "%s %s" %d %.3f s %s',
            client[0] if client else "-",
            self._scope["method"],
            quote(self._scope["path"])[:200],
            self.status or _CLIENT_CLOSED,
            time.monotonic() - self._started,
            self.request_id,
        )


def _request_id(headers: Headers) -> str:
    """The client's, if it is harmless in a header and a log, else a new one."""
    given = headers.get(_REQUEST_ID, "")
    return given if _PERMITTED_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
