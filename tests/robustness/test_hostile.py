"""Broken files and invalid arguments: each gives a typed one-line error, and the process survives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.gguf_mutator import RawGguf, read_gguf
from support.hostile_cases import CASES, REFUSED
from support.hostile_process import FORMAT_ERRORS, Worker, assert_refused
from support.hostile_worker import CALLS


@pytest.fixture(scope="module")
def good(gguf_file: Callable[..., Path]) -> RawGguf:
    """A small valid file, parsed."""
    return read_gguf(gguf_file("tiny", "f32"))


def test_the_good_file_opens(worker: Worker, good: RawGguf, gguf_file: Callable, tmp_path: Path) -> None:
    """The other tests would pass if nothing opened; also the mutator writes exactly what it read."""
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
    """Change 1 to 3 bytes, nearly always in the header: other weights are still a valid file."""
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
    """Each file opens and computes, or is refused with our own error; some of each."""
    # Most of the header is tokens: without them a flip hits keys, types, lengths, dimensions and offsets.
    good = good.copy()
    for pair in list(good.pairs):
        if pair.key.startswith(b"tokenizer."):
            good.pairs.remove(pair)
    whole, n_header, path = good.to_bytes(), len(good.header()), tmp_path / "flipped.gguf"
    n_refused = 0
    for seed in range(batch * 50, batch * 50 + 50):
        path.write_bytes(flipped(whole, n_header, seed))
        answer = worker.ask(path)
        if not answer["ok"]:
            assert "PyDiffusionError" in answer["kinds"], (seed, answer)
            assert "\n" not in answer["message"], (seed, answer)
            n_refused += 1
    assert 10 < n_refused < 50
