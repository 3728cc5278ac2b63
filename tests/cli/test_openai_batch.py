"""OpenAI's batch lines in `pydiffusion batch`: the server's answers, in OpenAI's form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from openai.types import Completion
from openai.types.chat import ChatCompletion
from support.demo_model import write_demo_model

from pydiffusion import DiffusionModel
from pydiffusion.cli import main
from pydiffusion.options import at_temperature
from pydiffusion.server.app import create_app

CHAT, COMPLETION, INFILL = "/v1/chat/completions", "/v1/completions", "/v1/infill"
SORT = [{"role": "user", "content": "sort: d a c"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
OF_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]

# By custom_id: url and body. Each is answered.
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, {"messages": SORT, "seed": 3}),
    "choices": (CHAT, {"messages": SORT, "n": 3, "seed": 5, "max_tokens": 20}),
    "schema": (CHAT, {"messages": SORT, "seed": 1, "steps": 4, "response_format": OF_SCHEMA}),
    "tools": (
        CHAT,
        {"messages": SORT, "seed": 1, "max_tokens": 30, "tools": TOOLS, "parallel_tool_calls": False},
    ),
    "stopped": (CHAT, {"messages": SORT, "seed": 1, "stop": ["c"], "max_completion_tokens": 9, "top_p": 0.5}),
    "prompts": (
        COMPLETION,
        {"prompt": ["one", [5, 6, 7]], "seed": 1, "steps": 3, "max_tokens": 9, "echo": True},
    ),
    "suffix": (COMPLETION, {"prompt": "one", "suffix": " two", "seed": 1, "steps": 3, "max_tokens": 5}),
    "regex": (COMPLETION + "/", {"prompt": "one", "seed": 1, "steps": 3, "regex": "[ab]{3}"}),
    "infill": (INFILL, {"text": "one <|hole:3|> two", "seed": 1, "steps": 3}),
}
# By custom_id: url, body, and the words of the error.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no messages": (CHAT, {}, "messages must be an array"),
    "steps": (CHAT, {"messages": SORT, "steps": 0}, "steps is 0"),
    "slip": (CHAT, {"messages": SORT, "max_token": 3}, "max_token"),
    "stream": (CHAT, {"messages": SORT, "stream": True}, "stream is true"),
    "embeddings": ("/v1/embeddings", {"input": "a"}, "known are /v1/chat/completions"),
    "long": (COMPLETION, {"prompt": [5] * 500}, "context is 256 tokens"),
    "model": (CHAT, {"messages": SORT, "model": 3}, "model must be a string"),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_demo_model(tmp_path_factory.mktemp("demo")))


@pytest.fixture(scope="module")
def server(path: str) -> Iterator[TestClient]:
    with DiffusionModel(path, n_threads=1, n_ctx=256) as model:
        app = create_app(model)
        yield TestClient(app)
        app.state.scheduler.close()


def line(custom_id: str, url: str, body: dict[str, Any]) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body}) + "\n"


def run(path: str, prompts: str, folder: Path, *more: str) -> tuple[int, list[dict[str, Any]]]:
    (folder / "p.jsonl").write_text(prompts)
    code = main(
        ["batch", "-m", path, str(folder / "p.jsonl"), "-o", str(folder / "o.jsonl"), "--threads", "1",
         "--ctx", "256", "--parallel", "3", *more]
    )  # fmt: skip
    return code, [json.loads(row) for row in (folder / "o.jsonl").read_text().splitlines()]


def same(body: dict[str, Any]) -> dict[str, Any]:
    """A response without what differs between two runs."""
    figures = {name: value for name, value in body["diffusion"].items() if name != "timings"}
    usage = {name: value for name, value in body["usage"].items() if name != "prompt_tokens_details"}
    for choice in body["choices"]:
        for call in choice.get("message", {}).get("tool_calls", ()):
            del call["id"]
    return body | {"id": "", "created": 0, "diffusion": figures, "usage": usage}


def test_answers_are_those_of_the_server(path: str, server: TestClient, tmp_path: Path) -> None:
    """Whichever model a line names: one is loaded."""
    prompts = "".join(line(name, url, {"model": "any", **body}) for name, (url, body) in REQUESTS.items())
    code, answers = run(path, prompts, tmp_path)
    assert code == 0 and {answer["custom_id"] for answer in answers} == REQUESTS.keys()
    assert len({answer["id"] for answer in answers}) == len(answers)
    for answer in answers:
        assert answer.keys() == {"id", "custom_id", "response", "error"} and answer["error"] is None
        assert answer["response"]["status_code"] == 200 and answer["response"]["request_id"]
        got = answer["response"]["body"]
        url, body = REQUESTS[answer["custom_id"]]
        kind = ChatCompletion if url == CHAT else Completion
        kind.model_validate(got)
        alone = server.post(url.rstrip("/"), json=body)
        assert alone.status_code == 200 and same(got) == same(alone.json())
    by_id = {answer["custom_id"]: answer["response"]["body"] for answer in answers}
    assert by_id["chat"]["choices"][0]["message"]["content"] == "a c d"
    assert by_id["stopped"]["choices"][0]["message"]["content"] == "a "
    assert by_id["stopped"]["diffusion"]["ignored_parameters"] == ["top_p"]
    assert [choice["index"] for choice in by_id["choices"]["choices"]] == [0, 1, 2]


def test_refused_requests(path: str, tmp_path: Path) -> None:
    """The status tells it, as in OpenAI's service, and the error, as in vLLM's run_batch."""
    prompts = "".join(line(name, url, body) for name, (url, body, _) in REFUSED.items())
    code, answers = run(path, prompts + "{not json\n" + line("good", CHAT, {"messages": SORT}), tmp_path)
    assert code == 1
    by_id = {answer["custom_id"]: answer for answer in answers}
    assert by_id.keys() == {*REFUSED, "good", None}
    assert by_id.pop("good")["error"] is None
    assert "not valid JSON" in by_id.pop(None)["error"]["message"]
    for name, answer in by_id.items():
        assert REFUSED[name][2] in answer["error"]["message"]
        assert answer["response"]["status_code"] == 400
        assert answer["response"]["body"]["error"]["message"] == answer["error"]["message"]
    code, again = run(path, (tmp_path / "p.jsonl").read_text(), tmp_path)
    assert (code, again) == (1, answers), "nothing is answered again"


def test_options_of_the_command_are_those_that_a_body_lacks(path: str, tmp_path: Path) -> None:
    prompts = (
        line("a", COMPLETION, {"prompt": "x"})
        + line("b", COMPLETION, {"prompt": "x", "seed": 3, "max_tokens": 2, "regex": None})
        + line("c", CHAT, {"messages": SORT, "response_format": OF_SCHEMA, "max_completion_tokens": 30})
        + '{"prompt": "x", "json_schema": {"type": "boolean"}}\n"x"\n'
    )
    code, answers = run(path, prompts, tmp_path, "--seed", "7", "-n", "4", "--regex", "[ab]{2,3}", "--raw")
    assert code == 0
    bodies = {answer["custom_id"]: answer["response"]["body"] for answer in answers if "custom_id" in answer}
    seeds = {name: body["diffusion"]["seeds"] for name, body in bodies.items()}
    assert seeds == {"a": [7], "b": [3], "c": [9]}
    assert set(bodies["a"]["choices"][0]["text"]) <= {"a", "b"}
    assert set(bodies["b"]["choices"][0]["text"]) <= {"a", "b"}
    assert isinstance(json.loads(bodies["c"]["choices"][0]["message"]["content"])["a"], bool)
    short = {answer["line"]: answer for answer in answers if "line" in answer}
    assert (short[4]["text"] in ("true", "false"), short[4]["seed"]) == (True, 10)
    assert set(short[5]["text"]) <= {"a", "b"}


def test_a_grammar(path: str, tmp_path: Path) -> None:
    """For all lines, or a line's own; calls that are constrained are answers' tool_calls."""
    rows = [{"prompt": "x"}, {"prompt": "x", "grammar": 'root ::= "c" [d-f]'}]
    call = {"messages": SORT, "tools": TOOLS, "tool_choice": "required", "max_tokens": 40}
    prompts = "".join(json.dumps(row) + "\n" for row in [*rows, call])
    (tmp_path / "ab.gbnf").write_text('root ::= "ab"+')
    for option in ("--grammar", 'root ::= "ab"+'), ("--grammar-file", str(tmp_path / "ab.gbnf")):
        code, answers = run(
            path, "".join(prompts.splitlines(keepends=True)[:2]), tmp_path, "-n", "8", *option
        )
        by_line = {answer["line"]: answer["text"] for answer in answers}
        assert code == 0 and set(by_line[1]) == {"a", "b"} and by_line[2][0] == "c" and len(by_line[2]) == 2
        (tmp_path / "o.jsonl").unlink()
    code, answers = run(path, prompts, tmp_path, "-n", "8", "--seed", "1")
    calls = next(answer for answer in answers if answer["line"] == 3)["tool_calls"]
    assert code == 0 and calls[0]["name"] == "f" and isinstance(calls[0]["arguments"], dict)
    options = ["--grammar", "x", "--grammar-file", "y"]
    assert main(["batch", "-m", path, str(tmp_path / "p.jsonl"), "-o", "-", *options]) == 2
    assert main(["batch", "-m", path, "-", "-o", "-", "--grammar-file", "-"]) == 2


def test_a_schema_for_all_lines(path: str, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    prompts = '"x"\n' + line("a", CHAT, {"messages": SORT})
    code, answers = run(
        path, prompts, tmp_path, "--json-schema", str(tmp_path / "schema.json"), "--steps", "4"
    )
    assert code == 0
    short, other = sorted(answers, key=lambda answer: "custom_id" in answer)
    for text in short["text"], other["response"]["body"]["choices"][0]["message"]["content"]:
        assert json.loads(text).keys() >= {"a"}


def test_fields_of_requests_in_short_lines(path: str, tmp_path: Path) -> None:
    rows = [
        {"messages": SORT, "seed": 1, "model": "any", "top_p": 0.5, "max_completion_tokens": 9, "stop": "c"},
        {"messages": SORT, "seed": 1, "response_format": OF_SCHEMA},
        {"prompt": [5, 6, 7], "seed": 1, "max_tokens": 3, "dropped_mass": 0, "canvas_length": 8, "eos": []},
        {"prompt": "x", "canvas_length": 99999},
        {"prompt": [5, 6], "suffix": " end", "seed": 1, "steps": 3},
        {"prompt": "x", "json_schema": {}, "response_format": {"type": "text"}},
        {"prompt": "x", "json_schema": "{", "id": "half a pair: \ud83d"},
    ]
    code, answers = run(path, "".join(json.dumps(row) + "\n" for row in rows), tmp_path)
    by_line = {answer["line"]: answer for answer in answers}
    assert code == 1 and by_line.keys() == set(range(1, 8))
    assert by_line[5]["finish_reason"] and "error" not in by_line[5]
    assert by_line[1]["text"] == "a " and by_line[1]["ignored"] == ["top_p"]
    assert "a" in json.loads(by_line[2]["text"]) and "ignored" not in by_line[2]
    assert (by_line[3]["prompt_tokens"], by_line[3]["tokens"]) == (3, 3)
    assert "canvas_length is 99999" in by_line[4]["error"]
    assert "exclude each other" in by_line[6]["error"]
    assert "json_schema is not valid JSON" in by_line[7]["error"]
    assert by_line[7]["id"] == rows[6]["id"]


def test_prompts_are_user_messages_unless_raw(
    path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def texts(*options: str, row: dict[str, Any] | None = None, code: int = 0) -> dict[str, Any]:
        (tmp_path / "o.jsonl").unlink(missing_ok=True)
        prompts = json.dumps({"prompt": "sort: d a c", "seed": 1, **(row or {})}) + "\n"
        got, (answer,) = run(path, prompts, tmp_path, "-n", "12", *options)
        assert got == code
        return answer

    with DiffusionModel(path, n_threads=1, n_ctx=256) as model:
        chat, raw = model.chat_prompt(SORT), model.tokenize("sort: d a c")
    default, note = texts(), "user messages through the chat template (--raw"
    assert default["text"] == "a c d" and default["prompt_tokens"] == len(chat)
    assert note in capsys.readouterr().err
    assert texts("--chat") == default and note not in capsys.readouterr().err
    assert texts("--raw")["prompt_tokens"] == len(raw) and note not in capsys.readouterr().err
    system = texts("--system", "x")["prompt_tokens"]
    assert system > len(chat)
    assert texts(row={"system": "x"})["prompt_tokens"] == system
    assert "system goes with a prompt" in texts("--raw", row={"system": "x"}, code=1)["error"]
    capsys.readouterr()
    for options, words in (
        (["--raw", "--system", "x"], "--system needs --chat"),
        (["--chat", "--special"], "--special needs --raw"),
        (["--special"], "--special needs --raw"),
        (["--raw", "--chat-template", "diffusion-gemma"], "--chat-template needs --chat"),
    ):
        (tmp_path / "o.jsonl").unlink(missing_ok=True)
        assert (
            main(["batch", "-m", path, str(tmp_path / "p.jsonl"), "-o", str(tmp_path / "o.jsonl"), *options])
            == 2
        )
        assert words in capsys.readouterr().err


def test_repeated_ids_are_noted(path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = line("twin", CHAT, {"messages": SORT}) * 2 + line("one", CHAT, {"messages": SORT})
    code, answers = run(path, prompts, tmp_path, "-n", "4")
    assert code == 0 and sorted(answer["custom_id"] for answer in answers) == ["one", "twin", "twin"]
    assert 'lines 1, 2 have the same id, "twin"; each gets an answer' in capsys.readouterr().err


def test_the_options_of_run_batch(path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.jsonl").write_text(line("a", CHAT, {"messages": SORT, "seed": 1}))
    files = ["--input-file", str(tmp_path / "p.jsonl"), "--output-file", str(tmp_path / "o.jsonl")]
    assert main(["batch", *files, "--model", path, "--threads", "1", "-n", "12"]) == 0
    assert json.loads((tmp_path / "o.jsonl").read_text())["custom_id"] == "a"
    for given in ([], ["-i", "p.jsonl", "p.jsonl"]):
        assert main(["batch", "-m", path, "-o", "o.jsonl", *given]) == 2
        assert "as PROMPTS or with -i" in capsys.readouterr().err


def test_fields_of_other_servers(path: str, tmp_path: Path) -> None:
    """By their names they keep the command's own option away; without effect they are listed, or refused."""
    fields = {"prompt": "x", "seed": 1, "steps": 3, "n_predict": 2, "ignore_eos": True, "label": "x"}
    limited = {"prompt": "x", "seed": 1, "steps": 3, "guided_regex": "[ab]{3}", "repeat_penalty": 1.1}
    prompts = line("a", COMPLETION, fields) + json.dumps(fields) + "\n" + json.dumps(limited) + "\n"
    code, answers = run(path, prompts, tmp_path, "-n", "7", "--raw")
    assert code == 0
    by_line = {answer.get("line", 1): answer for answer in answers}
    body = by_line[1]["response"]["body"]
    assert by_line[2]["text"] == body["choices"][0]["text"]
    assert by_line[2]["tokens"] == body["usage"]["completion_tokens"] == 2
    assert by_line[2]["ignored"] == body["diffusion"]["ignored_parameters"] == ["label"]
    assert set(by_line[3]["text"]) <= {"a", "b"} and by_line[3]["ignored"] == ["repeat_penalty"]
    code, answers = run(path, prompts, tmp_path, "--raw", "--retry-errors", "--regex", "c+")
    assert code == 0, "there is nothing to do"
    (tmp_path / "o.jsonl").unlink()
    code, answers = run(path, json.dumps(limited) + "\n", tmp_path, "--raw", "--regex", "c+")
    assert code == 0 and set(answers[0]["text"]) <= {"a", "b"}
    (tmp_path / "o.jsonl").unlink()
    code, answers = run(path, prompts, tmp_path, "--raw", "--strict")
    errors = [json.dumps(answer["error"]) for answer in answers]
    assert code == 1 and all("label" in error or "repeat_penalty" in error for error in errors)


def test_a_temperature_for_all_lines(path: str, tmp_path: Path) -> None:
    """A line's own temperature, or its own t_max, counts instead."""
    rows: list[dict[str, Any]] = [
        {},
        {"temperature": 1, "seed": 1},
        {"t_max": 0.9, "t_min": 0.1, "seed": 1},
        {},
    ]
    prompts = "".join(json.dumps({"messages": SORT, "max_tokens": 9} | row) + "\n" for row in rows)
    code, answers = run(path, prompts, tmp_path, "--temp", "0")
    assert code == 0
    by_line = {answer["line"]: answer for answer in answers}
    with DiffusionModel(path, n_threads=1, n_ctx=256) as model:
        for number, row in enumerate(rows, 1):
            meant = {} if "t_max" in row else at_temperature(row.get("temperature", 0), model.metadata)
            own = {name: value for name, value in row.items() if name != "temperature"}
            done = model.create_chat_completion(SORT, max_tokens=9, **{**meant, **own})
            assert by_line[number]["text"] == done["choices"][0]["message"]["content"]
            assert by_line[number]["steps"] == done["diffusion"]["steps"]
    assert by_line[1]["seed"] == by_line[4]["seed"], "greedy and repeatable"
