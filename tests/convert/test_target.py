"""Atomic writing: the target is complete or absent, whatever goes wrong."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support import checkpoint_folders as folders

from pydiffusion import _native
from pydiffusion._util import atomic
from pydiffusion.convert import convert
from pydiffusion.convert.gguf import rows
from pydiffusion.convert.gguf import writer as pipeline
from pydiffusion.errors import ConversionError


def files_in(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


class Stop(Exception):
    pass


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, SystemExit, BrokenPipeError])
@pytest.mark.parametrize("stage", ["write", "verify"])
def test_an_interruption_leaves_the_old_file(folder: Path, tmp_path: Path, stage: str, error: type) -> None:
    target = tmp_path / "m.gguf"
    target.write_bytes(b"old")

    def stop(step: object) -> None:
        assert any(name.endswith(".part") for name in files_in(tmp_path))
        if step.stage == stage:
            raise error

    with pytest.raises(error):
        convert(folder, target, "q8_0", progress=stop)
    assert files_in(tmp_path) == ["m.gguf"]
    assert target.read_bytes() == b"old"


def run_child(folder: Path, target: Path, body: str) -> subprocess.Popen:
    """A Python process that converts, with ``body`` run at each progress call (``step``)."""
    code = f"""
        import os, sys, time
        from pydiffusion.convert import convert
        from pydiffusion.errors import ConversionError
        def progress(step):
            {body}
        try:
            convert({str(folder)!r}, {str(target)!r}, "q8_0", progress=progress)
        except ConversionError as error:
            print(error)
            sys.exit(1)
    """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals: NOT checked here")
@pytest.mark.parametrize(("name", "status"), [("SIGTERM", -15), ("SIGHUP", -1), ("SIGINT", None)])
def test_signals_remove_the_temporary_file(
    folder: Path, tmp_path: Path, name: str, status: int | None
) -> None:
    # Many short sleeps: a signal just before a long one is seen by Python only at that one's end.
    body = "print('busy', flush=True); [time.sleep(0.01) for _ in range(3000)]"
    child = run_child(folder, tmp_path / "m.gguf", body)
    assert child.stdout.readline().strip() == "busy"
    assert [entry.endswith(".part") for entry in files_in(tmp_path)] == [True]
    child.send_signal(getattr(signal, name))
    child.communicate(timeout=20)
    assert child.returncode == status if status is not None else child.returncode != 0
    assert files_in(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="POSIX limits: NOT checked here")
def test_a_file_size_limit_is_a_clear_error(folder: Path, tmp_path: Path) -> None:
    body = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    child = run_child(folder, tmp_path / "m.gguf", body)
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 1, output
    assert "writing failed" in output
    assert len(output.strip().splitlines()) == 1
    assert files_in(tmp_path) == []


def test_a_full_disk_is_seen_before_writing(folder: Path, small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("1m")
    with pytest.raises(ConversionError, match=r"not enough space: the file needs 3\.\d MB, 1\.0 MB are free"):
        convert(folder, disk / "m.gguf", "q8_0")
    assert files_in(disk) == []


def test_a_disk_that_fills_up_while_writing(
    folder: Path, small_disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = small_disk("1m")
    monkeypatch.setattr(atomic, "require_free_space", lambda folder, n_bytes: None)
    with pytest.raises(ConversionError, match=r"m\.gguf: writing failed: No space left.*free some space"):
        convert(folder, disk / "m.gguf", "q8_0")
    assert files_in(disk) == []


def test_free_space_is_checked_up_front(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(ConversionError, match="not enough space"):
        convert(folder, tmp_path / "m.gguf", "q8_0")
    assert files_in(tmp_path) == []


def test_invalid_targets(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="nowhere: no such folder"):
        convert(folder, tmp_path / "nowhere" / "m.gguf", "q8_0")
    with pytest.raises(ConversionError, match="is a folder"):
        convert(folder, tmp_path, "q8_0")
    with pytest.raises(ConversionError, match="not a regular file"):
        convert(folder, "/dev/null", "q8_0")
    (tmp_path / "m.gguf").write_bytes(b"old")
    with pytest.raises(ConversionError, match="already exists"):
        convert(folder, tmp_path / "m.gguf", "q8_0", overwrite=False)
    assert (tmp_path / "m.gguf").read_bytes() == b"old"


def test_names_that_the_system_refuses(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="can't be written: File name too long"):
        convert(folder, tmp_path / ("m" * 250), "q8_0")
    with pytest.raises(ConversionError, match="can't be read: File name too long"):
        convert(tmp_path / ("m" * 300), tmp_path / "m.gguf", "q8_0")
    assert files_in(tmp_path) == []


def test_a_file_within_the_checkpoint_folder_may_be_written_again(tmp_path: Path) -> None:
    made = folders.make_folder(tmp_path / "small")
    for _ in range(2):
        convert(made, made / "small.gguf", "q8_0")
    assert (made / "small.gguf").read_bytes()[:4] == b"GGUF"


def test_a_read_only_folder(folder: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    if os.access(locked, os.W_OK):
        # root may write anywhere except where the kernel refuses
        if not Path("/proc/self").exists():
            pytest.skip("running as root without /proc: a read-only folder was NOT checked")
        locked = Path("/proc/self")
    with pytest.raises(ConversionError, match="can't be written"):
        convert(folder, locked / "m.gguf", "q8_0")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "chat_template.jinja"])
def test_no_source_file_is_overwritten(tmp_path: Path, name: str) -> None:
    made = folders.make_folder(tmp_path / "small")
    link = tmp_path / "link.gguf"
    link.symlink_to(made / name)
    before = (made / name).read_bytes()
    for target in (made / name, link):
        with pytest.raises(ConversionError, match="one of the files being read"):
            convert(made, target, "q8_0")
    assert (made / name).read_bytes() == before


def test_a_link_keeps_pointing_to_the_new_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "real.gguf").write_bytes(b"old")
    (tmp_path / "link.gguf").symlink_to("real.gguf")
    convert(folder, tmp_path / "link.gguf", "q8_0")
    assert (tmp_path / "link.gguf").is_symlink()
    assert (tmp_path / "real.gguf").read_bytes()[:4] == b"GGUF"
    assert files_in(tmp_path) == ["link.gguf", "real.gguf"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes: NOT checked here")
def test_the_file_has_usual_permissions(folder: Path, tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        convert(folder, tmp_path / "m.gguf", "q8_0")
    finally:
        os.umask(umask)
    assert (tmp_path / "m.gguf").stat().st_mode & 0o777 == 0o640


def test_a_shard_that_shrinks_while_reading(tmp_path: Path) -> None:
    made = folders.make_folder(tmp_path / "small")

    def shrink(_: object) -> None:
        with (made / "model.safetensors").open("r+b") as file:
            file.truncate(50_000)

    with pytest.raises(ConversionError, match=r"model\.safetensors: truncated by \d+ bytes"):
        convert(made, tmp_path / "m.gguf", "q8_0", progress=shrink)
    assert files_in(tmp_path) == ["small"]


@pytest.mark.parametrize("type", ["f32", "bf16", "q8_0", "q4_k_m"])
@pytest.mark.parametrize("place", ["header", "data"])
def test_a_changed_byte_on_disk_is_found(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, type: str, place: str
) -> None:
    """Between writing and verifying, one bit of the temporary file flips."""
    sync = atomic.NewFile.sync

    def damage(new: atomic.NewFile) -> None:
        sync(new)
        number = new.file.fileno()
        offset = 3_000 if place == "header" else os.fstat(number).st_size // 2
        byte = os.pread(number, 1, offset)
        os.pwrite(number, bytes([byte[0] ^ 1]), offset)

    monkeypatch.setattr(atomic.NewFile, "sync", damage)
    with pytest.raises(ConversionError):
        convert(folder, tmp_path / "m.gguf", type)
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("type", ["f16", "q8_0", "q4_k_m", "mxfp4", "q2_k", "iq4_xs", "tq2_0"])
def test_wrong_rows_are_found_by_verification(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, type: str
) -> None:
    """A quantizer that swaps rows writes exactly what it computed; only comparing weights finds it."""
    right = rows.convert_rows

    def mixed_up(data: np.ndarray, *types: object, **choices: object) -> np.ndarray:
        return right(data[::-1].copy(), *types, **choices)

    monkeypatch.setattr(rows, "convert_rows", mixed_up)
    with pytest.raises(ConversionError, match="does not agree with the source"):
        convert(folder, tmp_path / "m.gguf", type)
    assert files_in(tmp_path) == []


def test_chunks_do_not_change_the_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(folder, tmp_path / "a.gguf", "q4_k_m")
    monkeypatch.setattr(pipeline, "CHUNK_WEIGHTS", 1000)  # three rows of 256
    convert(folder, tmp_path / "b.gguf", "q4_k_m", n_threads=1)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_threads_do_not_wait_for_a_large_chunk_before_small_ones() -> None:
    """Nor do they run far ahead of it with large ones, which would fill the memory."""
    last = threading.Event()
    many = [pipeline._Step(number, 0, [], 1000) for number in range(40)]

    def wait_for_last(step: pipeline._Step) -> bool:
        if step.number == 39:
            last.set()
        return step.number > 0 or last.wait(60)

    done = list(pipeline._in_order(wait_for_last, iter(many), 2))
    assert [step for step, _ in done] == many and all(result for _, result in done)

    begun: list[int] = []
    large = [pipeline._Step(number, 0, [], pipeline.CHUNK_WEIGHTS) for number in range(40)]
    for n_done, (step, _) in enumerate(pipeline._in_order(lambda s: begun.append(s.number), iter(large), 2)):
        assert step.number == n_done and len(begun) <= n_done + 5


def test_temporary_names_do_not_collide(folder: Path, tmp_path: Path) -> None:
    """Two conversions to one target at once: the later rename wins, both are whole."""
    body = "time.sleep(0.002)"
    children = [run_child(folder, tmp_path / "m.gguf", body) for _ in range(2)]
    started = time.monotonic()
    for child in children:
        output, _ = child.communicate(timeout=60)
        assert child.returncode == 0, output
    assert time.monotonic() - started < 60
    assert files_in(tmp_path) == ["m.gguf"]
    convert(folder, tmp_path / "n.gguf", "q8_0")
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "n.gguf").read_bytes()
    assert re.match(rb"GGUF", (tmp_path / "m.gguf").read_bytes())


@pytest.mark.parametrize(
    "kind", ["zeros", "ones", "offset", "spikes", "heavy", "tiny", "large", "one-sided", "steps"]
)
@pytest.mark.parametrize("type", ["Q8_0", "Q6_K", "Q5_0", "Q4_K"])
def test_odd_weights_pass_the_comparison(kind: str, type: str) -> None:
    """The bound must refuse wrong data, never weights that are merely unusual."""
    random = np.random.default_rng(4)
    normal = random.standard_normal((64, 512)).astype(np.float32)
    values = {
        "zeros": normal * 0,
        "ones": normal * 0 + 1,
        "offset": normal * 0.01 + 5,
        "spikes": np.where(random.random(normal.shape) < 0.01, 10.0, 0.001 * normal),
        "heavy": random.standard_cauchy(normal.shape),
        "tiny": normal * 1e-12,
        "large": normal * 1e4,
        "one-sided": np.abs(normal),
        "steps": np.repeat(10.0 ** random.integers(-4, 3, (64, 16)), 32, axis=1) * normal,
    }[kind].astype(np.float32)
    written = _native.quantize_rows(values, type, 1)
    rows.check_rows(written, values.view(np.uint8), "F32", type, 512, kind)
    if kind not in ("zeros", "ones", "offset", "tiny", "heavy"):
        with pytest.raises(ConversionError):
            rows.check_rows(written[::-1].copy(), values.view(np.uint8), "F32", type, 512, kind)
