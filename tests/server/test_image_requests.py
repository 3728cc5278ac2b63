"""Requests with images: what is sent, what comes back, what is refused; a scripted model that reads them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.adapters_by_hand import blank_adapter
from support.seeing_model import SeeingModel, grey_part, image_part, png
from support.server_fakes import ScriptedModel, ask, events, eventually, script, serving

from pydiffusion.openai.errors import ApiError
from pydiffusion.openai.messages import MAX_IMAGES
from pydiffusion.openai.prepared import prepare_chat
from pydiffusion.openai.requests import Terms
from pydiffusion.server.fetching import Fetcher

PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def model() -> SeeingModel:
    return SeeingModel(script, n_ctx=2048)


@pytest.fixture(scope="module")
def url(model: SeeingModel) -> Iterator[str]:
    with serving(model) as (address, _):
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as opened:
        yield opened


def asked(*parts: Any) -> dict[str, Any]:
    return {"messages": ask(list(parts))}


TEXT = {"type": "text", "text": "What is this?"}


def test_an_answer_to_images(client: httpx.Client, model: SeeingModel) -> None:
    body = asked(grey_part(11), TEXT, grey_part(12))
    answer = client.post(PATH, json=body).json()
    assert answer["choices"][0]["message"]["content"] == "Hello, world!"
    prompt = model.chat_prompt(body["messages"])
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len(prompt)
    n_image = sum(placed.image.n_soft_tokens + 2 for placed in prompt.images)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0, "image_tokens": n_image}
    assert usage["total_tokens"] == len(prompt) + usage["completion_tokens"]


def test_without_images_usage_is_as_ever(client: httpx.Client) -> None:
    answer = client.post(PATH, json=asked(TEXT)).json()
    assert set(answer["usage"]["prompt_tokens_details"]) == {"cached_tokens"}


def test_a_second_question_about_an_image_encodes_no_image(client: httpx.Client, model: SeeingModel) -> None:
    body = asked(grey_part(21), TEXT)
    before = model.vision.n_encoded
    first = client.post(PATH, json=body).json()
    assert model.vision.n_encoded == before + 1
    said = first["choices"][0]["message"]["content"]
    more = [*body["messages"], {"role": "assistant", "content": said}, *ask("And the colour?")]
    second = client.post(PATH, json={"messages": more}).json()
    assert model.vision.n_encoded == before + 1
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= second["usage"]["prompt_tokens_details"]["image_tokens"]


def test_an_image_under_other_adapters_is_read_anew_from_its_features() -> None:
    model = SeeingModel(script, n_ctx=2048)
    model.set_lora([(blank_adapter("sums"), 1.0)])
    body = asked(grey_part(31), TEXT)
    with serving(model, n_parallel=1, n_sessions=1) as (url, _):

        def cached(**fields: Any) -> int:
            answer = httpx.post(url + PATH, json=body | fields, timeout=60).json()
            n: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            return n

        n_prompt = len(model.chat_prompt(body["messages"]))
        assert [cached(), cached(), cached(lora=[]), cached(lora=[])] == [0, n_prompt, 0, n_prompt]
        assert model.vision.n_encoded == 1


def test_another_image_is_not_taken_for_the_cached_one(client: httpx.Client) -> None:
    first = client.post(PATH, json=asked(grey_part(31), TEXT)).json()["usage"]
    again = client.post(PATH, json=asked(grey_part(31), TEXT)).json()["usage"]
    other = client.post(PATH, json=asked(grey_part(32), TEXT)).json()["usage"]
    assert again["prompt_tokens_details"]["cached_tokens"] > first["prompt_tokens_details"]["image_tokens"]
    assert other["prompt_tokens_details"]["cached_tokens"] < 10


def test_several_choices_and_a_stream(client: httpx.Client, model: SeeingModel) -> None:
    before = model.vision.n_encoded
    body = asked(grey_part(41), TEXT) | {"n": 3, "stream": True, "stream_options": {"include_usage": True}}
    chunks = events(client.post(PATH, json=body))
    prompt = model.chat_prompt(body["messages"])
    assert chunks[-1]["usage"]["prompt_tokens"] == len(prompt)
    assert {c["index"] for chunk in chunks for c in chunk["choices"]} == {0, 1, 2}
    assert model.vision.n_encoded == before + 1


def test_openai_s_client(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    answer = client.chat.completions.create(
        model="scripted", messages=asked(grey_part(detail="low"), TEXT)["messages"]
    )
    assert answer.choices[0].message.content == "Hello, world!"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens < 100
    assert client.models.list().data[0].vision is True  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("part", "what"),
    [
        ({"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}, "--allow-image-urls"),
        ({"type": "image_url", "image_url": {"url": "/etc/passwd"}}, "give a data URL"),
        ({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}, "give a data URL"),
        ({"type": "image", "path": "/etc/passwd"}, "give a data URL"),
        ({"type": "image", "image": "/etc/passwd"}, "give a data URL"),
        ({"type": "image", "image": [[1, 2], [3, 4]]}, "image is a list"),
        ({"type": "image", "url": {"a": 1}}, "url is a dict"),
        ({"type": "image_url", "image_url": None}, "must have image_url"),
        (image_part(png()[:50]), "damaged or truncated"),
        (image_part(b"<svg/>", "image/svg+xml"), "not an image in a known"),
        (image_part(b"%PDF", "application/pdf"), "not an image"),
        (grey_part(detail="ultra"), "permitted are auto, low, high, original"),
        ({**grey_part(), "max_soft_tokens": -70}, "max_soft_tokens is -70"),
    ],
)
def test_an_image_that_can_t_be_read(client: httpx.Client, part: dict[str, Any], what: str) -> None:
    answer = client.post(PATH, json=asked(TEXT, part))
    error = answer.json()["error"]
    assert answer.status_code == 400, answer.text
    assert what in error["message"]
    assert error["param"] == "messages[0].content[1]"
    assert error["type"] == "invalid_request_error"


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-300, 300) | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
_URLS = st.sampled_from(
    ("data:", "data:,", "data:image/png;base64,", "http://", "/a", "data:image/png;base64,aGk=")
)
_VALUES = (
    _JSON
    | _URLS
    | _URLS.map(lambda url: {"url": url})
    | st.fixed_dictionaries({"url": _JSON, "detail": _JSON})
)
_OPTIONS = {"detail": _JSON, "max_soft_tokens": _JSON}
_PARTS = st.one_of(
    st.fixed_dictionaries({"type": st.just("image")}, optional={"url": _VALUES, "path": _VALUES} | _OPTIONS),
    st.fixed_dictionaries({"type": st.just("image")}, optional={"base64": _VALUES, "image": _VALUES}),
    st.fixed_dictionaries({"type": st.sampled_from(("image_url", "input_image")), "image_url": _VALUES}),
    st.fixed_dictionaries({"type": st.just("image_url"), "image_url": _URLS, **_OPTIONS}),
    st.fixed_dictionaries({"type": _JSON}, optional={"text": _JSON}),
)


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(_PARTS, min_size=1, max_size=2))
def test_whatever_is_sent_as_a_part_is_answered_or_refused(parts: list[Any], model: SeeingModel) -> None:
    try:
        prepare_chat(asked(*parts), model, Terms(("scripted",)))
    except ApiError as error:
        assert error.status == 400
        assert error.param is not None and error.param.startswith("messages")
        assert len(error.message) < 600


def test_other_kinds_of_parts_are_refused(client: httpx.Client) -> None:
    for kind in ("input_audio", "video_url", "file"):
        error = client.post(PATH, json=asked({"type": kind, kind: {}})).json()["error"]
        assert error["message"].endswith("this server reads text and images")
    error = client.post(PATH, json={"messages": [{**ask("Hi")[0], "images": ["aGk="]}]}).json()["error"]
    assert error["param"] == "messages[0].images"


def test_too_many_images(client: httpx.Client) -> None:
    answer = client.post(PATH, json=asked(*[grey_part(i) for i in range(MAX_IMAGES + 1)]))
    assert answer.status_code == 400
    assert f"have {MAX_IMAGES + 1} images, permitted are {MAX_IMAGES}" in answer.json()["error"]["message"]
    answer = client.post(
        PATH, json=asked(*[grey_part(i, detail="original") for i in range(MAX_IMAGES // 4 + 1)])
    )
    assert "of those with more detail fewer" in answer.json()["error"]["message"]
    answer = client.post(PATH, json=asked(*[grey_part(i) for i in range(10)]))
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_the_memory_of_waiting_images_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SeeingModel(script, n_ctx=2048)
    model.step_seconds = 0.05
    monkeypatch.setattr("pydiffusion.server.scheduler._MAX_IMAGE_BYTES", 1)
    with (
        serving(model, n_parallel=1, n_sessions=1) as (address, server),
        httpx.Client(base_url=address, timeout=60) as client,
        ThreadPoolExecutor(2) as threads,
    ):
        long = {"messages": ask("long"), "max_tokens": 1000}
        threads.submit(client.post, PATH, json=long)
        eventually(lambda: server.scheduler.n_active == 1)
        waiting = threads.submit(client.post, PATH, json=asked(grey_part()))
        eventually(lambda: server.scheduler.n_waiting == 1)
        answer = client.post(PATH, json=asked(grey_part()))
        assert answer.status_code == 429
        assert answer.headers["retry-after"]
        model.step_seconds = 0
        assert waiting.result().status_code == 200


def test_an_image_token_without_an_image(client: httpx.Client, model: SeeingModel) -> None:
    token = model.native.image_tokens["image"]
    for prompt, more in (([2, token, 5], {}), ("a<|image|>b", {"special": True})):
        answer = client.post("/v1/completions", json={"prompt": prompt, **more})
        assert answer.status_code == 400
        assert f"has the image token, {token}, at " in answer.json()["error"]["message"]
    assert client.post("/v1/completions", json={"prompt": "a<|image|>b"}).status_code == 200


def test_a_body_with_photographs(client: httpx.Client) -> None:
    """Larger than what a model of texts takes, within what one of images does."""
    body = asked(grey_part()) | {"metadata": {"note": " " * (9 << 20)}}
    assert client.post(PATH, json=body).status_code == 200
    answer = client.post(PATH, content=b" " * ((32 << 20) + 1))
    assert answer.status_code == 413
    assert "33554432 bytes" in answer.json()["error"]["message"]


def test_a_model_without_vision() -> None:
    with serving(ScriptedModel(script)) as (address, _), httpx.Client(base_url=address) as client:
        assert client.get("/v1/models").json()["data"][0]["vision"] is False
        answer = client.post(PATH, json=asked(grey_part(), TEXT))
        assert answer.status_code == 400
        assert "without a vision file" in answer.json()["error"]["message"]
        answer = client.post(PATH, content=b" " * ((8 << 20) + 1))
        assert answer.status_code == 413


def test_images_are_fetched_where_that_is_permitted(
    model: SeeingModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = []

    def fetch(self: Fetcher, url: str) -> bytes:
        wanted.append((id(self), url))
        if "none" in url:
            raise ValueError("it answers 404")
        return png(51)

    monkeypatch.setattr(Fetcher, "fetch", fetch)
    remote = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    with (
        serving(model, fetch_images=True) as (address, _),
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        answer = client.post(PATH, json=asked(remote, {"type": "image", "url": "HTTP://example.com/b"}, TEXT))
        assert answer.status_code == 200, answer.text
        assert [url for _, url in wanted] == ["https://example.com/a.png", "HTTP://example.com/b"]
        assert len({fetcher for fetcher, _ in wanted}) == 1, "one limit of time for a request"
        remote = {"type": "image_url", "image_url": {"url": "https://example.com/none"}}
        error = client.post(PATH, json=asked(TEXT, remote)).json()["error"]
        assert error["message"] == "messages[0].content[1]: it answers 404"
        error = client.post(PATH, json=asked({"type": "image", "path": "/etc/passwd"})).json()["error"]
        assert "give a data URL" in error["message"]
        n = len(wanted)
        client.post(PATH, json=asked(remote, TEXT) | {"temperature": -1})
        assert len(wanted) == n, "nothing is fetched for a request that is refused anyway"
