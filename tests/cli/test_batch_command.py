"""`pydiffusion batch` and `pydiffusion infill` on the demo model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.demo_model import write_demo_model

from pydiffusion import DiffusionModel
from pydiffusion.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_demo_model(tmp_path_factory.mktemp("demo")))


LINES = [
    '{"prompt": "abc", "id": "first"}',
    '"def"',
    "",
    '{"prompt": "abc", "seed": 3, "regex": "(x|y){4}"}',
    '{"messages": [{"role": "user", "content": "sort: b a"}], "steps": 3}',
    '{"prompt": "abc", "steps": 0}',
    "{not json",
    '{"prompt": "abc", "max_token": 1}',
    '{"prompt": ""}',
    "[1]",
    "null",
    "7",
    '["id"]',
]


def run(model: str, prompts: Path, output: Path, *more: str) -> int:
    options = ("-n", "12", "--steps", "2", "--threads", "1", "--ctx", "128")
    return main(["batch", "-m", model, str(prompts), "-o", str(output), *options, *more])


def read(path: Path) -> dict[int, dict[str, Any]]:
    answers = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    by_line = {answer["line"]: answer for answer in answers}
    assert len(by_line) == len(answers), "no line twice"
    return by_line


def test_every_line_gets_its_answer_or_its_error(model: str, tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text("\n".join(LINES), encoding="utf-8")
    assert run(model, prompts, output, "--seed", "10", "--raw") == 1, "some failed"
    answers = read(output)
    assert sorted(answers) == [1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]
    assert answers[1]["id"] == "first" and answers[1]["seed"] == 10 and answers[2]["seed"] == 11
    assert answers[4]["seed"] == 3 and set(answers[4]["text"]) <= {"x", "y"}
    assert answers[5]["seed"] == 14 and answers[5]["prompt_tokens"] > 5
    messages = {number: answer.get("error", "") for number, answer in answers.items()}
    assert "steps is 0" in messages[6] and "not valid JSON" in messages[7]
    assert "max_token" in messages[8] and "no tokens" in messages[9]
    assert all("object" in messages[number] for number in (10, 11, 12, 13))
    # the same as one by one
    with DiffusionModel(model, n_threads=1, n_ctx=128) as opened:
        alone = opened.generate("def", seed=11, steps=2, max_tokens=12)
    assert (answers[2]["text"], answers[2]["steps"]) == (alone.text, alone.steps)


def test_an_interrupted_batch_resumes(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"p{i}"}) for i in range(8)), encoding="utf-8")
    assert run(model, prompts, output, "--seed", "1") == 0
    whole = read(output)
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:3]) + lines[3][:20])  # killed while writing
    capsys.readouterr()
    assert run(model, prompts, output, "--seed", "1") == 0
    assert "has 3 of 8 answers already" in capsys.readouterr().err
    assert read(output) == whole
    before = output.read_bytes()
    assert run(model, prompts, output, "--seed", "1") == 0 and output.read_bytes() == before
    prompts.write_text(json.dumps({"prompt": "other"}), encoding="utf-8")
    assert run(model, prompts, output) == 1
    assert "answers other prompts" in capsys.readouterr().err and output.read_bytes() == before


def test_errors_are_tried_again_when_asked(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text('"a"\n{"prompt": ""}\n', encoding="utf-8")
    assert run(model, prompts, output, "--seed", "1", "--raw") == 1
    first = read(output)
    assert run(model, prompts, output, "--seed", "1", "--raw") == 1, "nothing left to do, but one has failed"
    error = capsys.readouterr().err
    assert "0 answered, 0 failed" in error and "1 failed in earlier runs: --retry-errors" in error
    assert run(model, prompts, output, "--seed", "1", "--raw", "--retry-errors") == 1
    assert read(output) == first


def test_an_unrelated_output_file_is_not_overwritten(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text('"a"\n')
    output.write_text("my diary\n")
    assert run(model, prompts, output) == 1
    assert "contains a line that is not an answer" in capsys.readouterr().err
    assert output.read_text() == "my diary\n"


def test_infill(model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "text"
    file.write_text("one <|hole:3|> two\n", encoding="utf-8")
    arguments = ["infill", "-m", model, str(file), "--steps", "2", "--seed", "1", "--threads", "1"]
    assert main(arguments) == 0
    out = capfd.readouterr().out
    assert out.startswith("one ") and out.endswith(" two\n")
    assert main([*arguments, "--json"]) == 0
    answer = json.loads(capfd.readouterr().out)
    assert answer["text"] == out and out == f"one {answer['holes'][0]} two\n"
    done = subprocess.run(
        [sys.executable, "-m", "pydiffusion", *arguments[:3], "-", *arguments[4:]],
        input="no hole", capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and "has no hole" in done.stderr and not done.stdout


def test_generate_by_schema(model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "schema.json"
    file.write_text('{"type": "array", "items": {"type": "boolean"}, "maxItems": 3}')
    arguments = ["generate", "-m", model, "-p", "x", "--steps", "2", "--threads", "1", "-n", "40"]
    assert main([*arguments, "--json-schema", str(file)]) == 0
    assert all(isinstance(entry, bool) for entry in json.loads(capfd.readouterr().out))
    assert main([*arguments, "--regex", "(ab)+", "--raw"]) == 0
    assert set(capfd.readouterr().out.strip()) == {"a", "b"}
    assert main([*arguments, "--regex", "(", "--raw"]) == 2
    file.write_text("{")
    assert main([*arguments, "--json-schema", str(file)]) == 2
