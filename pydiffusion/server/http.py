"""HTTP helpers: size-limited JSON bodies, client disconnects, server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable
from typing import Any, NoReturn, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pydiffusion.openai.errors import ApiError, invalid

T = TypeVar("T")

KEEP_ALIVE_SECONDS = 15.0


class Disconnected(Exception):
    """The client has disconnected."""


# Of a body, by its brackets and commas, of which base64 has none: parsing holds up everything else.
_MAX_VALUES = 4_000_000


async def read_json(request: Request, max_bytes: int) -> Any:
    """Read the body as JSON. Raises ApiError if it is too large or invalid, Disconnected."""
    too_large = ApiError(
        413, f"The body is larger than the {max_bytes} bytes that this server takes.", code="body_too_large"
    )
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > max_bytes:
                raise too_large
    except ClientDisconnect:
        raise Disconnected from None
    if sum(map(body.count, (b"[", b"{", b","))) > _MAX_VALUES:
        raise ApiError(413, "The body has more values than this server takes.", code="body_too_large")
    try:
        return json.loads(body.decode("utf-8-sig"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise invalid(f"The body is not valid UTF-8 at byte {error.start}.") from None
    except RecursionError:
        raise invalid("The body is nested too deeply.") from None
    except ValueError as error:
        raise invalid(f"The body is not valid JSON: {error}"[:200]) from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


async def unless_disconnected(receive: Receive, work: Awaitable[T]) -> T:
    """Await the work; cancel it and raise Disconnected if the client leaves first."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Disconnected
        return task.result()
    finally:
        for pending in (task, watcher):
            pending.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events; unlike a plain streaming response, notices a disconnect immediately."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[dict[str, Any] | None]) -> None:
        """events: objects to send as data; None sends a comment that keeps the connection open."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        with contextlib.suppress(Disconnected, OSError):
            await unless_disconnected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        async with contextlib.aclosing(self._events) as events:  # type: ignore[type-var]
            async for event in events:
                line = b": waiting" if event is None else b"data: " + to_json(event)
                await send({"type": "http.response.body", "body": line + b"\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


def to_json(value: Any) -> bytes:
    """Serialize to one line of JSON."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")
