"""Access to the server and how requests are written: keys, hosts, origins, methods, slashes, ids."""

from __future__ import annotations

import logging
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from starlette.datastructures import Headers
from support.server_fakes import CHAT, ScriptedModel, ask, script, serving

from pydiffusion.openai.errors import ApiError
from pydiffusion.server.access import Access
from pydiffusion.server.app import HEALTH_PATHS, READY_PATHS, Settings


@pytest.fixture(scope="module")
def model() -> ScriptedModel:
    return ScriptedModel(script)


@pytest.fixture(scope="module")
def url(model: ScriptedModel) -> Iterator[str]:
    with serving(model) as (address, _):
        yield address


def raw(url: str, head: str) -> tuple[int, bytes]:
    """Status and body of a request as it goes over the wire."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as line:
        line.sendall(f"{head}\r\nConnection: close\r\n\r\n".encode())
        reply = b"".join(iter(lambda: line.recv(65536), b""))
    first, _, body = reply.partition(b"\r\n\r\n")
    return int(first.split()[1]), body


# Methods and paths


@pytest.mark.parametrize(
    "path", ["/", "/health", "/v1/models", "/v1/models/scripted", "/lora-adapters", "/metrics", *READY_PATHS]
)
def test_head_is_get_without_a_body(url: str, path: str) -> None:
    got, had = httpx.get(url + path), httpx.head(url + path)
    assert had.status_code == got.status_code == 200
    assert had.headers["content-type"] == got.headers["content-type"] and "content-length" in had.headers
    assert raw(url, f"HEAD {path} HTTP/1.1\r\nHost: localhost") == (200, b"")


def test_slashes(url: str) -> None:
    for path in ("/v1/models/", "//v1//models", "/v1/models//"):
        assert httpx.get(url + path).json()["object"] == "list", path
    for base in ("/v1/", "//v1", "/v1//"):
        client = openai.OpenAI(base_url=url + base, api_key="x", max_retries=0)
        assert client.chat.completions.create(model="x", messages=ask("Hi")).choices[0].message.content
    assert httpx.get(url + "/v1/models/scripted/").json()["id"] == "scripted"


def test_a_path_that_is_nearly_right_gets_a_hint(url: str) -> None:
    for path in ("/chat/completions", "/v1/v1/chat/completions", "/v1/chat/completion"):
        answer = httpx.post(url + path, json=CHAT)
        assert answer.status_code == 404
        assert answer.json()["error"]["message"].endswith("did you mean /v1/chat/completions?")
    assert "did you mean" not in httpx.get(url + "/favicon.ico").text
    for path in ("/api/chat", "/v1/messages"):  # of Ollama, Anthropic
        assert "not served here" in httpx.post(url + path, json={}).json()["error"]["message"]


def test_options_without_cors(url: str) -> None:
    for path, *methods in (
        ("/v1/chat/completions", "POST"), ("/v1/models", "GET"), ("/lora-adapters", "GET", "POST"),
    ):  # fmt: skip
        answer = httpx.options(url + path)
        assert answer.status_code == 204
        assert {*methods, "OPTIONS"} <= set(answer.headers["allow"].split(", "))
    assert httpx.options(url + "/nothing").status_code == 404
    assert httpx.delete(url + "/v1/models").status_code == 405


def test_health_needs_no_key(model: ScriptedModel) -> None:
    with serving(model, api_key="secret") as (address, server), httpx.Client(base_url=address) as client:
        for path in (*HEALTH_PATHS, *READY_PATHS):
            answer = client.get(path)
            assert answer.status_code == 200 and answer.json()["status"] == "ok"
        server.scheduler.begin_shutdown()
        for path in (*HEALTH_PATHS, *READY_PATHS):
            assert client.get(path).status_code == (503 if path in READY_PATHS else 200)


# Keys


def test_white_space_around_the_key_is_not_part_of_it(model: ScriptedModel) -> None:
    assert {Settings(api_key=key).api_key for key in ("secret\n", " secret ", "secret\r\n")} == {"secret"}
    with serving(model, api_key="secret\n") as (address, _):
        for headers, status in (
            ({"Authorization": "Bearer secret"}, 200),
            ({"Authorization": "bearer  secret"}, 200),
            ({"X-Api-Key": "secret"}, 200),
            ({"X-Api-Key": "other"}, 401),
            ({"Authorization": "Bearer other", "X-Api-Key": "secret"}, 401),
            ({}, 401),
        ):
            assert httpx.get(address + "/v1/models", headers=headers).status_code == status, headers


@pytest.mark.parametrize("key", ["", " \n", "one\ntwo", "one two", "one\x00"])
def test_a_key_that_no_client_can_send_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="API key"):
        Settings(api_key=key)


# Host names


def host(access: Access, name: str, local: str | None = "127.0.0.1") -> int:
    try:
        access.check_host(Headers({"host": name}), local)
    except ApiError as error:
        assert error.code == "host" and "--allowed-host" in error.message
        return error.status
    return 200


def test_a_page_that_lets_its_name_point_here_is_refused(url: str) -> None:
    port = url.rpartition(":")[2]
    client = httpx.Client(base_url=url)
    for name, status in (
        ("evil.example", 403),
        (f"evil.example:{port}", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1%.evil.example", 403),
        (f"localhost:{port}", 200),
        (f"LOCALHOST.:{port}", 200),
        (f"127.0.0.1:{port}", 200),
        (f"[::1]:{port}", 200),
        ("chat.localhost", 200),
        (socket.gethostname(), 200),
        ("ollama:11434", 200),  # zylon-ai/private-gpt#2066: a name in a container's network
        ("192.168.1.5:8080", 200),
    ):
        for path in ("/v1/models", "/health", "/"):
            answer = client.get(path, headers={"Host": name, "Origin": f"http://{name}"})
            assert answer.status_code == status, (name, path)
    client.close()
    assert raw(url, "GET /health HTTP/1.0")[0] == 200, "no browser leaves Host out"


def test_which_servers_check_the_host() -> None:
    private, keyed = Access(None, (), ()), Access("key", (), ())
    assert host(private, "evil.example") == 403
    assert host(private, "evil.example", "::1") == 403
    assert host(private, "fe80::1") == host(private, "[fe80::1]:80") == 200
    assert host(private, "chat.lan", "192.168.1.5") == 200, "an address that others reach"
    assert host(keyed, "chat.example") == 200, "a page can't know the key"
    named = Access("key", (), ("chat.example",))
    assert [host(named, name) for name in ("chat.example:80", "localhost", "other.example")] == [
        200,
        200,
        403,
    ]
    assert host(Access(None, (), ("*",)), "evil.example") == 200


@pytest.mark.parametrize("name", ["", "http://x", "x/y", "a b"])
def test_what_is_no_host_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="--allowed-host"):
        Settings(allowed_hosts=(name,))


# Pages


@pytest.mark.parametrize(
    ("given", "origin"),
    [
        ("http://app.example", "http://app.example"),
        ("http://app.example/", "http://app.example"),
        (" HTTPS://App.Example:443 ", "https://app.example"),
        ("http://localhost:3000/", "http://localhost:3000"),
        ("http://[::1]:3000", "http://[::1]:3000"),
        ("chrome-extension://abcdef", "chrome-extension://abcdef"),
        ("null", "null"),
        ("*", "*"),
    ],
)
def test_origins_as_browsers_send_them(given: str, origin: str) -> None:
    assert Settings(cors=(given,)).cors == (origin,)


@pytest.mark.parametrize(
    "given",
    [
        "app.example",
        "localhost:3000",
        "http://x/page",
        "http://",
        "",
        "http://x?y",
        "http://x:y",
        "http://u@x",
    ],
)
def test_what_is_no_origin_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match="--cors"):
        Settings(cors=(given,))


def preflight(url: str, origin: str, **more: str) -> httpx.Response:
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST", **more}
    return httpx.options(url + "/v1/chat/completions", headers=headers)


def test_pages_reach_a_private_address_with_cors_only(model: ScriptedModel, url: str) -> None:
    private = {"Access-Control-Request-Private-Network": "true"}
    granted = "access-control-allow-private-network"
    with serving(model, cors=("https://good.example/",), api_key="secret") as (address, _):
        good = preflight(address, "https://good.example", **private)
        assert good.status_code == 200 and good.headers[granted] == "true"
        assert good.headers["access-control-allow-origin"] == "https://good.example"
        assert granted not in preflight(address, "https://good.example").headers
        bad = preflight(address, "https://bad.example", **private)
        assert bad.status_code == 400 and granted not in bad.headers
        refused = httpx.get(address + "/v1/models", headers={"Origin": "https://good.example"})
        assert refused.status_code == 401, "the page can read why"
        assert refused.headers["access-control-allow-origin"] == "https://good.example"
    without = preflight(url, "https://good.example", **private)
    assert without.status_code == 403 and granted not in without.headers


# Request ids and the access log


def test_request_ids(url: str) -> None:
    made = [httpx.get(url + path).headers["x-request-id"] for path in ("/health", "/health", "/nothing")]
    assert len(set(made)) == 3 and all(re.fullmatch(r"req_[0-9a-f]{32}", one) for one in made)
    for given, kept in (("abc-1", True), ("a b", False), ("x" * 500, False)):
        answer = httpx.get(url + "/health", headers={"X-Request-Id": given})
        assert (answer.headers["x-request-id"] == given) == kept
    client = openai.OpenAI(base_url=url + "/v1", api_key="x", max_retries=0)
    assert client.chat.completions.create(model="x", messages=ask("Hi"))._request_id.startswith("req_")
    stream = httpx.post(url + "/v1/chat/completions", json={**CHAT, "stream": True}, timeout=60)
    assert stream.headers["x-request-id"].startswith("req_")


def access_lines(caplog: pytest.LogCaptureFixture, *ids: str) -> list[str]:
    """Of these requests: the server of a test before may still write one of its own."""
    lines = [r.getMessage() for r in caplog.records if r.name == "pydiffusion.server.access"]
    return sorted((line for line in lines if line.endswith(ids)), key=lambda line: line.rpartition(" ")[2])


def test_the_access_log_has_a_line_per_request_and_no_secret(
    model: ScriptedModel, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "pydiffusion.server"), serving(model, api_key="sesame") as (url, _):
        headers = {"Authorization": "Bearer sesame", "X-Request-Id": "id-7"}
        body: dict[str, Any] = {"messages": ask("A private matter"), "stream": True}
        httpx.post(url + "/v1/chat/completions?key=sesame", json=body, headers=headers, timeout=60)
        httpx.get(url + "/v1/models%0AINFO forged", headers={"X-Request-Id": "id-8"})
        # A line is written after its response has been sent.
        deadline = time.monotonic() + 60
        while len(lines := access_lines(caplog, "id-7", "id-8")) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert len(lines) == 2
    assert re.fullmatch(r'127\.0\.0\.1 "POST /v1/chat/completions" 200 \d+\.\d{3} s id-7', lines[0])
    assert re.fullmatch(r'127\.0\.0\.1 "GET /v1/models%0AINFO%20forged" 401 \d+\.\d{3} s id-8', lines[1])
    assert not re.search("sesame|private", caplog.text)
