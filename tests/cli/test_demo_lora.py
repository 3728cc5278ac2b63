"""``pydiffusion demo --lora``: a sudoku without the adapter and with it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pydiffusion.cli import main
from pydiffusion.demo import sudoku, upright


def test_a_puzzle_without_and_with_the_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["demo", "--lora", "--puzzle", "5", "--seed", "1", "--steps", "24"]) == 0
    out, err = capsys.readouterr()
    puzzle, solution = upright.held_out_puzzles(6)[5]
    prompt, _, before, verdict_before, _, after, verdict_after, _, shown = out.rstrip("\n").split("\n\n")
    assert prompt == "sudoku\n" + sudoku.as_rows(puzzle)
    assert shown == sudoku.as_rows(solution)
    assert before != after, "the adapter changes the answer"
    for answer, verdict in ((before, verdict_before), (after, verdict_after)):
        right = "Right" if upright.check(puzzle, answer) else "Wrong"
        assert re.fullmatch(rf"{right}, after \d+ steps\.", verdict)
    assert "held-out puzzle 5 of 100" in err
    given = ["demo", "--lora", "--puzzle", "5", "--seed", "1", "--steps", "24", str(upright.adapter_path())]
    assert main(given) == 0
    assert capsys.readouterr().out == out, "the package's adapter, given by its path"
    assert main([*given[:-1], f"{upright.adapter_path()}:0"]) == 0
    again = capsys.readouterr().out.split("\n\n")
    assert again[2] == again[5] == before, "an adapter of scale 0 changes nothing"


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["--lora", "--image"], "--lora goes with --task sudoku and without --image", 2),
        (["--lora", "--task", "sort"], "--lora goes with --task sudoku and without --image", 2),
        (["some-adapter"], "some-adapter: an adapter goes with --lora", 2),
        (["--lora", "--puzzle", "100"], "--puzzle is 100; with --lora permitted is 0 to 99", 2),
        (["--lora", "no-such-adapter"], "no-such-adapter: there is no such adapter", 1),
    ],
)
def test_mistakes(
    arguments: list[str],
    message: str,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["demo", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == "" and message in " ".join(err.split())
