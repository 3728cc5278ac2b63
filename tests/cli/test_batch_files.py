"""Input and output of `pydiffusion batch`: standard streams, pipes, encodings, full disks, interruptions."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.demo_model import write_demo_model

from pydiffusion.cli import main
from pydiffusion.openai.batch.answer_file import AnswerFile
from pydiffusion.openai.batch.lines import read_input

QUICK = ("-n", "12", "--steps", "2", "--threads", "1", "--ctx", "128", "--seed", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_demo_model(tmp_path_factory.mktemp("demo")))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text('"sort: d a c"\n"sort: b a"\n')
    return path


def run(model: str, prompts: Any, output: Any, *more: str) -> int:
    return main(["batch", "-m", model, str(prompts), "-o", str(output), *QUICK, *more])


@contextmanager
def standard_output(path: Path) -> Iterator[None]:
    """Append what is written to descriptor 1 to a file, as ``>>`` does."""
    saved, file = os.dup(1), os.open(path, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    try:
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(file)


def answers(text: str) -> dict[int, dict[str, Any]]:
    found = [json.loads(line) for line in text.splitlines()]
    assert len({answer["line"] for answer in found}) == len(found), "no line twice"
    return {answer["line"]: answer for answer in found}


def test_standard_input_and_output(model: str, prompts: Path, tmp_path: Path) -> None:
    """A byte order mark and CRLF are no part of a prompt."""
    assert run(model, prompts, tmp_path / "o.jsonl") == 0
    done = subprocess.run(
        [sys.executable, "-m", "pydiffusion", "batch", "-m", model, "-", "-o", "-", *QUICK],
        input=b"\xef\xbb\xbf" + prompts.read_bytes().replace(b"\n", b"\r\n"),
        capture_output=True, cwd=tmp_path, timeout=60, check=True,
    )  # fmt: skip
    assert answers(done.stdout.decode()) == answers((tmp_path / "o.jsonl").read_text())
    assert b"2 answered, 0 failed: standard output" in done.stderr and not (tmp_path / "-").exists()


def test_pipes_and_devices(model: str, prompts: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As of process substitution, <(...) and >(...)."""
    (read_in, write_in), (read_out, write_out) = os.pipe(), os.pipe()
    os.write(write_in, prompts.read_bytes())
    os.close(write_in)
    assert run(model, f"/dev/fd/{read_in}", f"/dev/fd/{write_out}") == 0
    os.close(write_out)
    with os.fdopen(read_out) as file:
        assert sorted(answers(file.read())) == [1, 2]
    os.close(read_in)
    assert run(model, prompts, "/dev/null") == 0
    assert "2 answered, 0 failed: /dev/null" in capfd.readouterr().err


def test_a_named_pipe_with_a_writer(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def write() -> None:
        with contextlib.suppress(BrokenPipeError), pipe.open("wb") as file:  # waits for a reader
            file.write(b"text")

    read = b""
    while read != b"text":
        writer = threading.Thread(target=write)
        writer.start()
        while writer.is_alive() and not read:  # it may not be there yet
            with contextlib.suppress(ValueError):
                read = read_input(pipe)
        writer.join()


def test_full_device(model: str, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, prompts, "/dev/full") == 1
    assert "/dev/full: writing failed: No space left on device" in capsys.readouterr().err


def test_full_disk_loses_nothing(
    model: str, tmp_path: Path, small_disk: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, output = tmp_path / "prompts.jsonl", small_disk("64k") / "answers.jsonl"
    prompts.write_text("".join(f'{{"prompt": "p{i}", "id": "{"x" * 9000}"}}\n' for i in range(9)))
    assert run(model, prompts, output) == 1
    assert "No space left on device" in capsys.readouterr().err
    kept = output.read_text()
    assert kept.endswith("\n") and 0 < len(answers(kept)) < 9
    (tmp_path / "moved.jsonl").write_text(kept)
    assert run(model, prompts, tmp_path / "moved.jsonl") == 0
    assert sorted(answers((tmp_path / "moved.jsonl").read_text())) == list(range(1, 10))


@pytest.mark.parametrize(
    ("source", "output", "words"),
    [
        ("prompts.jsonl", "prompts.jsonl", "is the file of prompts and of answers"),
        ("prompts.jsonl", ".", "is a folder"),
        (".", "o.jsonl", "is a folder"),
        ("prompts.jsonl", "no/o.jsonl", "no such folder"),
        ("none.jsonl", "o.jsonl", "none.jsonl: No such file"),
        ("pipe", "o.jsonl", "no program writes into this pipe"),
        ("prompts.jsonl", "pipe", "no program reads this pipe"),
    ],
)
def test_refused_at_once(
    prompts: Path, tmp_path: Path, source: str, output: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without loading the model, which isn't there, and with nothing left behind."""
    os.mkfifo(tmp_path / "pipe")
    before = prompts.read_bytes()
    assert run("none.gguf", tmp_path / source, tmp_path / output) == 1
    assert words in capsys.readouterr().err
    assert prompts.read_bytes() == before and {p.name for p in tmp_path.iterdir()} == {
        "prompts.jsonl",
        "pipe",
    }


def test_standard_streams_that_are_refused(
    prompts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = prompts.read_bytes()
    with standard_output(prompts):
        assert run("none.gguf", prompts, "-") == 1
    assert "is the file of prompts and of answers" in capsys.readouterr().err
    with prompts.open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert run("none.gguf", "-", prompts) == 1
    assert "is the file of prompts and of answers" in capsys.readouterr().err
    assert prompts.read_bytes() == before


def test_standard_streams_that_are_closed(
    prompts: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    saved, null = os.dup(1), os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 1)  # as the command line does with a closed one
    try:
        assert run("none.gguf", prompts, "-") == 1
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(null)
    assert "standard output is closed: give a file with -o" in capfd.readouterr().err
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(ValueError, match="standard output is closed"):
        AnswerFile(Path("-"), [], source=prompts)
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ValueError, match="standard input is closed"):
        read_input(Path("-"))


def test_plain_lines(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, output = tmp_path / "prompts.txt", tmp_path / "o.jsonl"
    prompts.write_bytes(b"sort: d a c\n\nsort: b\xff a\n")
    assert run(model, prompts, output) == 1
    assert "no line is JSON (line 1: 'sort: d a c')" in capsys.readouterr().err and not output.exists()
    assert run(model, prompts, output, "--lines") == 1
    found = answers(output.read_text())
    assert found[1]["text"] == "a c d" and found[3]["error"] == "not UTF-8: byte 0xff at 8"


def test_a_run_interrupted_by_ctrl_c_resumes(model: str, tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "o.jsonl"
    rows = ({"prompt": f"sort: {i} a", "id": "x" * 1000} for i in range(300))  # more than a pipe holds unread
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "pydiffusion", "batch", "-m", model, *QUICK, str(prompts), "-o", "-"]
    with output.open("wb") as file:
        # Unbuffered: `communicate` would not get what was read beyond the first line.
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
        assert process.stdout is not None and process.stderr is not None
        file.write(process.stdout.readline())  # once there is an answer
        process.send_signal(signal.SIGINT)
        rest, error = process.communicate(timeout=60)
        file.write(rest)
    assert process.returncode == 130 and b" of 300 answered" in error and b"Traceback" not in error
    assert 0 < len(answers(output.read_text())) < 300
    prompts.write_text("".join(prompts.read_text().splitlines(keepends=True)[:20]))
    kept = [raw for raw in output.read_text().splitlines(keepends=True) if json.loads(raw)["line"] <= 20]
    output.write_text("".join(kept) + '{"line": 3, "dig')
    assert run(model, prompts, output) == 0
    assert sorted(answers(output.read_text())) == list(range(1, 21))
    assert output.read_text().startswith("".join(kept))


def test_answers_that_are_kept(model: str, prompts: Path, tmp_path: Path) -> None:
    """A last line without its end, and a link to a file elsewhere, stay what they are."""
    (tmp_path / "there").mkdir()
    output, target = tmp_path / "o.jsonl", tmp_path / "there" / "o.jsonl"
    prompts.write_text('"sort: d a c"\n{"prompt": "x", "steps": 0}\n')
    output.symlink_to(target)
    assert run(model, prompts, output) == 1
    whole = answers(target.read_text())
    target.write_text(target.read_text().rstrip("\n"))
    assert run(model, prompts, output) == 1 and answers(target.read_text()) == whole
    assert target.read_text().endswith("\n")
    assert run(model, prompts, output, "--retry-errors") == 1 and answers(target.read_text()) == whole
    assert output.is_symlink()


def test_answers_to_raw_prompts_are_not_mixed_with_others(
    model: str, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "o.jsonl"
    assert run(model, prompts, output, "--raw") == 0
    before = output.read_bytes()
    capsys.readouterr()
    assert run(model, prompts, output) == 1
    error = capsys.readouterr().err
    assert "answers other prompts" in error and "--raw" in error and output.read_bytes() == before
    assert run(model, prompts, output, "--raw") == 0 and output.read_bytes() == before


def test_another_run_into_the_same_file(
    model: str, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "o.jsonl"
    with AnswerFile(output, [], source=prompts):
        assert run(model, prompts, output) == 1
        assert "another run writes into this file" in capsys.readouterr().err
    assert run(model, prompts, output) == 0


def test_a_reader_that_leaves(model: str, tmp_path: Path) -> None:
    """As in ``| head -n 1``: no traceback."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text((json.dumps({"prompt": "sort: b a", "id": "x" * 1000}) + "\n") * 300)
    read, write = os.pipe()
    command = [sys.executable, "-m", "pydiffusion", "batch", "-m", model, *QUICK, str(prompts), "-o", "-"]
    process = subprocess.Popen(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    with os.fdopen(read) as file:
        assert json.loads(file.readline())["line"]
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in error


def test_no_lines(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, "/dev/null", tmp_path / "o.jsonl") == 0
    assert "0 answered, 0 failed" in capsys.readouterr().err
    assert (tmp_path / "o.jsonl").read_bytes() == b""
