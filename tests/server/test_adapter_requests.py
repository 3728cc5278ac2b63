"""Requests with adapters: each gets what the library gives with them, alone or beside others in a batch."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from support.adapter_folders import write_random_gguf
from support.server_fakes import ask, eventually, serving
from support.server_process import process

from pydiffusion import DiffusionModel, _native
from pydiffusion.openai.batch.answering import Defaults, answer_lines
from pydiffusion.openai.batch.lines import read_lines

NAMES = ("first", "second", "third", "fourth")
TEXT = {"prompt": "the river runs", "seed": 5, "steps": 4, "max_tokens": 24}


@pytest.fixture(scope="module")
def adapters(gguf_file: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    file = gguf_file("small")
    return [write_random_gguf(folder / f"{name}.gguf", file, i) for i, name in enumerate(NAMES)]


@pytest.fixture(scope="module")
def model(gguf_file: Callable[..., Path], adapters: list[Path]) -> Iterator[DiffusionModel]:
    """With four adapters, of which the first is on."""
    lora = [(path, float(i == 0)) for i, path in enumerate(adapters)]
    with DiffusionModel(gguf_file("small"), n_threads=1, n_ctx=512, lora=lora) as opened:
        yield opened


@pytest.fixture(scope="module")
def url(model: DiffusionModel) -> Iterator[str]:
    with serving(model) as (address, _):  # type: ignore[arg-type]
        yield address


@pytest.fixture(scope="module")
def alone(model: DiffusionModel, adapters: list[Path]) -> dict[str, str]:
    """What the library gives, by adapter; of no adapter by an empty name."""
    lora = {"": [], **{name: [(path, 1.0)] for name, path in zip(NAMES, adapters, strict=True)}}
    return {name: model.generate(**TEXT, lora=each).text for name, each in lora.items()}


def post(url: str, **fields: Any) -> dict[str, Any]:
    response = httpx.post(f"{url}/v1/completions", json=TEXT | fields, timeout=120)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def text_of(answer: dict[str, Any]) -> str:
    text: str = answer["choices"][0]["text"]
    return text


def only(number: int, scale: float = 1.0) -> list[dict[str, Any]]:
    return [{"id": number, "scale": scale}]


def test_the_adapters_matter(alone: dict[str, str]) -> None:
    assert len(set(alone.values())) == len(NAMES) + 1


def test_one_at_a_time(url: str, alone: dict[str, str]) -> None:
    assert text_of(post(url)) == alone["first"]  # it is on where a request says nothing
    assert text_of(post(url, lora=[])) == alone[""]
    for i, name in enumerate(NAMES):
        listed, named = post(url, lora=only(i)), post(url, model=name)
        assert text_of(listed) == text_of(named) == alone[name]
        assert listed["diffusion"]["lora"] == named["diffusion"]["lora"] == only(i)
        assert (listed["model"], named["model"]) == ("small-f32", name)


def test_two_at_once(model: DiffusionModel, url: str, adapters: list[Path], alone: dict[str, str]) -> None:
    both = model.generate(**TEXT, lora=[(adapters[0], 0.5), (adapters[2], -0.25)]).text
    assert text_of(post(url, lora=[*only(2, -0.25), *only(0, 0.5)])) == both
    assert both not in alone.values()


class RecordingBatch:
    """A native batch whose first step waits; notes (sessions, graphs) of each step."""

    def __init__(self, native: _native.Batch, wait: Callable[[], None]) -> None:
        self._native, self._wait = native, wait
        self.steps: list[tuple[int, int]] = []

    def next_steps(self, sessions: Sequence[_native.Session]) -> list[Any]:
        if not self.steps:
            self._wait()
        steps: list[Any] = self._native.next_steps(sessions)
        self.steps.append((len(sessions), self._native.n_graphs))
        return steps


def test_four_adapters_in_one_batch(
    model: DiffusionModel, alone: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    all_there = threading.Event()
    batch = RecordingBatch(model.native.new_batch(), lambda: all_there.wait(60))
    monkeypatch.setattr(model.native, "new_batch", lambda: batch)
    with serving(model, n_parallel=4) as (url, server), ThreadPoolExecutor(4) as pool:  # type: ignore[arg-type]
        requests = [pool.submit(post, url, model=name) for name in NAMES]
        eventually(lambda: server.scheduler.n_waiting + server.scheduler.n_active == 4)
        all_there.set()
        together = {name: text_of(done.result(120)) for name, done in zip(NAMES, requests, strict=True)}
    assert together == {name: alone[name] for name in NAMES}
    assert (4, 1) in batch.steps and all(n_graphs == 1 for _, n_graphs in batch.steps)


def test_a_prefix_is_that_of_its_adapters(model: DiffusionModel, adapters: list[Path]) -> None:
    long = {**TEXT, "prompt": "the river runs " * 10}
    lora = {"second": [adapters[1]], "third": [adapters[2]]}
    with serving(model, n_parallel=1, n_sessions=2) as (url, _):  # type: ignore[arg-type]

        def cached(**fields: Any) -> int:
            answer = post(url, **long, **fields)
            expected = model.generate(**long, lora=lora.get(fields.get("model", ""), []))
            assert text_of(answer) == expected.text
            n: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            return n

        n_prompt = len(model.tokenize(long["prompt"]))
        assert cached(model="second") == 0 and cached(model="second") == n_prompt
        assert cached(lora=[]) == 0 and cached(lora=only(1, 0)) == n_prompt
        assert cached(model="third") == 0  # takes the place of the first one, whose tokens are the same
        assert cached(lora=[]) == n_prompt and cached(model="second") == 0


def test_choices_have_the_request_s(url: str, model: DiffusionModel, adapters: list[Path]) -> None:
    """The second and third choice copy the first one's cache."""
    made = post(url, n=3, model="fourth")["choices"]
    lora = [(adapters[3], 1.0)]
    assert [choice["text"] for choice in made] == [
        model.generate(**{**TEXT, "seed": TEXT["seed"] + i}, lora=lora).text for i in range(3)
    ]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"messages": ask("the river"), "max_tokens": 16}),
        ("completions", {"prompt": "one ", "suffix": " three", "max_tokens": 6}),
        ("completions", {"prompt": "when: ", "regex": r"\d{4}-\d{2}", "max_tokens": 10}),
        ("infill", {"text": "a <|hole:6|> b <|hole:6|> c"}),
    ],
)
def test_every_path_takes_them(url: str, path: str, body: dict[str, Any]) -> None:
    def answer(**fields: Any) -> str:
        sent = {**body, "seed": 5, "steps": 4, **fields}
        response = httpx.post(f"{url}/v1/{path}", json=sent, timeout=120)
        assert response.status_code == 200, response.text
        choice = response.json()["choices"][0]
        return json.dumps(choice.get("message", choice.get("text")))

    assert answer(lora=only(1)) == answer(model="second")
    assert answer(lora=[]) == answer(lora=only(1, 0.0))
    if "regex" not in body:
        assert answer(model="second") != answer(lora=[])


# Scales of requests that choose none


def test_setting_the_scales(model: DiffusionModel, alone: dict[str, str]) -> None:
    with serving(model) as (url, _):  # type: ignore[arg-type]
        address = url + "/lora-adapters"
        shown = httpx.get(address).json()
        assert [(entry["id"], entry["name"], entry["scale"]) for entry in shown] == [
            (i, name, float(i == 0)) for i, name in enumerate(NAMES)
        ]
        assert httpx.post(address, json=only(1)).json() == {"success": True}
        assert text_of(post(url)) == alone["second"]
        assert [entry["scale"] for entry in httpx.get(address).json()] == [0, 1, 0, 0]
        refused = httpx.post(address, json=[*only(0), *only(7)])
        assert refused.status_code == 400 and "body[1].id is 7; loaded are 0 (first)" in refused.text
        assert text_of(post(url)) == alone["second"]
        assert httpx.post(address, json=[]).status_code == 200 and text_of(post(url)) == alone[""]
        assert httpx.delete(address).status_code == 405


def test_a_scale_that_is_too_large_is_the_request_s_fault(
    model: DiffusionModel, alone: dict[str, str]
) -> None:
    lines = [{"custom_id": "a", "method": "POST", "url": "/v1/completions",
              "body": {**TEXT, "lora": only(0, 1e30)}}]  # fmt: skip
    (of_a_batch,) = answer_lines(model, read_lines(json.dumps(lines[0]).encode(), "lines"))
    with serving(model) as (url, _):  # type: ignore[arg-type]
        asked = httpx.post(f"{url}/v1/completions", json=TEXT | {"lora": only(0, 1e30)}, timeout=120)
        httpx.post(url + "/lora-adapters", json=only(1, 1e30))
        posted = httpx.post(f"{url}/v1/completions", json=TEXT, timeout=120)
        for refused in (asked, posted):
            error = refused.json()["error"]
            assert refused.status_code == 400 and error["param"] == "lora", error
            assert "give adapters smaller scales" in error["message"]
        assert text_of(post(url, lora=only(1))) == alone["second"]
    assert "give adapters smaller scales" in json.dumps(of_a_batch)


def test_models_are_the_model_and_its_adapters(url: str) -> None:
    client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
    assert [listed.id for listed in client.models.list()] == ["small-f32", *NAMES]
    second = httpx.get(url + "/v1/models/second").json()
    assert (second["id"], second["parent"], second["lora"]) == (
        "second",
        "small-f32",
        {"id": 1, "scale": 0.0},
    )
    assert httpx.get(url + "/v1/models/fifth").json()["error"]["code"] == "model_not_found"


def test_strict_takes_the_names_of_adapters(model: DiffusionModel, alone: dict[str, str]) -> None:
    with serving(model, strict=True) as (url, _):  # type: ignore[arg-type]
        assert text_of(post(url, model="second")) == alone["second"]
        refused = httpx.post(url + "/v1/completions", json={**TEXT, "model": "fifth"})
        assert refused.status_code == 404 and "'fourth'" in refused.text


# Batches and the program


def test_lines_of_a_batch(model: DiffusionModel, alone: dict[str, str]) -> None:
    bodies = [{**TEXT, "lora": only(1)}, {**TEXT, "model": "third"}, TEXT, {**TEXT, "lora": []}]
    lines = [{"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": body}
             for i, body in enumerate([*bodies, {**TEXT, "lora": only(9)}])]  # fmt: skip
    data = "\n".join(map(json.dumps, lines)).encode()
    answers = {answer["custom_id"]: answer for answer in answer_lines(model, read_lines(data, "lines"))}
    texts = [text_of(answers[str(i)]["response"]["body"]) for i in range(len(bodies))]
    assert texts == [alone["second"], alone["third"], alone["first"], alone[""]]
    assert "lora[0].id is 9" in answers["4"]["error"]["message"]


def test_short_lines_of_a_batch(model: DiffusionModel, adapters: list[Path]) -> None:
    """`eos` is an option that only such lines have."""
    lines = [{**TEXT, "eos": [], "lora": only(1, 0.5)}, {**TEXT, "eos": []}]
    data = "\n".join(map(json.dumps, lines)).encode()
    answers = answer_lines(model, read_lines(data, "lines"), Defaults(chat=False))
    expected = [model.generate(**TEXT, eos=[], lora=[given]).text
                for given in ((adapters[1], 0.5), adapters[0])]  # fmt: skip
    assert {answer["line"]: answer["text"] for answer in answers} == dict(enumerate(expected, 1))


def test_the_program(gguf_file: Callable[..., Path], adapters: list[Path], alone: dict[str, str]) -> None:
    options = ["--lora", str(adapters[1]), "--lora", f"{adapters[2]}:0.5", "--lora-init-without-apply"]
    with process(gguf_file("small"), "--threads", "1", "--ctx", "512", *options) as (_, url):
        assert text_of(post(url)) == alone[""]
        assert text_of(post(url, model="second")) == text_of(post(url, lora=only(0))) == alone["second"]
        assert post(url, model="third")["diffusion"]["lora"] == only(1, 0.5)
        assert httpx.post(url + "/lora-adapters", json=only(1, 1.0)).status_code == 200
        assert text_of(post(url)) == alone["third"]
