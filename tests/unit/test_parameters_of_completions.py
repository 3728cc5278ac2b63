"""``create_completion`` and ``create_chat_completion`` take the parameters that the server takes, alike."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai.types
import openai.types.chat
import pytest
from support.server_fakes import ask, events, serving

from pydiffusion import DiffusionModel, OptionError
from pydiffusion.openai.fields import IGNORED, UNSUPPORTED

CHAT = {"messages": ask("sort: d a c"), "max_tokens": 12, "steps": 3}
TEXT = {"prompt": "sort: d a c", "max_tokens": 12, "steps": 3}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 99}}, "required": ["a"]}


@pytest.fixture(scope="module")
def model(gguf_file: Callable[..., Path]) -> Iterator[DiffusionModel]:
    with DiffusionModel(gguf_file("small"), n_threads=1, n_ctx=512) as opened:
        yield opened


@pytest.fixture(scope="module")
def url(model: DiffusionModel) -> Iterator[str]:
    with serving(model) as (address, _):  # type: ignore[arg-type]
        yield address + "/v1"


def create(model: DiffusionModel, body: dict[str, Any]) -> Any:
    given = dict(body)
    if "messages" in given:
        return model.create_chat_completion(given.pop("messages"), **given)
    return model.create_completion(given.pop("prompt"), **given)


def posted(url: str, body: dict[str, Any]) -> httpx.Response:
    path = "/chat/completions" if "messages" in body else "/completions"
    return httpx.post(url + path, json=body, timeout=60)


def comparable(body: dict[str, Any]) -> dict[str, Any]:
    """Without ids, and without what only the server says."""
    usage = body.get("usage") or {}
    choices = [{k: v for k, v in choice.items() if k != "logprobs"} for choice in body["choices"]]
    for choice in choices:
        choice.get("message", {}).pop("refusal", None)
    figures = body.get("diffusion") or {}
    kept = {k: figures[k] for k in ("steps", "seeds", "ignored_parameters") if k in figures}
    return {"choices": choices, "usage": {k: v for k, v in usage.items() if k.endswith("tokens")}, **kept}


@pytest.mark.parametrize(
    "parameters",
    [
        CHAT | {"seed": 3, "n": 3},
        CHAT | {"seed": 2**64 - 1, "n": 2},
        CHAT | {"temperature": 0, "n": 2},
        CHAT | {"seed": 3, "temperature": 0.7},
        CHAT | {"seed": 3, "stop": "c", "user": "me", "top_p": 0.9, "presence_penalty": 0, "metadata": {}},
        CHAT | {"seed": 3, "response_format": {"type": "json_object"}, "max_tokens": 30},
        TEXT | {"seed": 3, "n": 2, "echo": True},
        TEXT | {"seed": 3, "suffix": " c d", "max_tokens": 5},
        TEXT | {"seed": 3, "suffix": " c d", "n": 2, "stop": ["c", "x"], "echo": True},
        TEXT | {"seed": 3, "suffix": ""},
        TEXT | {"seed": 3, "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
        TEXT | {"seed": 3, "logprobs": None, "logit_bias": {}, "best_of": 1, "stop": None},
        TEXT | {"seed": -1, "n": 2},
    ],
)  # fmt: skip
def test_a_response_is_the_server_s(model: DiffusionModel, url: str, parameters: dict[str, Any]) -> None:
    ours = create(model, parameters)
    kind = openai.types.chat.ChatCompletion if "messages" in parameters else openai.types.Completion
    kind.model_validate(ours)
    assert json.loads(json.dumps(ours)) == ours
    theirs = posted(url, parameters)
    assert theirs.status_code == 200, theirs.text
    if parameters.get("seed") == -1:  # drawn
        assert len(set(ours["diffusion"]["seeds"])) == 2
        return
    assert comparable(ours) == comparable(theirs.json())
    assert len(ours["choices"]) == parameters.get("n", 1)


@pytest.mark.parametrize("kind", [CHAT, TEXT])
@pytest.mark.parametrize("stream_options", [None, {"include_usage": True}, {"diffusion": True}])
def test_a_stream_has_the_server_s_chunks(
    model: DiffusionModel, url: str, kind: dict[str, Any], stream_options: Any
) -> None:
    body = kind | {"seed": 3, "n": 2, "stream": True, "stream_options": stream_options}
    ours, theirs = list(create(model, body)), events(posted(url, body))

    def by_choice(chunks: list[dict[str, Any]]) -> dict[int, list[Any]]:
        """The server sends the chunks of several choices as they come."""
        found: dict[int, list[Any]] = {}
        for chunk in chunks:
            for piece in chunk["choices"] or [
                chunk.get("diffusion") or {"index": -1, "usage": chunk["usage"]}
            ]:
                found.setdefault(piece["index"], []).append(piece)
        return found

    here, there = by_choice(ours), by_choice(theirs)
    for usage in (here.get(-1, []), there.get(-1, [])):
        for each in usage:
            each["usage"] = {k: v for k, v in each["usage"].items() if k.endswith("tokens")}
    assert here == there
    assert ("usage" in ours[0]) == bool(stream_options and "include_usage" in stream_options)
    assert ours[-1].get("usage") is not None or "diffusion" in ours[-1]


def test_choices_are_what_calls_with_their_seeds_give(model: DiffusionModel) -> None:
    body = TEXT | {"t_min": 1.0, "t_max": 2.0, "max_tokens": 20}
    several = create(model, body | {"seed": 5, "n": 3})
    alone = [create(model, body | {"seed": 5 + i}) for i in range(3)]
    assert [c["text"] for c in several["choices"]] == [one["choices"][0]["text"] for one in alone]
    assert len({c["text"] for c in several["choices"]}) > 1
    assert several["diffusion"]["seeds"] == [5, 6, 7] and several["diffusion"]["seed"] == 5
    assert several["diffusion"]["canvas_steps"] == [one["diffusion"]["canvas_steps"] for one in alone]
    assert several["usage"]["prompt_tokens"] == alone[0]["usage"]["prompt_tokens"]


def test_a_session_reads_the_prompt_of_several_choices_once(model: DiffusionModel) -> None:
    session = model.new_session()
    n_prompt = len(model.chat_prompt(CHAT["messages"]))
    body = CHAT | {"session": session, "seed": 1, "max_tokens": model.canvas_length}  # no canvas is encoded
    create(model, body | {"n": 3})
    assert session.tokens[:n_prompt].tolist() == model.chat_prompt(CHAT["messages"])
    before = session.n_encoded
    create(model, body)
    assert session.n_encoded == before == n_prompt


def test_what_means_nothing_is_listed(model: DiffusionModel) -> None:
    names = [*IGNORED, "repeat_penalty", "mirostat_mode", "tfs_z", "typical_p"]
    for value, listed in ((1, names), (None, [])):
        body = create(model, TEXT | {"seed": 1} | dict.fromkeys(names, value))
        assert body["diffusion"]["ignored_parameters"] == listed


@pytest.mark.parametrize(
    "name", [*sorted({*UNSUPPORTED} - {"lora"}), "logits_processor", "stopping_criteria"]
)
def test_what_would_change_the_answer_is_refused(model: DiffusionModel, name: str) -> None:
    with pytest.raises(OptionError, match=f"^{name} is not supported with the value") as caught:
        create(model, CHAT | {name: "something"})
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"n": 0}, ValueError, "n is 0; permitted is an integer from 1 to 16"),
        ({"n": 17}, ValueError, "n is 17"),
        ({"n": 1.5}, ValueError, "n is 1.5"),
        ({"temperature": -1}, ValueError, "temperature is -1"),
        ({"temperature": "hot"}, ValueError, "temperature is 'hot'"),
        ({"stream_options": {"include_usage": True}}, ValueError, "only permitted with stream=True"),
        (
            {"stream": True, "stream_options": {"usage": True}},
            ValueError,
            "permitted is a dict with include_",
        ),
        ({"stream": True, "stream_options": "usage"}, ValueError, "stream_options is 'usage'"),
        ({"response_format": "json"}, ValueError, "response_format must be an object"),
        ({"response_format": {"type": "json_object"}, "json_schema": {}}, ValueError, "exclude each other"),
        ({"max_new_tokens": 5}, TypeError, "here it is max_tokens"),
        ({"max_token": 5}, TypeError, "did you mean max_tokens"),
        ({"nonsense": 5}, TypeError, "unknown option 'nonsense'"),
    ],
)
def test_what_is_wrong_is_refused_by_name(
    model: DiffusionModel, parameters: dict[str, Any], error: type[Exception], message: str
) -> None:
    for body in (CHAT, TEXT):
        with pytest.raises(error, match=message):
            create(model, body | parameters)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"suffix": 5}, "suffix is 5; permitted is a string"),
        ({"suffix": "x", "regex": "a"}, "regex can't be chosen for a text with holes"),
        ({"suffix": "x", "thinking_budget": 5}, "thinking_budget can't be chosen"),
        ({"suffix": "x", "response_format": {"type": "json_object"}}, "json_schema can't be chosen"),
    ],
)
def test_what_a_suffix_excludes(model: DiffusionModel, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(model, TEXT | parameters)
