"""Fetch the images that requests name by URLs: from public addresses only, bounded in size and time."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from pydiffusion._util.version import __version__

MAX_BYTES = 20 << 20
MAX_SECONDS = 15.0  # of all images of a request
MAX_REDIRECTS = 3
_MAX_URL = 4096  # characters
_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_PIECE = 1 << 16
_SLOTS = threading.BoundedSemaphore(4)  # fetches at a time, so that slow hosts don't take all threads
_CONTROL = re.compile(r"[\x00-\x20\x7f]")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# That some versions of Python take for addresses of the internet: protocols, site-local ones, documentation.
_NOT_PUBLIC = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "fec0::/10", "64:ff9b:1::/48", "3fff::/20")))


class Fetcher:
    """Fetches the images of one request. Host names are looked up once, and the connection goes to an address
    that was checked, also after a redirect; proxies of the environment are not used.
    """

    def __init__(self, seconds: float = MAX_SECONDS, max_bytes: int = MAX_BYTES) -> None:
        self._seconds = seconds
        self._max_bytes = max_bytes
        self._end: float | None = None

    def fetch(self, url: str) -> bytes:
        """The bytes at an http(s) URL. Raises ValueError, saying why it can't."""
        if self._end is None:
            self._end = time.monotonic() + self._seconds
        if not _SLOTS.acquire(timeout=max(0.0, self._end - time.monotonic())):
            raise ValueError("the image can't be fetched: this server is busy with others")
        try:
            return self._follow(url)
        finally:
            _SLOTS.release()

    def _follow(self, url: str) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            parts = _checked(url)
            shown = f"{parts.scheme}://{parts.netloc}"
            try:
                found = self._get(parts)
            except (OSError, http.client.HTTPException) as error:
                what = "it took too long" if self._left() <= 0 else str(error) or type(error).__name__
                raise ValueError(f"the image can't be fetched from {shown}: {what}"[:300]) from None
            if isinstance(found, bytes):
                return found
            url = urljoin(url, found)
        raise ValueError(f"the image can't be fetched from {shown}: more than {MAX_REDIRECTS} redirects")

    def _left(self) -> float:
        assert self._end is not None
        return self._end - time.monotonic()

    def _get(self, parts: SplitResult) -> bytes | str:
        """The bytes, or where the answer says they are."""
        host, port = parts.hostname or "", parts.port or _PORTS[parts.scheme]
        connection = http.client.HTTPConnection(host, port)
        opened = self._connect(host, port)
        # What a host sends by drops is cut off too, also while TLS is being negotiated. The connection itself
        # forgets its socket once the answer begins.
        used = [opened]
        alarm = threading.Timer(max(0.0, self._left()), lambda: _cut_off(used[-1]))
        alarm.daemon = True
        alarm.start()
        try:
            if parts.scheme == "https":
                context = ssl.create_default_context()
                tls = context.wrap_socket(opened, server_hostname=host, do_handshake_on_connect=False)
                used.append(tls)
                tls.do_handshake()
            connection.sock = used[-1]
            return self._request(connection, parts)
        finally:
            alarm.cancel()
            connection.close()
            used[-1].close()

    def _connect(self, host: str, port: int) -> socket.socket:
        failed: OSError = OSError(f"{host} has no address")
        for address in _public_addresses(host, port, self._left()):
            try:
                return socket.create_connection((address, port), timeout=max(0.1, self._left()))
            except OSError as error:
                failed = error
        raise failed

    def _request(self, connection: http.client.HTTPConnection, parts: SplitResult) -> bytes | str:
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = {
            "Host": parts.netloc,
            "User-Agent": f"pydiffusion/{__version__}",
            "Accept": "image/*",
            "Accept-Encoding": "identity",
        }
        connection.request("GET", quote(target, safe="/%:@!$&'()*+,;=~?[]|"), headers=headers)
        answer = connection.getresponse()
        if answer.status in _REDIRECTS and answer.headers.get("location"):
            return answer.headers["location"]
        if answer.status != 200:
            raise OSError(f"it answers {answer.status} {answer.reason}"[:100])
        declared = answer.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > self._max_bytes:
            raise OSError(f"it has {declared} bytes; at most {self._max_bytes} are read"[:200])
        return self._read(answer)

    def _read(self, answer: http.client.HTTPResponse) -> bytes:
        body = bytearray()
        while piece := answer.read1(_PIECE):
            body += piece
            if len(body) > self._max_bytes:
                raise OSError(f"it has more than {self._max_bytes} bytes")
        if self._left() <= 0 or answer.length:
            raise OSError("it was cut off")
        return bytes(body)


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet: not of this machine, a private network, or a protocol."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip in _NAT64:
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        elif ip.sixtofour is not None or ip.teredo is not None:
            return False  # tunnels to an IPv4 address of anybody's choice
    if any(ip in network for network in _NOT_PUBLIC):
        return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


def _public_addresses(host: str, port: int, seconds: float) -> list[str]:
    """The addresses of a host. Raises OSError if there are none, or any of them is not public."""
    found: list[str] = []
    failed: list[OSError] = []

    def look_up() -> None:
        try:
            entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found.extend(dict.fromkeys(str(entry[4][0]) for entry in entries))
        except UnicodeError:
            failed.append(OSError(f"{host!r} is no host name"))
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=look_up, daemon=True)  # the system's own limit is longer
    thread.start()
    thread.join(max(0.0, seconds))
    addresses = found.copy()
    if failed or not addresses:
        raise OSError(f"{host} can't be found")
    if not all(map(is_public, addresses)):
        raise OSError(f"{host} is not on the internet; private addresses are not fetched from")
    return addresses


def _checked(url: str) -> SplitResult:
    """The parts of a URL that may be fetched. Raises ValueError for any other."""
    if len(url) > _MAX_URL:
        raise ValueError(f"the image's URL has {len(url)} characters; permitted are {_MAX_URL}")
    try:
        parts = urlsplit(url)
        valid = parts.scheme in _PORTS and bool(parts.hostname) and parts.port != 0 and parts.netloc.isascii()
    except ValueError:
        valid = False
    if not valid or _CONTROL.search(url):
        raise ValueError(f"the image's URL is {url[:80]!r}; permitted are valid ones of http and https")
    if parts.username is not None or parts.password is not None:
        raise ValueError("the image's URL has a user name, which is not sent: leave it out")
    return parts


def _cut_off(opened: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is closed
        opened.shutdown(socket.SHUT_RDWR)
