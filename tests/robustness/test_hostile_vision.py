"""Broken vision files and invalid images: each gives a typed one-line error, and the process survives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.gguf_mutator import RawGguf, read_gguf
from support.hostile_process import FORMAT_ERRORS, Worker, assert_refused
from support.hostile_vision import CASES, REFUSED
from support.vision_folders import make_folder

from pydiffusion.convert import convert, convert_mmproj


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and ``vision.gguf``."""
    folder = tmp_path_factory.mktemp("vision")
    made = make_folder(folder / "made")
    convert(made, folder / "model.gguf", "f32")
    convert_mmproj(made, folder / "vision.gguf", "f32")
    return folder


@pytest.fixture(scope="module")
def good(folder: Path) -> RawGguf:
    return read_gguf(folder / "vision.gguf")


def test_the_good_file_gives_features(worker: Worker, good: RawGguf, folder: Path) -> None:
    path = good.write(folder / "good.gguf")
    assert path.read_bytes() == (folder / "vision.gguf").read_bytes()
    assert worker.ask(path, "vision") == {"ok": True, "result": "[4, 256]"}


@pytest.mark.parametrize("name", CASES)
def test_broken_file(name: str, worker: Worker, good: RawGguf, folder: Path) -> None:
    case, path = CASES[name], folder / "broken.gguf"
    broken = case.make(good.copy())
    path.write_bytes(broken if isinstance(broken, bytes) else broken.to_bytes())
    answer = worker.ask(path, "vision")
    assert_refused(answer, {case.error} if case.error else FORMAT_ERRORS, case.names, path)


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_argument(name: str, worker: Worker, folder: Path) -> None:
    path = folder / "vision.gguf"
    assert_refused(worker.ask(path, f"vision: {name}"), {"ValueError", "TypeError"}, REFUSED[name][1], path)


def test_truncated_anywhere(worker: Worker, good: RawGguf, folder: Path) -> None:
    whole, path = good.to_bytes(), folder / "cut.gguf"
    for n in np.unique(np.linspace(0, len(whole) - good.alignment, 40, dtype=int)):
        path.write_bytes(whole[:n])
        assert_refused(worker.ask(path, "vision"), FORMAT_ERRORS, "", path)
