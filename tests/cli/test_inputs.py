"""What a shell hands over: byte order marks, other encodings, closed and full streams."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pydiffusion import PyDiffusionError
from pydiffusion.cli import main
from pydiffusion.cli._input import decode, read_schema

PYDIFFUSION = f"{sys.executable} -m pydiffusion"


@pytest.fixture(scope="module")
def model(gguf_file: Callable[..., Path]) -> str:
    return str(gguf_file("tiny", "q8_0"))


def shell(command: str, typed: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["bash", "-c", command], input=typed, capture_output=True, timeout=60)


@pytest.mark.parametrize("text", ["", "a", "für 🙂\r\n", "a\0b", "\ufeffa"])
def test_utf8_is_itself_but_for_a_mark(text: str) -> None:
    assert decode(text.encode(), "it") == text.removeprefix("\ufeff")
    assert decode(text.encode("utf-8-sig"), "it") == text


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
def test_utf16_is_named(encoding: str) -> None:
    with pytest.raises(PyDiffusionError, match="it is UTF-16, as PowerShell"):
        decode("hello there".encode(encoding), "it")


@pytest.mark.parametrize(
    ("data", "at"), [(b"f\xfcr", 1), (b"\xff", 0), (b"ab\xe2\x82", 2), (b"\xed\xa0\x80", 0)]
)
def test_other_bytes_are_refused_with_their_place(data: bytes, at: int) -> None:
    with pytest.raises(ValueError, match=f"it is not valid UTF-8 at byte {at}"):
        decode(data, "it")


def test_a_schema_is_a_text_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text('\ufeff{"type": "null"}', "utf-8")
    assert read_schema(str(tmp_path / "s.json")) == read_schema('{"type": "null"}') == '{"type": "null"}'
    assert read_schema(' \n{"a": 1}') == ' \n{"a": 1}'


def test_a_marked_prompt_and_a_marked_chat(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))

    def run(command: str, text: bytes) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))
        code = main([command, "-m", model, "-n", "4", "--steps", "1", "-s", "1", "-t", "1"])
        return code, *capsys.readouterr()

    marked, plain = run("generate", b"\xef\xbb\xbfhi"), run("generate", b"hi")
    assert marked[:2] == plain[:2] and plain[0] == 0
    alone = run("chat", b"hi\n")
    code, out, err = run("chat", b"\xef\xbb\xbfhi\n\xff\n/clear\nhi\n")
    assert (code, out) == (0, alone[1] * 2) and err.count("left out") == 1
    code, out, err = run("chat", "hi\nyo\n".encode("utf-16"))
    assert (code, out) == (1, "") and "UTF-16" in err
    assert list(tmp_path.iterdir()) == [], "chats in a pipe are not saved"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="NOT CHECKED: a full output; no /dev/full")
def test_closed_and_full_streams(model: str, tmp_path: Path) -> None:
    answer = f"{PYDIFFUSION} generate -m {model} -p hi -n 4 --steps 1 -t 1 -q"
    quiet = f"{PYDIFFUSION} quantize {model} {tmp_path}/o.gguf Q4_0"
    for command, code, said in [
        (f"{answer} >&-", 1, b"output: Bad file descriptor"),
        (f"{answer} >/dev/full", 1, b"output: No space left on device"),
        (f"{PYDIFFUSION} inspect {model} >/dev/full", 1, b"pydiffusion: standard output: No space"),
        (f"{quiet} >&-", 0, b"bits per weight"),  # prints nothing there
        (f"{PYDIFFUSION} generate -m {model} <&-", 1, b"standard input can't be read"),
    ]:
        done = shell(command)
        assert done.returncode == code and said in done.stderr, done.stderr
        assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr
    assert (tmp_path / "o.gguf").read_bytes().startswith(b"GGUF"), "no other file got the number of stdout"


def test_closed_stderr_and_readers_that_leave(model: str) -> None:
    """openvax/mhctools#387, diazoxide/charter#60: also when both streams go to the reader that leaves."""
    closed = shell(f"{PYDIFFUSION} generate -m {model} -p hi -n 4 --steps 1 -s 1 -t 1 2>&-")
    assert closed.returncode == 0 and b"loaded" not in closed.stdout, "stderr does not end up on stdout"
    done = shell(f"set -o pipefail; {PYDIFFUSION} inspect {model} --arrays --tensors 2>&1 | head -n 1")
    assert done.returncode in (0, 1), "0 if all fitted into the pipe"
    assert done.stdout.count(b"\n") == 1 and done.stderr == b""
