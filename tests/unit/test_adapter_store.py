"""The adapters that a model keeps: when files are read, what is kept, who waits for whom."""

from __future__ import annotations

import gc
import shutil
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.random_adapters import write_adapter

from pydiffusion import AdapterError, ContextOverflowError, DiffusionModel, _native
from pydiffusion.adapters import applied
from pydiffusion.adapters.adapter import Adapter
from pydiffusion.adapters.applied import AdapterStore


class Loaded:
    """In place of a native adapter, with all that it reads."""

    def __init__(self, adapter: Adapter) -> None:
        try:
            self.arrays = list(adapter.scaled())
        except ValueError as error:
            raise AdapterError(str(error)) from error


@pytest.fixture(scope="module")
def path(gguf_file: Callable[..., Path]) -> Path:
    return gguf_file("small", "f32", seed=0, dtype="f32")


@pytest.fixture(scope="module")
def files(path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [write_adapter(folder / f"{i}.gguf", path, i) for i in range(3)]


@pytest.fixture
def store(path: Path) -> AdapterStore:
    return AdapterStore(_native.GgufFile(str(path)).metadata, Loaded)  # type: ignore[arg-type, return-value]


def test_files_that_change_while_they_are_read(
    store: AdapterStore, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next load has the new ones, whether or not the first found out."""
    ours, read = tmp_path / "ours.gguf", applied._read
    shutil.copy(files[0], ours)

    def interrupted(*given: Any) -> Adapter:
        adapter = read(*given)
        shutil.copy(files[1], ours)  # a training run saves again
        return adapter

    monkeypatch.setattr(applied, "_read", interrupted)
    with pytest.raises(AdapterError, match="has changed since the adapter was loaded"):
        store.load(ours)
    store.read([ours])
    monkeypatch.setattr(applied, "_read", read)
    assert store.load(ours) == store.load(files[1]) != store.load(files[0])


def test_one_that_was_replaced_is_kept_while_it_is_used(
    store: AdapterStore, files: list[Path], tmp_path: Path
) -> None:
    ours, seen = tmp_path / "ours.gguf", []
    for file in files:
        shutil.copy(file, ours)
        seen.append(weakref.ref(store.set_of([ours]).native[0][0]))
    gc.collect()
    assert [kept() is None for kept in seen] == [True, True, False]
    adapter = store.load(ours)
    shutil.copy(files[0], ours)
    assert store.load(ours) != adapter
    assert store.set_of([adapter]).native[0][0] is seen[2]()
    del adapter
    gc.collect()
    assert seen[2]() is None


def test_nobody_waits_for_the_reading_of_another(
    store: AdapterStore, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, read = store.load(files[0]), applied._read
    begun, go_on, reads = threading.Event(), threading.Event(), []

    def slow(*given: Any) -> Adapter:
        reads.append(given[0])
        begun.set()
        assert go_on.wait(60)
        return read(*given)

    monkeypatch.setattr(applied, "_read", slow)
    found: list[Adapter] = []
    threads = [threading.Thread(target=lambda: found.append(store.load(files[1]))) for _ in range(2)]
    looked_up = threading.Thread(target=lambda: found.append(store.set_of([adapter, files[0]]).given[1][0]))
    for thread in threads:
        thread.start()
    try:
        assert begun.wait(60)
        looked_up.start()
        looked_up.join(60)
        assert found == [adapter]
    finally:
        go_on.set()
        for thread in threads:
            thread.join()
    assert found[1] is found[2] and len(reads) == 1  # once for both


def test_a_relative_path_is_of_the_folder_it_was_given_in(
    store: AdapterStore, files: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(files[0].parent)
    adapter = store.load("0.gguf")
    store.unload(adapter)
    monkeypatch.chdir(tmp_path)
    assert store.set_of([adapter]).native


def test_scales_count_as_the_float32_that_they_become(store: AdapterStore, files: list[Path]) -> None:
    key = store.set_of([(files[0], 0.1)]).key
    assert (
        key == store.set_of([(files[0], float(np.float32(0.1)))]).key != store.set_of([(files[0], 0.2)]).key
    )
    for off in (0, 1e-60):
        found = store.set_of([(files[1], off)])
        assert found.key == b"" and found.native == () and len(found.given) == 1
    assert len(store._adapter_to_native) == 1  # what is off is not loaded


def test_a_copy_that_fails_leaves_the_session_as_it_was(path: Path, files: list[Path]) -> None:
    def opened() -> DiffusionModel:
        return DiffusionModel(path, n_ctx=256, n_threads=1, kv_type="f32", mmproj=None)

    ids = np.arange(3, 90, dtype=np.int32)
    with opened() as model, opened() as other:
        longer, foreign = model.new_session(lora=[files[0]]), other.new_session(lora=[files[1]])
        longer.encode(ids)
        foreign.encode(ids[:9])
        session = model.new_session(n_ctx=64)
        session.encode(ids[:9])
        for source, error, reason in (
            (longer, ContextOverflowError, "87 tokens"),
            (foreign, ValueError, "another model"),
        ):
            with pytest.raises(error, match=reason):
                session.copy(source)
            assert session.lora_key == b"" and session.tokens.tolist() == ids[:9].tolist()
        whole = model.new_session()
        whole.copy(longer)
        assert whole.lora_key == longer.lora_key
        canvas = np.arange(model.canvas_length, dtype=np.int32)
        longer.set_lora([])
        np.testing.assert_array_equal(whole.denoise(canvas), longer.denoise(canvas))
