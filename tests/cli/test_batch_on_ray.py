"""examples/batch_on_ray.py: the answers of `pydiffusion batch`, from several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.demo_model import write_demo_model
from support.paths import REPOSITORY
from support.ray_stand_in import stand_in
from support.scripts import load_script

from pydiffusion.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_demo_model(tmp_path_factory.mktemp("demo")))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows: list[Any] = [f"sort: d {c} b" for c in "abcdefghijkl"]
    rows[3] = {"prompt": "x", "steps": 0}
    rows[5] = {
        "custom_id": "r", "method": "POST", "url": "/v1/chat/completions",
        "body": {"messages": [{"role": "user", "content": "sort: d a c"}]},
    }  # fmt: skip
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{not json\n")
    return path


def answers(path: Path) -> dict[str, Any]:
    """By line, or in OpenAI's form by custom_id."""
    rows = [json.loads(raw) for raw in path.read_text().splitlines()]
    by_line = {str(row.get("line", row.get("custom_id"))): row for row in rows}
    assert len(by_line) == len(rows), "no line twice"
    if "r" in by_line:
        message = by_line["r"]["response"]["body"]["choices"][0]["message"]["content"]
        by_line["r"] = message, by_line["r"]["response"]["body"]["diffusion"]["seeds"]
    return by_line


@pytest.fixture
def expected(model: str, prompts: Path, tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "expected.jsonl"
    options = ("--threads", "1", "--seed", "1", "-n", "12")
    assert main(["batch", "-m", model, str(prompts), "-o", str(path), *options]) == 1
    found = answers(path)
    assert found["1"]["text"] == "a b d" and found["r"] == ("a c d", [6]) and len(found) == 13
    assert "error" in found["4"] and "error" in found["13"]
    return found


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setitem(sys.modules, "ray", stand_in())
    return load_script("examples/batch_on_ray.py")


OPTIONS = ("--workers", "2", "--parallel", "1", "--seed", "1", "--max-tokens", "12")


def test_answers_are_those_of_the_command(
    script: ModuleType, model: str, prompts: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    """NOT CHECKED here: Ray itself, for which this runs with a stand-in; see the last test."""
    output = tmp_path / "answers.jsonl"
    assert script.main([str(prompts), str(output), model, *OPTIONS]) == 1, "some failed"
    assert answers(output) == expected
    kept = output.read_text().splitlines(keepends=True)[:5]
    output.write_text("".join(kept) + '{"line": 3, "di')  # a run that was killed
    assert script.main([str(prompts), str(output), model, *OPTIONS]) == 1
    assert answers(output) == expected and output.read_text().startswith("".join(kept))
    whole = output.read_bytes()
    assert script.main([str(prompts), str(output), model, *OPTIONS]) == 1, "errors are kept"
    assert output.read_bytes() == whole


@pytest.mark.slow
def test_on_ray_itself(model: str, prompts: Path, expected: dict[str, Any], tmp_path: Path) -> None:
    if find_spec("ray") is None:
        assert not os.environ.get("PYDIFFUSION_REQUIRE_RAY"), (
            "PYDIFFUSION_REQUIRE_RAY is set, but there is no ray"
        )
        pytest.skip("NOT CHECKED: examples/batch_on_ray.py on Ray itself (pip install 'ray[data]')")
    output = tmp_path / "answers.jsonl"
    command = [sys.executable, str(REPOSITORY / "examples/batch_on_ray.py"), str(prompts), str(output), model]
    done = subprocess.run(
        [*command, *OPTIONS], capture_output=True, text=True, timeout=300,
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert answers(output) == expected
