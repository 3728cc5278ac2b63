"""What requests with images may cost a server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from support.seeing_model import SeeingModel, grey_part
from support.server_fakes import ask, script, serving

from pydiffusion.server import http

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
