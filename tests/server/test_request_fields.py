"""Fields of a request body: those of other servers, slips, equivalents, temperature."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from support.foreign_fields import FOREIGN
from support.server_fakes import CHAT, ScriptedModel, ask, events, script, serving

from pydiffusion.openai.errors import ApiError
from pydiffusion.openai.fields import EQUIVALENTS, IGNORED, UNSUPPORTED, slip_of, sort_fields
from pydiffusion.openai.requests import ENDPOINTS, Terms, chat_request, completion_request, infill_request
from pydiffusion.options import at_temperature

TERMS = Terms(("scripted",))


@pytest.fixture(scope="module")
def model() -> ScriptedModel:
    return ScriptedModel(script)


@pytest.fixture(scope="module")
def url(model: ScriptedModel) -> Iterator[str]:
    with serving(model) as (address, _):
        yield address


def refusal(body: dict[str, Any], model: ScriptedModel, terms: Terms = TERMS) -> ApiError:
    with pytest.raises(ApiError) as caught:
        chat_request(body, model, terms)
    return caught.value


# Fields without effect


def test_fields_of_other_servers_are_listed(url: str, caplog: pytest.LogCaptureFixture) -> None:
    foreign = dict.fromkeys(FOREIGN, 1) | {"mirostat": "of the wrong type", "samplers": [[]]}
    with caplog.at_level(logging.WARNING, "pydiffusion.server"):
        for _ in range(2):
            answer = httpx.post(url + "/v1/chat/completions", json={**CHAT, **foreign}, timeout=60).json()
    assert answer["diffusion"]["ignored_parameters"] == list(foreign)
    ChatCompletion.model_validate(answer, strict=True)
    told = [record.getMessage() for record in caplog.records if "'xtc_probability'" in record.getMessage()]
    assert len(told) == 1, "a name is logged once"
    more = {"prompt": "Hi", "max_tokens": 5, **foreign}
    answer = httpx.post(url + "/v1/completions", json=more, timeout=60).json()
    assert answer["diffusion"]["ignored_parameters"] == list(foreign)
    Completion.model_validate(answer, strict=True)


def test_names_that_no_response_can_hold_and_fields_without_number(url: str) -> None:
    body = '{"messages": [{"role": "user", "content": "Hi"}], "odd \\ud800": 1, "' + "x" * 5000 + '": 2}'
    answer = httpx.post(url + "/v1/chat/completions", content=body, timeout=60)
    assert answer.json()["diffusion"]["ignored_parameters"] == ["odd ?", "x" * 5000]
    slip = httpx.post(url + "/v1/chat/completions", content='{"messages\\ud800": 1}', timeout=60)
    assert slip.status_code == 400 and "did you mean messages?" in slip.json()["error"]["message"]
    many = httpx.post(url + "/v1/chat/completions", json={**CHAT, **{f"f{i}": 1 for i in range(600)}})
    assert many.status_code == 400 and "permitted are 500" in many.json()["error"]["message"]


def test_a_stream_lists_them_too(url: str) -> None:
    body = {**CHAT, "stream": True, "repeat_penalty": 1.1, "user": 3}
    chunks = events(httpx.post(url + "/v1/chat/completions", json=body, timeout=60))
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk)
    assert chunks[-1]["diffusion"]["ignored_parameters"] == ["repeat_penalty", "user"]


def test_no_field_of_another_server_passes_for_a_slip() -> None:
    for known in ENDPOINTS.values():
        assert sort_fields(dict.fromkeys(FOREIGN, 1), known, ENDPOINTS).ignored == list(FOREIGN)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("max_token", "max_tokens"), ("respone_format", "response_format"), ("message", "messages"),
        ("tool", "tools"), ("maxTokens", "max_tokens"), ("responseFormat", "response_format"),
        ("temprature", "temperature"), ("tools_choice", "tool_choice"), ("seeds", "seed"),
        ("steam", "stream"),
        ("stream_option", "stream_options"), ("max_completions_tokens", "max_completion_tokens"),
        ("enable_thinkin", "enable_thinking"), ("step", "steps"), ("stops", "stop"), ("t-max", "t_max"),
    ],
)  # fmt: skip
def test_a_slip_is_refused_with_a_hint(model: ScriptedModel, name: str, meant: str) -> None:
    error = refusal({**CHAT, name: 3}, model)
    assert (error.status, error.param, error.code) == (400, name, "unknown_parameter")
    assert f"did you mean {meant}?" in error.message


def test_every_field_of_ours_is_recognized_with_a_letter_missing() -> None:
    for known in ENDPOINTS.values():
        for name in known:
            if len(name) > 5 and name[:-1] not in known:
                assert slip_of(name[:-1], known) == name


@pytest.mark.parametrize(
    ("body", "param", "text"),
    [
        ({**CHAT, "extra_body": {"steps": 8}}, "extra_body", "into the body itself"),
        ({**CHAT, "suffix": "x"}, "suffix", "/v1/completions"),
        ({**CHAT, "prompt": "x"}, "prompt", "/v1/completions"),
        ({**CHAT, "logprobs": True}, "logprobs", "not supported"),
        ({**CHAT, "top_logprobs": 2}, "top_logprobs", "not supported"),
        ({**CHAT, "n_probs": 5}, "n_probs", "not supported"),
        ({**CHAT, "audio": {"voice": "x"}}, "audio", "not supported"),
        ({**CHAT, "images": ["aGk="]}, "images", "not supported"),
        ({**CHAT, "chat_template": "{{ x }}"}, "chat_template", "not supported"),
        ({**CHAT, "allowed_token_ids": [1]}, "allowed_token_ids", "not supported"),
    ],
)
def test_what_would_change_the_answer_is_refused(
    model: ScriptedModel, body: dict[str, Any], param: str, text: str
) -> None:
    error = refusal(body, model)
    assert (error.status, error.param) == (400, param) and text in error.message


def test_what_requests_nothing_is_no_effect_to_list(model: ScriptedModel) -> None:
    nothing = {
        "logprobs": False, "logit_bias": [], "n_probs": 0, "functions": [], "best_of": 1, "images": [],
        "add_generation_prompt": True, "use_beam_search": False, "stop": "", "stop_token_ids": [],
        "ignore_eos": False, "grammar_string": "", "structured_outputs": {}, "guided_choice": [],
    }  # fmt: skip
    assert chat_request({**CHAT, **nothing}, model, TERMS).ignored == []


def test_strict(model: ScriptedModel) -> None:
    with serving(model, strict=True) as (address, _):
        for more in ({"repeat_penalty": 1.1}, {"top_p": 1}, {"no_such_field": 1}):
            answer = httpx.post(address + "/v1/chat/completions", json={**CHAT, **more}, timeout=60)
            (name,) = more
            assert answer.status_code == 400 and answer.json()["error"]["param"] == name
        own = {"temperature": 0.2, "n_predict": 3, "model": "scripted.gguf", "logprobs": False}
        assert httpx.post(address + "/v1/chat/completions", json={**CHAT, **own}, timeout=60).is_success
        client = openai.OpenAI(base_url=address + "/v1", api_key="x", max_retries=0)
        with pytest.raises(openai.NotFoundError, match="scripted"):
            client.chat.completions.create(model="gpt-4", messages=ask("Hi"))


def test_any_model_name_stands_for_the_only_model(url: str) -> None:
    client = openai.OpenAI(base_url=url + "/v1", api_key="x", max_retries=0)
    answer = client.chat.completions.create(model="gpt-4o-mini", messages=ask("Hi"))
    assert (answer.model, answer.choices[0].message.content) == ("scripted", "Hello, world!")


# Equivalents of other servers' fields


@pytest.mark.parametrize(
    ("given", "option", "value"),
    [
        ({"n_predict": 7}, "max_tokens", 7),
        ({"num_predict": 7}, "max_tokens", 7),
        ({"max_new_tokens": 7, "n_predict": 7, "max_tokens": 7}, "max_tokens", 7),
        ({"max_output_tokens": 7}, "max_tokens", 7),
        ({"n_predict": -1}, "max_tokens", 1024),
        ({"num_predict": -2}, "max_tokens", 1024),
        ({"stopping_strings": ["a"], "stop_sequence": ["a"]}, "stop", ("a",)),
        ({"stop_sequences": "b"}, "stop", ("b",)),
        ({"guided_regex": "a+"}, "regex", "a+"),
        ({"guided_choice": ["yes", "n.o"]}, "regex", r"yes|n\.o"),
        ({"structured_outputs": {"choice": ["a b"]}}, "regex", r"a\ b"),
        ({"json_schema": {"type": "null"}}, "json_schema", '{"type": "null"}'),
        ({"guided_json": {"type": "null"}}, "json_schema", '{"type": "null"}'),
        ({"structured_outputs": {"json": {"type": "null"}}}, "json_schema", '{"type": "null"}'),
        ({"structured_outputs": {"json_object": True}}, "json_schema", '{"type": "object"}'),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, "thinking_budget", 9),
        ({"thinking": {"type": "disabled"}}, "thinking_budget", 0),
        ({"think": False}, "thinking_budget", 0),
        ({"reasoning": {"effort": "none"}}, "thinking_budget", 0),
        ({"reasoning": {"max_tokens": 9}}, "thinking_budget", 9),
        ({"ignore_eos": True}, "eos", ()),
        ({"ignore_eos": True, "stop_token_ids": [9]}, "eos", (9,)),
        ({"stop_token_ids": [9]}, "eos", (1, 9)),
        ({"seed": 5}, "seed", 5),
    ],
)
def test_equivalents(model: ScriptedModel, given: dict[str, Any], option: str, value: Any) -> None:
    request = chat_request({**CHAT, **given}, model, TERMS)
    assert request.ignored == []
    found = getattr(request.options[0], option)
    assert found == value or (option == "eos" and found[-1:] == value[-1:] and len(found) >= len(value))


def test_ours_counts_where_both_are_given(model: ScriptedModel) -> None:
    request = chat_request({**CHAT, "n_predict": 9, "max_tokens": 7}, model, TERMS)
    assert request.options[0].max_tokens == 7 and request.ignored == ["n_predict"]
    error = refusal({**CHAT, "n_predict": 0}, model)
    assert error.param == "n_predict" and "n_predict" in error.message, "the client's own name"


def test_an_equivalent_that_means_nothing_here_is_ignored(model: ScriptedModel) -> None:
    request = chat_request({**CHAT, "thinking": {"type": "adaptive"}, "think": 3}, model, TERMS)
    assert request.ignored == ["thinking", "think"]


ODD: tuple[Any, ...] = (
    0, -1, 1.5, True, False, "", "x", [], [0], ["a", 1], {}, {"type": []}, {"json": 3}, [[]], 10**400,
    {"type": "enabled", "budget_tokens": "x"}, {"effort": [], "enabled": 3, "max_tokens": {}},
    {"choice": ["(", ""]}, "\ud800",
)  # fmt: skip


def test_no_value_is_an_internal_error(model: ScriptedModel) -> None:
    parse = {
        "/v1/chat/completions": (chat_request, CHAT),
        "/v1/completions": (completion_request, {"prompt": "a"}),
        "/v1/infill": (infill_request, {"text": "a<|hole|>"}),
    }
    n_accepted = n_refused = 0
    for path, (read, body) in parse.items():
        for name in (*ENDPOINTS[path], *IGNORED, *UNSUPPORTED, *EQUIVALENTS):
            for value in ODD:
                try:
                    read({**body, name: value}, model, TERMS)
                    n_accepted += 1
                except ApiError as error:
                    assert error.status == 400, (path, name, value)
                    n_refused += 1
    assert n_accepted > 500 and n_refused > 500


def test_control_tokens_of_a_prompt_text(model: ScriptedModel) -> None:
    text = "<bos><|turn>user\nHi<turn|>\n<|turn>model\n"
    ids = model.tokenize(text, parse_special=True)
    with serving(model) as (plain, _), serving(model, special=True) as (special, _):
        for address, more, count in (
            (special, {}, len(ids)),
            (special, {"special": False}, len(model.tokenize(text))),
            (plain, {}, len(model.tokenize(text))),
            (plain, {"special": True}, len(ids)),
            (plain, {"parse_special": True}, len(ids)),
            (plain, {"special": True, "add_special_tokens": True}, len(ids)),
            (plain, {"special": True, "prompt": text.removeprefix("<bos>")}, len(ids)),
            (plain, {"prompt": "Hi", "add_special_tokens": False}, 2),
            (plain, {"prompt": "Hi"}, 3),
        ):
            body = {"prompt": text, "max_tokens": 3, **more}
            answer = httpx.post(address + "/v1/completions", json=body, timeout=60).json()
            assert answer["usage"]["prompt_tokens"] == count, more


# Temperature and seeds


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_temperature_sets_the_schedule(model: ScriptedModel, path: str) -> None:
    parse, body = (
        (chat_request, CHAT) if path == "/v1/chat/completions" else (completion_request, {"prompt": "a"})
    )

    def options(**more: Any) -> Any:
        return parse({**body, **more}, model, TERMS).options

    schedule = options()[0]
    for factor in (0.7, 1, 1.5):
        (found,) = options(temperature=factor)
        assert (found.t_min, found.t_max) == pytest.approx((schedule.t_min * factor, schedule.t_max * factor))
    (low,), (half,) = options(temperature=0.2, seed=1), options(temperature=0.5, seed=1)
    assert low == half, "lower ones make answers worse: docs/denoising-options.md"
    (zero,), (again,) = options(temperature=0), options(temperature=0.0)
    assert zero == again and zero.t_max < schedule.t_max
    assert (zero.t_min, zero.t_max) == (at_temperature(0)["t_min"], at_temperature(0)["t_max"])
    assert options(temperature=0, seed=5)[0].seed == 5, "a given seed counts"
    assert [each.seed for each in options(temperature=0, n=3)] == [0, 1, 2], "the choices differ"
    (own,) = options(temperature=0, t_max=0.6)
    assert own.t_max == 0.6 and own.t_min == schedule.t_min, "a given schedule counts"
    assert len({each.seed for _ in range(4) for each in options(seed=-1)}) > 1, "-1 draws one"


def test_temperature_0_is_repeatable(tmp_path: Path) -> None:
    from pydiffusion import DiffusionModel
    from pydiffusion.convert import convert
    from pydiffusion.demo import checkpoint_path

    convert(checkpoint_path(), tmp_path / "demo.gguf", "q8_0")
    puzzle = ask("sudoku" + "\n......" * 6)
    with serving(DiffusionModel(tmp_path / "demo.gguf", n_threads=1, n_ctx=512)) as (url, _):
        client = openai.OpenAI(base_url=url + "/v1", api_key="x", max_retries=0)

        def text(**more: Any) -> str | None:
            chosen: dict[str, Any] = {"messages": puzzle, "max_tokens": 48, **more}
            return client.chat.completions.create(model="x", **chosen).choices[0].message.content

        first = text(temperature=0)
        assert text(temperature=0.9) != first, "without it, an empty grid has many answers"
        assert text(messages=ask("sort: b a")), "another request between them"
        assert text(temperature=0) == first


def test_the_lists_here_name_what_the_server_does_not_have() -> None:
    assert not set(FOREIGN) & set(chain(*ENDPOINTS.values()))
    assert len(json.dumps(FOREIGN)) > 2000, "the list is there"


@pytest.mark.parametrize(
    "field", [{"guided_choice": ["a", 1]}, {"structured_outputs": [1]}, {"guided_json_object": "yes"}]
)
def test_a_constraint_that_can_not_be_read_is_refused(url: str, field: dict[str, Any]) -> None:
    answer = httpx.post(url + "/v1/chat/completions", json={"messages": ask("x"), **field})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == next(iter(field))
