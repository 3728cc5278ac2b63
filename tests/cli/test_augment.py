"""examples/augment.py on the demo model: valid by the schema, repeatable, resumable, no near-duplicates."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
from support.demo_model import write_demo_model
from support.scripts import load_script

if find_spec("rapidfuzz") is None:
    pytest.skip("NOT CHECKED: examples/augment.py (pip install rapidfuzz)", allow_module_level=True)

SEEDS = [{"name": "Ada", "age": 34, "city": "Rome"}, {"name": "Otto", "age": 71, "city": "Graz"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 2, "maxLength": 12},
        "age": {"type": "integer", "minimum": 10, "maximum": 99},
        "city": {"type": "string", "minLength": 2, "maxLength": 12},
    },
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}
VALUES = {"name": ["Ada", "Olga", "Noah"], "age": [20, 34, 57], "city": ["Rome", "Oslo", "Lima"]}
TASK = "json: $name is $age and lives in $city."


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("examples/augment.py")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_demo_model(tmp_path_factory.mktemp("demo")))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "seeds.jsonl").write_text("".join(json.dumps(seed) + "\n" for seed in SEEDS))
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    (tmp_path / "values.json").write_text(json.dumps(VALUES))
    return tmp_path


def run(script: ModuleType, model: str, folder: Path, n: int, *more: str, output: str = "new.jsonl") -> int:
    arguments = [folder / "seeds.jsonl", folder / "schema.json", model, "-o", folder / output, "-n", n]
    options = (
        "--threads",
        "1",
        "--task",
        TASK,
        "--values",
        str(folder / "values.json"),
        "--option",
        "steps=3",
    )
    code = script.main([*map(str, arguments), *options, *more])
    assert isinstance(code, int)
    return code


def records(path: Path) -> list[Any]:
    return [json.loads(raw) for raw in path.read_text().splitlines()]


def test_records_are_new_valid_repeatable_and_resumed(
    script: ModuleType, model: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(script, model, files, 6, "--parallel", "3") == 0
    made = records(files / "new.jsonl")
    assert len(made) == 6 and len({json.dumps(record) for record in made}) == 6
    for record in made:
        jsonschema.validate(record, SCHEMA)
        assert record not in SEEDS
    error = capsys.readouterr().err
    assert "6 records, 6 of them new" in error and "records/s" in error
    # fewer sequences at a time; a run that was interrupted while it wrote; more records than before
    journal = files / "new.jsonl.answers"
    (files / "cut.jsonl.answers").write_text(
        "".join(journal.read_text().splitlines(keepends=True)[2:5]) + '{"l'
    )
    for n, parallel, output in ((6, "1", "other.jsonl"), (6, "2", "cut.jsonl"), (4, "2", "fewer.jsonl")):
        assert run(script, model, files, n, "--parallel", parallel, output=output) == 0
        assert records(files / output) == made[:n]
    assert run(script, model, files, 6, output="fewer.jsonl") == 0
    assert records(files / "fewer.jsonl") == made
    seeds = [json.loads(raw)["seed"] - json.loads(raw)["line"] for raw in journal.read_text().splitlines()]
    assert set(seeds) == {0}, "the random seed follows the number"
    capsys.readouterr()
    before = journal.read_bytes()
    assert run(script, model, files, 6) == 0 and journal.read_bytes() == before
    assert "6 records, 0 of them new" in capsys.readouterr().err


def test_near_duplicates_are_dropped(
    script: ModuleType, model: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two ages make two records, which are near-duplicates of each other."""
    (files / "values.json").write_text(json.dumps({"name": ["Olga"], "age": [20, 21], "city": ["Oslo"]}))
    assert run(script, model, files, 3, "--tries", "2") == 1
    assert len(records(files / "new.jsonl")) == 1
    error = capsys.readouterr().err
    assert "5 near-duplicates dropped" in error and "2 records are missing" in error
    assert run(script, model, files, 3, "--tries", "2", "--similar", "1.0") == 1
    ages = [record["age"] for record in records(files / "new.jsonl")]
    assert sorted(ages) == sorted(set(ages)) and len(ages) > 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "about $town"], "--task: 'town' is not $examples, nor a name in --values"),
        (["--option", "stepz=3"], "unknown option 'stepz'"),
        (["--task", "another one"], "answers other prompts"),
        (["--option", "steps=0"], "steps is 0"),
    ],
)
def test_what_is_refused(
    script: ModuleType, model: str, files: Path, arguments: list[str], words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if "another one" in arguments:
        assert run(script, model, files, 1) == 0
    assert run(script, model, files, 1, *arguments) == 1
    assert words in capsys.readouterr().err


def test_wrong_arguments_and_files(
    script: ModuleType, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        run(script, "none.gguf", files, 0)
    assert end.value.code == 2 and "n is 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(script, "none.gguf", files, 1, "--similar", "90")
    assert "similar is 90" in capsys.readouterr().err
    assert run(script, "none.gguf", files, 1) == 1 and "there is no such file" in capsys.readouterr().err
    assert run(script, "none.gguf", files, 1, output="seeds.jsonl") == 1
    assert (
        "one of the files that are read" in capsys.readouterr().err
        and records(files / "seeds.jsonl") == SEEDS
    )
    (files / "seeds.jsonl").write_text('{"a": 1}\n\n{"a"\n')
    assert run(script, "none.gguf", files, 1) == 1 and "line 3 is not valid JSON" in capsys.readouterr().err
    (files / "seeds.jsonl").write_text("\n")
    assert run(script, "none.gguf", files, 1) == 1 and "has no records" in capsys.readouterr().err
