"""Conversions resumed after an interruption, a kill or a full disk."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from support import checkpoint_folders as folders

from pydiffusion.cli import main
from pydiffusion.convert import ConversionProgress, convert, quantize
from pydiffusion.convert.gguf import resume as journal
from pydiffusion.convert.gguf import writer as pipeline
from pydiffusion.errors import ConversionError

CHUNK = 20_000  # weights: about 200 chunks


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of an uninterrupted conversion."""
    target = tmp_path_factory.mktemp("whole") / "m.gguf"
    convert(folder, target, "q4_k_m")
    return target.read_bytes()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "CHUNK_WEIGHTS", CHUNK)
    monkeypatch.setattr(journal, "SECONDS_BETWEEN_FLUSHES", 0.0)


def files_in(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


class Counter:
    """Counts the chunks that are computed, and stops at a share of a stage."""

    def __init__(self, stage: str = "", share: float = 2.0, error: type = KeyboardInterrupt):
        self.stage, self.share, self.error = stage, share, error
        self.first: ConversionProgress | None = None
        self.seen: list[ConversionProgress] = []

    def __call__(self, state: ConversionProgress) -> None:
        self.seen.append(state)
        if state.stage == self.stage and state.done_bytes >= self.share * state.total_bytes:
            raise self.error


@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_an_interrupted_conversion_resumes(
    folder: Path, whole: bytes, tmp_path: Path, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "m.gguf"
    with pytest.raises(KeyboardInterrupt):
        convert(folder, target, "q4_k_m", resume=True, progress=Counter("write", share))
    assert files_in(tmp_path) == ["m.gguf.part", "m.gguf.part.journal"]
    computed, right = [], pipeline._convert
    monkeypatch.setattr(pipeline, "_convert", lambda *given: computed.append(0) or right(*given))
    counter = Counter()
    report = convert(folder, target, "q4_k_m", resume=True, progress=counter)
    assert target.read_bytes() == whole
    assert files_in(tmp_path) == ["m.gguf"]
    n_steps = sum(state.stage == "verify" for state in counter.seen)
    n_before = n_steps - len(computed)
    assert n_before > 0 and abs(n_before / n_steps - share) < 0.25
    assert f"resumed: {n_before} of {n_steps} chunks were there" in report.notes
    last = [state for state in counter.seen if state.stage == "write"][-1]
    assert last.resumed_bytes > 0 and last.done_bytes == last.total_bytes


def test_a_conversion_stopped_while_verifying_resumes(folder: Path, whole: bytes, tmp_path: Path) -> None:
    target = tmp_path / "m.gguf"
    with pytest.raises(RuntimeError):
        convert(folder, target, "q4_k_m", resume=True, progress=Counter("verify", 0.5, RuntimeError))
    convert(folder, target, "q4_k_m", resume=True)
    assert target.read_bytes() == whole


def killed(folder: Path, target: Path, more: str = "", kill: bool = True) -> None:
    """Convert in a process that ends by SIGKILL at half of the bytes."""
    code = f"""
        import os, signal
        from pydiffusion.convert import convert
        from pydiffusion.convert.gguf import resume as journal, writer as pipeline
        pipeline.CHUNK_WEIGHTS, journal.SECONDS_BETWEEN_FLUSHES = {CHUNK}, 0.0
        def progress(state):
            if state.stage == "write" and state.done_bytes >= state.total_bytes / 2:
                os.kill(os.getpid(), signal.SIGKILL)
        convert({str(folder)!r}, {str(target)!r}, "q4_k_m", resume=True, progress=progress{more})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL: NOT checked here")
def test_killed_at_half_and_resumed_gives_the_same_file(folder: Path, whole: bytes, tmp_path: Path) -> None:
    target = tmp_path / "m.gguf"
    killed(folder, target)
    assert files_in(tmp_path) == ["m.gguf.part", "m.gguf.part.journal"]
    report = convert(folder, target, "q4_k_m", resume=True)
    assert any(note.startswith("resumed: ") for note in report.notes)
    assert target.read_bytes() == whole


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL: NOT checked here")
def test_a_split_conversion_is_resumed_too(folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    convert(folder, tmp_path / "a/m.gguf", "q4_k_m", split_max_size=700_000)
    killed(folder, tmp_path / "b/m.gguf", ", split_max_size=700_000")
    assert all(".part" in name for name in files_in(tmp_path / "b"))
    convert(folder, tmp_path / "b/m.gguf", "q4_k_m", split_max_size=700_000, resume=True)
    assert files_in(tmp_path / "a") == files_in(tmp_path / "b") and len(files_in(tmp_path / "a")) > 2
    for name in files_in(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("damage", ["half a line", "no part", "short part", "garbage", "too many lines"])
def test_a_damaged_journal_still_gives_the_right_file(
    folder: Path, whole: bytes, tmp_path: Path, damage: str
) -> None:
    target = tmp_path / "m.gguf"
    with pytest.raises(KeyboardInterrupt):
        convert(folder, target, "q4_k_m", resume=True, progress=Counter("write", 0.5))
    part, listed = tmp_path / "m.gguf.part", tmp_path / "m.gguf.part.journal"
    if damage == "half a line":
        listed.write_bytes(listed.read_bytes()[:-7])
    elif damage == "no part":
        part.unlink()
    elif damage == "short part":
        os.truncate(part, 1000)
    elif damage == "garbage":
        listed.write_bytes(os.urandom(500))
    else:
        listed.write_bytes(listed.read_bytes() + (b"0" * 32 + b"\n") * 9999)
    convert(folder, target, "q4_k_m", resume=True)
    assert target.read_bytes() == whole
    assert files_in(tmp_path) == ["m.gguf"]


def test_changed_data_is_found_and_not_resumed_again(folder: Path, whole: bytes, tmp_path: Path) -> None:
    target = tmp_path / "m.gguf"
    with pytest.raises(KeyboardInterrupt):
        convert(folder, target, "q4_k_m", resume=True, progress=Counter("write", 0.9))
    with (tmp_path / "m.gguf.part").open("r+b") as file:
        file.seek(len(whole) // 2)
        byte = file.read(1)
        file.seek(len(whole) // 2)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ConversionError, match=r"different bytes than were written|does not agree"):
        convert(folder, target, "q4_k_m", resume=True)
    assert files_in(tmp_path) == []
    convert(folder, target, "q4_k_m", resume=True)
    assert target.read_bytes() == whole


@pytest.mark.parametrize("change", ["type", "source", "options"])
def test_leftovers_of_another_conversion_are_not_used(folder: Path, tmp_path: Path, change: str) -> None:
    made = folders.make_folder(tmp_path / "made")
    target = tmp_path / "m.gguf"
    with pytest.raises(KeyboardInterrupt):
        convert(made, target, "q4_k_m", resume=True, progress=Counter("write", 0.5))
    type, options = "q4_k_m", {}
    if change == "type":
        type = "q8_0"
    elif change == "source":
        folders.make_folder(tmp_path / "made", tensors=folders.weights(seed=1))
    else:
        options = {"pad": True}
    report = convert(made, target, type, resume=True, **options)
    assert any("another conversion" in note for note in report.notes)
    convert(made, tmp_path / "n.gguf", type, **options)
    assert target.read_bytes() == (tmp_path / "n.gguf").read_bytes()


def test_two_runs_at_once_are_refused(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="NOT CHECKED: locks (no fcntl here)")
    target = tmp_path / "m.gguf"

    def second(state: ConversionProgress) -> None:
        with pytest.raises(ConversionError, match="another run is writing"):
            convert(folder, target, "q4_k_m", resume=True)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(folder, target, "q4_k_m", resume=True, progress=second)


def test_without_resume_nothing_is_kept(folder: Path, whole: bytes, tmp_path: Path) -> None:
    target = tmp_path / "m.gguf"
    with pytest.raises(KeyboardInterrupt):
        convert(folder, target, "q4_k_m", progress=Counter("write", 0.5))
    assert files_in(tmp_path) == []


def test_quantizing_is_resumed_too(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "f32.gguf"
    convert(folder, source, "f32")
    quantize(source, tmp_path / "whole.gguf", "q4_k_m")
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "m.gguf", "q4_k_m", resume=True, progress=Counter("write", 0.5))
    quantize(source, tmp_path / "m.gguf", "q4_k_m", resume=True)
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


@pytest.mark.parametrize("resume", [False, True])
def test_a_disk_that_others_fill_halfway(
    folder: Path, whole: bytes, small_disk: Callable[[str], Path], resume: bool
) -> None:
    disk = small_disk("8m")
    target, ballast = disk / "m.gguf", disk / "ballast"

    def fill(state: ConversionProgress) -> None:
        if state.stage == "write" and state.done_bytes >= state.total_bytes / 2 and not ballast.exists():
            with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while file.write(b"x" * 4096):
                    pass

    with pytest.raises(ConversionError, match=r"m\.gguf.*: No space left on device.*free some space"):
        convert(folder, target, "q4_k_m", resume=resume, progress=fill)
    kept = ["m.gguf.part", "m.gguf.part.journal"] if resume else []
    assert files_in(disk) == ["ballast", *kept]
    ballast.unlink()
    report = convert(folder, target, "q4_k_m", resume=resume)
    assert any(note.startswith("resumed: ") for note in report.notes) == resume
    assert target.read_bytes() == whole
    assert files_in(disk) == ["m.gguf"]


@pytest.mark.parametrize("resume", [False, True])
def test_a_disk_that_is_full_halfway(
    folder: Path, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    """As above, simulated, for machines where no disk can be mounted."""
    target, write, written = tmp_path / "m.gguf", pipeline.atomic.NewFile.write, []

    def limited(new: object, data: memoryview, offset: int | None = None) -> None:
        written.append(memoryview(data).nbytes)
        if sum(written) > len(whole) / 2:
            with pipeline.atomic.explaining(target, "writing failed"):
                raise OSError(28, os.strerror(28))
        write(new, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.atomic.NewFile, "write", limited)
        with pytest.raises(ConversionError, match=r"m\.gguf: writing failed: No space left.*free some space"):
            convert(folder, target, "q4_k_m", resume=resume)
    assert files_in(tmp_path) == (["m.gguf.part", "m.gguf.part.journal"] if resume else [])
    report = convert(folder, target, "q4_k_m", resume=resume)
    assert any(note.startswith("resumed: ") for note in report.notes) == resume
    assert target.read_bytes() == whole


@pytest.mark.skipif(os.name == "nt", reason="SIGINT to one process: NOT checked here")
def test_the_command_says_how_to_resume(folder: Path, whole: bytes, tmp_path: Path) -> None:
    target = tmp_path / "m.gguf"
    code = f"""
        import sys
        from pydiffusion.cli import main
        from pydiffusion.convert.gguf import writer as pipeline
        pipeline.CHUNK_WEIGHTS = {CHUNK}
        write, calls = pipeline._Output.write, []
        def interrupted(*given):
            write(*given)
            calls.append(0)
            if len(calls) == 50:
                raise KeyboardInterrupt
        pipeline._Output.write = interrupted
        sys.exit(main(["convert", {str(folder)!r}, "-o", {str(target)!r}, "--resume"]))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    assert "partial output is kept; run the same command to resume" in done.stderr
    assert main(["convert", str(folder), "-o", str(target), "--resume"]) == 0
    assert target.read_bytes() == whole


def test_progress_rate_and_time_left(folder: Path, tmp_path: Path) -> None:
    from pydiffusion.cli._progress import pace

    counter = Counter()
    convert(folder, tmp_path / "m.gguf", "q8_0", progress=counter)
    for stage in ("write", "verify"):
        last = [state for state in counter.seen if state.stage == stage][-1]
        assert last.done_bytes == last.total_bytes and last.seconds_left == 0
        assert last.bytes_per_second == pytest.approx(last.total_bytes / last.seconds)
    half = ConversionProgress("write", "t", 60 * 10**6, 3660 * 10**6, seconds=2.0, resumed_bytes=40 * 10**6)
    assert half.bytes_per_second == 10e6 and half.seconds_left == 360
    assert pace(half) == "10 MB/s, 6:00 left"
    assert pace(ConversionProgress("write", "t", 0, 10, 0.0)) == ""
