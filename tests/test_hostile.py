"""Broken files and wrong arguments: each gives a typed Python error of one line, and the process lives."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf_mutator import RawGguf, read_gguf
from hostile_cases import CASES, REFUSED
from hostile_worker import CALLS

#: Seconds that any one case may take; most take milliseconds.
TIME_LIMIT = 60.0

FORMAT_ERRORS = {"ModelFormatError", "UnsupportedModelError"}


class Worker:
    """A process that opens files for us, started again whenever one of them kills it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.answers: queue.Queue[str] = queue.Queue()

    def ask(self, path: Path, call: str | None = None) -> dict:
        """The worker's answer; a crash or a hang fails the test and says which."""
        if self.process is None:
            self.start()
        self.process.stdin.write(json.dumps({"path": str(path), "call": call}) + "\n")
        self.process.stdin.flush()
        try:
            line = self.answers.get(timeout=TIME_LIMIT)
        except queue.Empty:
            self.stop()
            pytest.fail(f"took more than {TIME_LIMIT:.0f} s")
        if not line:
            status = self.process.wait()
            self.errors.seek(0)
            errors = self.errors.read()[-2000:]
            self.stop()
            pytest.fail(f"the process died with status {status}: {errors}")
        return json.loads(line)

    def start(self) -> None:
        command = [sys.executable, str(Path(__file__).parent / "hostile_worker.py")]
        pipe = subprocess.PIPE
        # A file, not a pipe: nobody reads it before the process is dead, and a full pipe would stop it.
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed in stop()
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.errors, text=True)
        self.answers = queue.Queue()
        threading.Thread(target=self.listen, args=(self.process, self.answers), daemon=True).start()

    @staticmethod
    def listen(process: subprocess.Popen[str], answers: queue.Queue[str]) -> None:
        for line in process.stdout:
            answers.put(line)
        answers.put("")

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.errors.close()
            self.process = None


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.stop()


@pytest.fixture(scope="module")
def good(gguf_file: Callable[..., Path]) -> RawGguf:
    """A whole small file, taken apart."""
    return read_gguf(gguf_file("tiny", "f32"))


def assert_refused(answer: dict, kinds: set[str], names: str, path: Path) -> None:
    assert not answer["ok"], f"opened without complaint: {answer}"
    assert set(answer["kinds"]) & kinds, answer
    message = answer["message"]
    if "TypeError" in answer["kinds"] and "incompatible function arguments" in message:
        # The bindings' own words, which only callers of the private module see; public calls get one line.
        message = message.splitlines()[0] + names
    assert message and "\n" not in message, f"not one line: {message!r}"
    assert names in message.replace(str(path), ""), f"{names!r} is not named in: {message}"


def test_the_good_file_opens(worker: Worker, good: RawGguf, gguf_file: Callable, tmp_path: Path) -> None:
    """Without this, the others could pass because nothing opens; what the mutator writes is what it read."""
    path = good.write(tmp_path / "good.gguf")
    assert path.read_bytes() == gguf_file("tiny", "f32").read_bytes()
    assert worker.ask(path)["ok"]
    assert worker.ask(path, "use in python")["ok"]


@pytest.mark.parametrize("name", CASES)
def test_broken_file(name: str, worker: Worker, good: RawGguf, tmp_path: Path) -> None:
    case = CASES[name]
    path = tmp_path / "broken.gguf"
    broken = case.make(good.copy())
    path.write_bytes(broken if isinstance(broken, bytes) else broken.to_bytes())
    answer = worker.ask(path, "use in python" if case.in_python else None)
    assert_refused(answer, {case.error} if case.error else FORMAT_ERRORS, case.names, path)


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_argument(name: str, worker: Worker, gguf_file: Callable[..., Path]) -> None:
    kind, names = REFUSED[name]
    path = gguf_file("tiny", "f32")
    assert_refused(worker.ask(path, name), set(kind.split("|")), names, path)


def test_every_call_has_an_expectation() -> None:
    assert set(REFUSED) == set(CALLS) - {"use in python"}


def test_truncated_anywhere(worker: Worker, good: RawGguf, tmp_path: Path) -> None:
    whole, path = good.to_bytes(), tmp_path / "cut.gguf"
    n_header = len(good.header())
    places = {*range(25), *np.linspace(25, n_header + 40, 60, dtype=int).tolist()}
    places |= {*np.linspace(n_header, len(whole) - good.alignment, 20, dtype=int).tolist()}
    for n in sorted(places):
        path.write_bytes(whole[:n])
        assert_refused(worker.ask(path), FORMAT_ERRORS, "", path)


def flipped(whole: bytes, n_header: int, seed: int) -> bytes:
    """1 to 3 bytes changed, nearly always in the header: flips among the weights only change the numbers."""
    random = np.random.default_rng(seed)
    data = bytearray(whole)
    for _ in range(random.integers(1, 4)):
        end = n_header if random.random() < 0.95 else len(data)
        if random.random() < 0.5:
            data[random.integers(end)] = random.choice([0, 1, 0x7F, 0x80, 0xFF])
        else:
            data[random.integers(end)] ^= 1 << int(random.integers(8))
    return bytes(data)


@pytest.mark.parametrize("batch", range(8))
def test_flipped_bytes(batch: int, worker: Worker, good: RawGguf, tmp_path: Path) -> None:
    """Either it opens and computes something, or it is refused in our own words."""
    # Most of the header is tokens: without them a flip hits keys, types, lengths, dimensions and offsets.
    good = good.copy()
    for pair in list(good.pairs):
        if pair.key.startswith(b"tokenizer."):
            good.pairs.remove(pair)
    whole, n_header, path = good.to_bytes(), len(good.header()), tmp_path / "flipped.gguf"
    for seed in range(batch * 50, batch * 50 + 50):
        path.write_bytes(flipped(whole, n_header, seed))
        answer = worker.ask(path)
        if not answer["ok"]:
            assert "PyDiffusionError" in answer["kinds"], (seed, answer)
            assert "\n" not in answer["message"], (seed, answer)
