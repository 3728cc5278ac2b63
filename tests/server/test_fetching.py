"""Images fetched from URLs: from where, how much, for how long. The hosts are on this machine."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from support.seeing_model import png

from pydiffusion.server import fetching
from pydiffusion.server.fetching import Fetcher, is_public

PRIVATE = (
    "127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
    "224.0.0.1", "240.0.0.1", "255.255.255.255", "198.18.0.1", "192.0.0.170",
    "::", "::1", "fe80::1%eth0", "fd00::1", "ff02::1",
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b::7f00:1", "2002:7f00:1::",
    "2001:0:7f00:1::", "::7f00:1", "64:ff9b:1::1",
    # about these Python's versions disagree
    "192.0.0.8", "fec0::1", "feff::1", "64:ff9b:1::7f00:1", "3fff::1", "::ffff:192.0.0.8",
)  # fmt: skip
PUBLIC = (
    "8.8.8.8", "93.184.216.34", "192.0.1.1",
    "2606:4700::1111", "2a00:1450::1", "64:ff9b::808:808", "::ffff:8.8.8.8",
)  # fmt: skip


class Host(http.server.BaseHTTPRequestHandler):
    """Answers as the path says."""

    def do_GET(self) -> None:
        self.server.asked.append((self.path, dict(self.headers)))  # type: ignore[attr-defined]
        kind, _, rest = self.path[1:].partition("/")
        if kind == "to":
            self.send_response(302)
            self.send_header("Location", rest)
            self.end_headers()
        elif kind == "drip":
            self.send_response(200)
            self.end_headers()
            while not self.server.over.wait(0.05):  # type: ignore[attr-defined]
                self.wfile.write(b"x")
        elif kind == "short":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x")
        elif kind == "endless":
            self.send_response(200)
            self.end_headers()
            for _ in range(1000):
                self.wfile.write(b"x" * 10000)
        elif kind == "declared":
            self.send_response(200)
            self.send_header("Content-Length", "99999999")
            self.end_headers()
        elif kind == "image":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(png())
        else:
            self.send_error(404)

    def log_message(self, *_: Any) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """A client that has read enough."""


@pytest.fixture
def host() -> Iterator[Any]:
    server = Server(("127.0.0.1", 0), Host)
    server.asked, server.over = [], threading.Event()  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.over.set()  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()


@pytest.fixture
def url(host: Any) -> str:
    return f"http://127.0.0.1:{host.server_port}"


@pytest.fixture
def permitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine counts as the internet."""
    monkeypatch.setattr(fetching, "is_public", lambda address: address == "127.0.0.1")


def test_private_addresses_are_none_of_the_internet() -> None:
    assert [address for address in PRIVATE if is_public(address)] == []
    assert [address for address in PUBLIC if not is_public(address)] == []


@pytest.mark.parametrize(
    "name", ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "[::ffff:127.0.0.1]"]
)
def test_this_machine_is_not_asked(host: Any, name: str) -> None:
    with pytest.raises(ValueError, match=r"private addresses are not fetched from|can't be found"):
        Fetcher().fetch(f"http://{name}:{host.server_port}/image")
    assert host.asked == []


def test_a_name_with_a_private_address_among_others_is_refused(
    host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, 80)) for a in ("8.8.8.8", "127.0.0.1")]
    monkeypatch.setattr(fetching.socket, "getaddrinfo", lambda *_, **__: entries)
    with pytest.raises(ValueError, match="private addresses"):
        Fetcher().fetch(f"http://example.com:{host.server_port}/image")
    assert host.asked == []


def test_an_image_is_fetched(host: Any, url: str, permitted: None) -> None:
    assert Fetcher().fetch(f"{url}/image/ä?b=%20|c") == png()
    path, headers = host.asked[-1]
    assert path == "/image/%C3%A4?b=%20|c"
    assert headers["Host"] == url.removeprefix("http://")
    assert headers["User-Agent"].startswith("pydiffusion/")


def test_the_address_that_was_checked_is_used(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that has another address the second time gets nowhere: it is looked up once per request."""
    calls = []
    port = int(url.rpartition(":")[2])

    def look_up(name: str, *_: Any, **__: Any) -> Any:
        calls.append(name)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(fetching, "is_public", lambda address: True)
    monkeypatch.setattr(fetching.socket, "getaddrinfo", look_up)
    connected = []
    monkeypatch.setattr(
        fetching.socket, "create_connection", lambda address, timeout: connected.append(address) or _refuse()
    )
    with pytest.raises(ValueError, match="refused"):
        Fetcher().fetch(f"http://rebinding.example:{port}/image")
    assert calls == ["rebinding.example"]
    assert connected == [("127.0.0.1", port)]


def _refuse() -> None:
    raise ConnectionRefusedError("refused")


def test_redirects(host: Any, url: str, permitted: None) -> None:
    assert Fetcher().fetch(f"{url}/to/{url}/to/{url}/to/{url}/image") == png()
    with pytest.raises(ValueError, match="more than 3 redirects"):
        Fetcher().fetch(f"{url}/to/{url}/to/{url}/to/{url}/to/{url}/image")
    assert Fetcher().fetch(f"{url}/to//image".replace("/to//", "/to/../")) == png()


@pytest.mark.parametrize(
    "target",
    [
        "http://192.168.0.1/a",
        "http://[::1]/a",
        "http://169.254.169.254/latest",
        "file:///etc/passwd",
        "ftp://x/a",
    ],
)
def test_a_redirect_to_elsewhere_is_not_followed(url: str, permitted: None, target: str) -> None:
    with pytest.raises(ValueError, match=r"private addresses|permitted are valid ones of http"):
        Fetcher().fetch(f"{url}/to/{target}")


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("none", "it answers 404"),
        ("declared", "it has 99999999 bytes; at most 100000"),
        ("endless", "it has more than 100000 bytes"),
        ("short", "cut off|IncompleteRead"),
    ],
)
def test_bounds_of_size(url: str, permitted: None, path: str, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        Fetcher(max_bytes=100_000).fetch(f"{url}/{path}")


def test_time_is_bounded_for_all_images_together(url: str, permitted: None) -> None:
    """Also for a host that sends a byte now and then: the socket's own time limit begins anew with each."""
    fetcher = Fetcher(seconds=0.3)
    with pytest.raises(ValueError, match="it took too long"):
        fetcher.fetch(f"{url}/drip")
    with pytest.raises(ValueError, match=r"it took too long|busy"):
        fetcher.fetch(f"{url}/image")


def test_a_silent_host_of_tls_is_cut_off(permitted: None) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(ValueError, match="it took too long"),
    ):
        Fetcher(seconds=0.3).fetch(f"https://127.0.0.1:{silent.getsockname()[1]}/")


@pytest.mark.parametrize(
    "url",
    [
        "http://", "https:///a", "http://user:pw@example.com/a", "http://example.com:99999/", "http://example.com:0/",
        "http://a\r\nHost: b/", "http://exämple.com/a", "http://x/" + "a" * 5000, "gopher://x/", "http://[::1",
    ],
)  # fmt: skip
def test_invalid_urls(url: str) -> None:
    with pytest.raises(ValueError, match="the image's URL"):
        Fetcher().fetch(url)
