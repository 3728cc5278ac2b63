"""benchmarks/gpu.py, with the processor in a GPU's place: so that it runs when there is one."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_page(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every kind of case but the limits, whose product takes long; what failed is said, and tried again."""
    results = tmp_path / "results.jsonl"
    given = [
        "--device", "host", "--shape", "tiny", "--types", "q8_0", "--prompts", "16", "--answers", "20:512",
        "--steps", "2", "--memory", "1G", "--memory-prompt", "16", "--threads", "1",
        "--folder", str(tmp_path), "--results", str(results),
    ]  # fmt: skip
    kinds = ["--only", "steps", "answers", "memory"]
    script.main([*given, *kinds])
    page = capsys.readouterr().out
    entries = [json.loads(line) for line in results.read_text().splitlines()]
    assert [entry["case"]["kind"] for entry in entries] == ["steps", "answers", "steps"]
    assert all("error" not in entry["figures"] for entry in entries), entries
    figures = entries[1]["figures"]
    assert len(figures["blocks"]) == 2 and len(figures["commits"]) == 1
    assert figures["first_canvas"] < figures["total"]
    for row in (
        "| q8_0 | 16 | ",
        "| q8_0 | 20 | 512 | 2 | ",
        "| q8_0 | 1.07 | 16 | 2 | 0 | ",
        "| experts | ",
    ):
        assert row in page, page
    script.main([*given, *kinds, "--prompts", "16", "400000"])
    page = capsys.readouterr().out
    assert len(results.read_text().splitlines()) == 4 and "exit 1: " in page
    script.main([*given, *kinds, "--prompts", "16", "400000", "--seconds", "0"])
    captured = capsys.readouterr()
    assert len(results.read_text().splitlines()) == 4 and "the time is up" in captured.err
