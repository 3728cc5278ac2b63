"""What requests with images may cost a server, and where it may fetch them from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from support.seeing_model import SeeingModel, grey_part
from support.server_fakes import ask, script, serving

from pydiffusion.server import http
from pydiffusion.server.fetching import is_public

PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def model() -> SeeingModel:
    return SeeingModel(script, n_ctx=2048)


@pytest.fixture(scope="module")
def client(model: SeeingModel) -> Iterator[httpx.Client]:
    with serving(model) as (address, _), httpx.Client(base_url=address, timeout=60) as opened:
        yield opened


def test_a_body_of_very_many_values(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its size alone, which is for images, would let it stop the server for seconds."""
    monkeypatch.setattr(http, "_MAX_VALUES", 1000)
    answer = client.post(PATH, content=b'{"messages": [' + b"[]," * 1000 + b"[]]}")
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"
    assert client.post(PATH, json={"messages": ask([grey_part(1)])}).status_code == 200


def test_no_memory_for_an_image(
    client: httpx.Client, model: SeeingModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow raises Python's own error."""

    def prepare(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(model.vision, "prepare", prepare)
    answer = client.post(PATH, json={"messages": ask([grey_part(2)])})
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "insufficient_memory"


def test_addresses_that_python_s_versions_disagree_about() -> None:
    for address in ("192.0.0.8", "fec0::1", "feff::1", "64:ff9b:1::7f00:1", "3fff::1", "::ffff:192.0.0.8"):
        assert not is_public(address), address
    assert is_public("192.0.1.1") and is_public("2a00:1450::1")
