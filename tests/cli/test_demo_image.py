"""``pydiffusion demo --image``: a sudoku is drawn, read and solved."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("PIL", reason="NOT CHECKED: pydiffusion demo --image; Pillow is not installed")

from PIL import Image

from pydiffusion import demo
from pydiffusion.cli import main
from pydiffusion.demo import sudoku, tasks


def test_a_drawn_sudoku_is_read_and_solved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    picture = tmp_path / "puzzle.png"
    arguments = ["demo", "--image", "--picture", str(picture), "--puzzle", "3", "--seed", "1"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    puzzle, _ = demo.puzzles()[3]
    prompt = tasks.sudoku_prompt(puzzle)
    read, verdict_read, answer, verdict = out.rstrip("\n").split("\n\n")
    assert Image.open(picture).format == "PNG"
    assert f"drew the puzzle to {picture}" in err
    assert (read == sudoku.as_rows(puzzle)) == (verdict_read == "Every cell read right.")
    n_right = sum(a == b for a, b in zip(read, sudoku.as_rows(puzzle), strict=True))
    assert n_right >= 39, "at most two cells of a picture are misread"
    assert verdict.startswith("Right." if tasks.check("sudoku", prompt, answer) else "Wrong. It should be:\n")
    before = picture.read_bytes()
    assert main(arguments) == 0
    again, err = capsys.readouterr()
    assert again == out and picture.read_bytes() == before, "a seed repeats the picture and the answer"
    assert "converted" not in err, "the second run finds both files in the cache"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--picture", "x.png"], "--picture goes with --image"),
        (["--image", "--task", "sort"], "--image goes with --task sudoku"),
        (["--image", "--picture", "no/such/folder/x.png"], "can't be written"),
    ],
)
def test_mistakes_are_usage_errors(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_without_pillow_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert main(["demo", "--image"]) == 2
    assert "pillow" in " ".join(capsys.readouterr().err.split())
