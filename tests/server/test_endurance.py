"""A server process under load: disconnects, malformed bodies, memory over many requests."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from support.server_process import process

pytestmark = pytest.mark.slow


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[int, str]]:
    from pydiffusion.convert import convert
    from pydiffusion.demo import checkpoint_path

    convert(checkpoint_path(), tmp_path / "demo.gguf", "q8_0")
    options = ("--threads", "2", "--ctx", "512", "--queue", "200", "--parallel", "4")
    with process(tmp_path / "demo.gguf", *options) as (running, url):
        drain = threading.Thread(target=running.stderr.read, daemon=True)  # type: ignore[union-attr]
        drain.start()
        yield running.pid, url


def resident(pid: int) -> int:
    """Resident memory of a process, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return 1024 * int(found[1])


BROKEN = [
    (b"{", 400), (b"[]", 400), (b"\xff\xfe", 400), (b'{"messages": 3}', 400), (b"", 400),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400),
    (b'{"messages": [{"role": "user", "content": "x"}], "seed": "y"}', 400),
    (b'{"messages": [{"role": "user", "content": "x"}], "max_token": 3}', 400),
    (b'{"messages": [{"role": "user", "content": "' + b"word " * 4000 + b'"}]}', 400),
    (b'{"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_schema",'
     b' "json_schema": {"schema": {"enum": []}}}}', 400),
]  # fmt: skip


def test_fifty_clients_with_disconnects_and_invalid_bodies(
    server: tuple[int, str], report: Callable[[str], None]
) -> None:
    _, url = server
    chat = url + "/v1/chat/completions"

    def body(i: int) -> dict[str, object]:
        question = [{"role": "user", "content": f"reverse: a b {i}"}]
        return {"messages": question, "max_tokens": 48, "seed": i, "steps": 8}

    def stays(i: int) -> int:
        return httpx.post(chat, json=body(i), timeout=300).status_code

    def leaves(i: int) -> None:
        with httpx.stream("POST", chat, json={**body(i), "stream": True}, timeout=300) as stream:
            next(stream.iter_raw())

    def sends_nonsense(i: int) -> tuple[int, int]:
        content, expected = BROKEN[i]
        answer = httpx.post(chat, content=content, headers={"content-type": "application/json"}, timeout=300)
        assert answer.json()["error"]["message"].strip(), "one sentence of why"
        return answer.status_code, expected

    started = time.monotonic()
    with ThreadPoolExecutor(60) as pool:
        staying = [pool.submit(stays, i) for i in range(33)]
        leaving = [pool.submit(leaves, i) for i in range(17)]
        broken = [pool.submit(sends_nonsense, i) for i in range(10)]
        assert [future.result() for future in staying] == [200] * 33
        for future in leaving:
            future.result()
        for future in broken:
            status, expected = future.result()
            assert status == expected
    report(f"server: 50 clients and 10 broken bodies in {time.monotonic() - started:.1f} s")
    end = time.monotonic() + 30
    while (health := httpx.get(url + "/health").json())["active"] + health["waiting"] > 0:
        assert time.monotonic() < end, health
        time.sleep(0.1)


def test_memory_is_flat_over_a_thousand_requests(
    server: tuple[int, str], report: Callable[[str], None]
) -> None:
    pid, url = server
    with httpx.Client(base_url=url, timeout=300) as client:

        def ask(i: int) -> None:
            if i % 50 == 7:
                client.post("/v1/chat/completions", content=b"{")
                return
            more = {"regex": "[ab]{3}"} if i % 10 == 3 else {}
            question = [{"role": "user", "content": f"sort: {i % 7} {i}"}]
            body = {"messages": question, "max_tokens": 8, "steps": 1, "seed": i, **more}
            assert client.post("/v1/chat/completions", json=body).status_code == 200

        for i in range(200):  # caches and pools fill
            ask(i)
        before = resident(pid)
        for i in range(200, 1200):
            ask(i)
        after = resident(pid)
    report(f"server: {before / 1e6:.1f} MB after 200 requests, {after / 1e6:.1f} MB after 1,200")
    assert after < 1.05 * before


def test_generation_stops_within_a_step_of_a_disconnect(
    server: tuple[int, str], report: Callable[[str], None]
) -> None:
    """Steps that the metrics count after the client has disconnected."""
    _, url = server
    body = {
        "messages": [{"role": "user", "content": "x"}], "stream": True, "confidence_threshold": 0,
        "stream_options": {"diffusion": True}, "steps": 5000, "seed": 1,
    }  # fmt: skip

    def steps() -> int:
        found = re.search(r"^pydiffusion_\w*steps\w* (\d+)", httpx.get(url + "/metrics").text, re.MULTILINE)
        assert found is not None
        return int(found[1])

    beyond = []
    for _ in range(5):
        before, seen = steps(), 0
        with httpx.stream("POST", url + "/v1/chat/completions", json=body, timeout=300) as stream:
            for line in stream.iter_lines():
                seen += '"draft"' in line
                if seen >= 20:
                    break
        left = time.monotonic()
        while httpx.get(url + "/health").json()["active"]:
            time.sleep(0.001)
        gone = time.monotonic() - left
        beyond.append((steps() - before - seen, gone))
    report(f"server: (steps that the client did not see, seconds until idle): {beyond}")
    assert min(unseen for unseen, _ in beyond) <= 1 and min(gone for _, gone in beyond) < 0.5
