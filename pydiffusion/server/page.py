"""The web page at ``/``: the files in ``static``, which load nothing from other hosts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI
from starlette.responses import Response

_FOLDER = Path(__file__).parent / "static"
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/heatmap.js": ("heatmap.js", "text/javascript; charset=utf-8"),
    "/images.js": ("images.js", "text/javascript; charset=utf-8"),
}
PAGE_PATHS = tuple(_FILES)
_HEADERS = {
    # Nothing from other hosts, nothing inline; the page's icon and the images are data URLs.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
    " img-src data:; form-action 'none'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI, max_body: int) -> None:
    """Serve the page.

    max_body: bytes of the largest request body, which the page is told: a server that answers before it has
    read all of a body closes the connection, and browsers then show no answer.
    """
    for path, (name, media_type) in _FILES.items():
        content = (_FOLDER / name).read_bytes().replace(b"MAX_BODY", b"%d" % max_body)
        app.add_api_route(path, _endpoint(content, media_type), methods=["GET", "HEAD"])


def _endpoint(content: bytes, media_type: str) -> Callable[[], Awaitable[Response]]:
    async def page() -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)

    return page
