"""Adapters that requests choose: by id and scale as llama.cpp's clients do, by name as vLLM's; refusals."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from support.adapters_by_hand import blank_adapter
from support.server_fakes import ScriptedModel, script, serving

from pydiffusion.openai.errors import ApiError
from pydiffusion.openai.lora import LoadedAdapters
from pydiffusion.options import Lora
from pydiffusion.server.http import to_json
from pydiffusion.server.pool import SessionPool
from pydiffusion.session import Session


@pytest.fixture
def loaded() -> LoadedAdapters:
    given = [(blank_adapter("sums"), 1.0), (blank_adapter("poems"), 0.5)]
    return LoadedAdapters(given, ["base", "base.gguf"])


def chosen(loaded: LoadedAdapters, **fields: Any) -> list[tuple[str, float]]:
    found = loaded.chosen(fields)
    assert found is not None
    return [(each.name, scale) for each, scale in found.applied]


# What a request means


def test_without_a_choice_the_scales_are_those_of_the_command_line(loaded: LoadedAdapters) -> None:
    assert chosen(loaded) == chosen(loaded, model="base") == [("sums", 1.0), ("poems", 0.5)]


def test_adapters_that_are_not_listed_are_off(loaded: LoadedAdapters) -> None:
    assert chosen(loaded, lora=[{"id": 1, "scale": 2}]) == [("poems", 2.0)]
    assert chosen(loaded, lora=[{"id": 0, "scale": 0.0}]) == chosen(loaded, lora=[]) == []


def test_their_order_is_that_of_the_ids(loaded: LoadedAdapters) -> None:
    listed = [{"id": 1, "scale": -0.25}, {"id": 0, "scale": 1}]
    assert chosen(loaded, lora=listed, model="base") == [("sums", 1.0), ("poems", -0.25)]


def test_a_name_chooses_one_with_its_own_scale(loaded: LoadedAdapters) -> None:
    loaded.set_scales([])
    assert chosen(loaded, model="poems") == [("poems", 0.5)]
    found = loaded.chosen({"model": "poems"})
    assert found is not None and found.name == "poems" and found.shown == [{"id": 1, "scale": 0.5}]


def test_scales_that_are_set_count_from_then_on(loaded: LoadedAdapters) -> None:
    loaded.set_scales([{"id": 1, "scale": 0.75}])
    assert chosen(loaded) == [("poems", 0.75)]
    shown = loaded.shown()
    assert [(entry["id"], entry["name"], entry["scale"]) for entry in shown] == [
        (0, "sums", 0.0), (1, "poems", 0.75),
    ]  # fmt: skip
    shown[0]["scale"] = 0.5
    loaded.set_scales(json.loads(json.dumps(shown)))  # sent back with another scale
    assert chosen(loaded) == [("sums", 0.5), ("poems", 0.75)]


def test_loaded_and_not_applied() -> None:
    loaded = LoadedAdapters([(blank_adapter("sums"), 0.5)], ["base"], apply=False)
    assert chosen(loaded) == [] and chosen(loaded, model="sums") == [("sums", 0.5)]
    assert loaded.shown()[0]["scale"] == 0
    off = LoadedAdapters([(blank_adapter("sums"), 0.0)], ["base"])
    assert chosen(off) == [] and chosen(off, model="sums") == [("sums", 1.0)]


def test_equal_names_get_numbers() -> None:
    given = [(blank_adapter(name), 1.0) for name in ("checkpoint", "base", "checkpoint", "checkpoint-2")]
    assert LoadedAdapters(given, ["base"]).names == ("checkpoint", "base-2", "checkpoint-2", "checkpoint-2-2")


def test_a_file_name_that_is_not_utf_8_can_be_sent() -> None:
    loaded = LoadedAdapters([(blank_adapter("caf\udce9"), 1.0)], ["base"])
    shown = json.loads(to_json(loaded.shown()))
    assert (shown[0]["name"], shown[0]["path"]) == ("caf?", "adapters/caf?")
    assert len(chosen(loaded, model="caf?")) == 1


def test_a_server_without_adapters() -> None:
    empty = LoadedAdapters()
    assert [empty.chosen(fields) for fields in ({}, {"lora": []}, {"model": "sums"})] == [None] * 3
    with pytest.raises(ApiError, match="no adapter is loaded: start with --lora"):
        empty.chosen({"lora": [{"id": 0, "scale": 1}]})


# Refusals


@pytest.mark.parametrize(
    ("lora", "text"),
    [
        ({"id": 0, "scale": 1}, "lora must be an array of objects with id and scale"),
        ("sums", "lora must be an array"),
        ([0], r"lora\[0\] must be an object"),
        (
            [{"id": 0, "scale": 1}, {"id": 2, "scale": 1}],
            r"lora\[1\].id is 2; loaded are 0 \(sums\), 1",
        ),
        ([{"id": -1, "scale": 1}], "id is -1"),
        ([{"id": True, "scale": 1}], "id is true"),
        ([{"id": "0", "scale": 1}], 'id is "0"'),
        ([{"id": 0.0, "scale": 1}], r"id is 0\.0"),
        ([{"scale": 1}], "has no id"),
        ([{"id": 0}], "has no scale"),
        ([{"id": 0, "scale": None}], "has no scale"),
        ([{"id": 0, "scale": "1"}], "the scale '1'; permitted is a finite number"),
        ([{"id": 0, "scale": True}], "the scale True"),
        ([{"id": 0, "scale": 2e30}], "permitted is a finite number"),
        ([{"id": 0, "scale": [1]}], r"the scale \[1\]"),
        ([{"id": 0, "scale": 10**400}], "permitted is a finite number"),
        ([{"id": 0, "scale": float("nan")}], "permitted is a finite number"),
        ([{"id": 0, "scale": 1}, {"id": 0, "scale": 0}], r"lora\[1\]: the adapter 0 has a scale already"),
        ([{"id": 0, "scale": 1, "strength": 2}], "an unknown field, 'strength'"),
    ],
)
def test_a_list_that_is_refused(loaded: LoadedAdapters, lora: Any, text: str) -> None:
    with pytest.raises(ApiError, match=text) as caught:
        loaded.chosen({"lora": lora})
    assert (caught.value.status, caught.value.param) == (400, "lora")
    with pytest.raises(ApiError, match=text.replace("lora", "body", 1)):
        loaded.set_scales(lora)
    assert chosen(loaded) == [("sums", 1.0), ("poems", 0.5)]  # as before


def test_a_name_and_a_list_contradict_each_other(loaded: LoadedAdapters) -> None:
    with pytest.raises(ApiError, match="model names the adapter 'poems', and lora gives scales") as caught:
        loaded.chosen({"model": "poems", "lora": [{"id": 0, "scale": 1}]})
    assert caught.value.param == "lora"


def test_who_may_set_scales() -> None:
    model = ScriptedModel(script)
    model.set_lora([(blank_adapter("sums"), 1.0)])
    with serving(model, api_key="k") as (url, _):
        address, key = url + "/lora-adapters", {"X-Api-Key": "k"}
        assert httpx.post(address, json=[]).status_code == httpx.get(address).status_code == 401
        elsewhere = {**key, "Origin": "https://evil.example", "Content-Type": "text/plain"}
        assert httpx.post(address, content="[]", headers=elsewhere).status_code == 403
        assert httpx.post(address, content="[{", headers=key).status_code == 400
        assert httpx.get(address, headers=key).json()[0]["scale"] == 1
        assert httpx.post(address, json=[], headers=key).status_code == 200
        assert httpx.get(address, headers=key).json()[0]["scale"] == 0


# Sessions of the pool


def test_a_session_of_other_adapters_shares_no_prefix() -> None:
    model = ScriptedModel(script)
    pool = SessionPool(model, 2)
    prompt = model.tokenize("a long prompt of many tokens")
    with_sums, with_poems = ([(blank_adapter(name), 1.0)] for name in ("sums", "poems"))

    def used(lora: Lora) -> tuple[Session, int]:
        session = pool.take(prompt, lora)
        n_held = session.n_past
        session.prefill(prompt, lora=lora)
        pool.give_back(session)
        return session, n_held

    first, second = used(with_sums), used([])
    assert first[1] == second[1] == 0 and first[0] is not second[0]
    assert used(with_sums) == (first[0], len(prompt)) and used([]) == (second[0], len(prompt))
    assert used([(with_sums[0][0], 0.0)]) == (second[0], len(prompt))  # off, as without
    assert used([(with_sums[0][0], 0.5)]) == (first[0], 0)  # the least recently used one, emptied
    assert used(with_poems) == (second[0], 0)
    assert pool.size == 2
