"""Who may use the server: API keys, host names, origins of pages."""

from __future__ import annotations

import hmac
import ipaddress
import re
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from pydiffusion.openai.errors import ApiError

_PORTS = {"http": 80, "https": 443}


def clean_key(text: str, source: str) -> str:
    """An API key without the white space around it, as from a file that ends in a newline.

    source: where it is from, for errors. Raises ValueError for a key that no header can carry.
    """
    key = text.strip()
    if not key:
        raise ValueError(f"{source} is empty: leave it out for a server without a key")
    if re.search(r"[\s\x00-\x1f\x7f]", key):
        raise ValueError(
            f"{source} has white space or a control character inside, which no client can send: give one key"
        )
    return key


def clean_origin(text: str) -> str:
    """An origin as browsers send it: ``https://example.org``, or with a port that is not the scheme's own.

    ``*`` and ``null`` (pages from files) stay. Raises ValueError for anything else.
    """
    given = text.strip()
    if given in ("*", "null"):
        return given
    try:
        parts = urlsplit(given)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"--cors {given!r}: {error}") from None
    if parts.path == given or not parts.scheme or not parts.hostname:
        raise ValueError(
            f"--cors {given!r} is not an origin: give SCHEME://HOST[:PORT], as http://localhost:3000"
        )
    if parts.path.strip("/") or parts.query or parts.fragment or parts.username:
        raise ValueError(
            f"--cors {given!r}: a page's origin has no path, query or user: give"
            f" {parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        )
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    suffix = "" if port is None or port == _PORTS.get(parts.scheme) else f":{port}"
    return f"{parts.scheme}://{host}{suffix}"


def clean_host(text: str) -> str:
    """A host name without port, in lower case; ``*`` stays. Raises ValueError for anything else."""
    name = host_name(text.strip())
    if not name or re.search(r"[\s/@?#]|://", name):
        raise ValueError(f"--allowed-host {text!r} is not a host name: give NAME, as chat.example.org")
    return name


def host_name(header: str) -> str:
    """The name in a Host header, without port and final dot, in lower case."""
    name = re.sub(r":\d*$", "", header.strip()) if not header.endswith("]") else header
    return name.strip("[]").rstrip(".").lower()


def own_names() -> frozenset[str]:
    """Names that this machine has for itself."""
    name = socket.gethostname().lower()
    return frozenset((name, f"{name.partition('.')[0]}.local"))


class Access:
    """Checks requests. Raises ApiError for those that are refused."""

    def __init__(self, api_key: str | None, cors: Iterable[str], allowed_hosts: Iterable[str]) -> None:
        """All cleaned. allowed_hosts: names besides the machine's own."""
        self._key = None if api_key is None else api_key.encode()
        self._origins = frozenset(cors)
        self._allowed_hosts = frozenset(allowed_hosts)
        self._own_names = own_names()

    def check_host(self, headers: Headers, local_address: str | None) -> None:
        """Refuse a name that isn't this server's: a page may have let its own name point here (DNS
        rebinding), so that to a browser the server is the page's own host.

        Only names that --allowed-host gives count where it is given, beside the machine's own. Without it, a
        server is known to be private if the request came in by loopback and needs no key.
        """
        name = host_name(headers.get("host", ""))
        private = self._key is None and _is_loopback(local_address)
        if not name or not (private or self._allowed_hosts) or "*" in self._allowed_hosts:
            return
        if name in self._own_names or name in self._allowed_hosts or name.endswith(".localhost"):
            return
        # Nobody outside can let an address, or a name without a dot, point elsewhere.
        if "." in name and not _is_address(name):
            raise ApiError(
                403,
                f"{name!r} is not a name of this server; --allowed-host would permit it."[:300],
                code="host",
            )

    def check_origin(self, headers: Headers) -> None:
        """Refuse pages of other hosts that --cors doesn't name."""
        origin = headers.get("origin")
        if origin is None or "*" in self._origins or origin in self._origins:
            return
        if origin.partition("://")[2] != headers.get("host", ""):
            raise ApiError(403, f"Pages of {origin} may not use this server (--cors)."[:300], code="origin")

    def check_key(self, headers: Headers) -> None:
        """Refuse requests without the key, ``Authorization: Bearer KEY`` or ``X-Api-Key: KEY``."""
        if self._key is None:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            key = headers.get("x-api-key", "")
        if not hmac.compare_digest(key.strip().encode("latin-1"), self._key):
            raise ApiError(
                401,
                "Incorrect API key provided." if key else "You didn't provide an API key.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def _is_loopback(address: str | None) -> bool:
    try:
        return address is not None and ipaddress.ip_address(address).is_loopback
    except ValueError:  # a Unix socket
        return False


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
