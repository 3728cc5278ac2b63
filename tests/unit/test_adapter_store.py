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
from support.adapter_folders import write_random_gguf

from pydiffusion import AdapterError, ContextOverflowError, DiffusionModel, _native, device_plan, plan
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
    return [write_random_gguf(folder / f"{i}.gguf", path, i) for i in range(3)]


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


@pytest.mark.parametrize("type_name", ["f32", "q8_0"])
def test_a_plan_leaves_room_for_them(gguf_file: Callable[..., Path], tmp_path: Path, type_name: str) -> None:
    """With room for the weights alone, adapters move a part of them to the CPU."""
    file = gguf_file("wide", type_name, seed=0, dtype="f32")
    adapter = write_random_gguf(tmp_path / "a.gguf", file, 1, rank=64)
    whole = plan(file, n_ctx=512, device="host")
    room = whole.total_bytes
    arguments: dict[str, Any] = {"n_ctx": 512, "n_threads": 1, "device": "host", "mmproj": None}
    with DiffusionModel(file, gpu_memory=room, lora=[adapter], **arguments) as model:
        taken = sum(native.n_bytes for native, _ in model.adapters.current.native)
        on_gpu = model.description["n_gpu_layers"], model.description["n_cpu_moe"]
        assert applied.n_loaded_bytes(model.lora, model.native.file) == taken > 0
    found = plan(file, n_ctx=512, device="host", gpu_memory=room, lora_bytes=taken)
    assert on_gpu == (found.n_gpu_layers, found.n_cpu_moe) != (whole.n_gpu_layers, whole.n_cpu_moe)
    assert found.total_bytes + taken <= room
    assert plan(file, n_ctx=512, device="host", gpu_memory=room + taken, lora_bytes=taken) == whole
    with DiffusionModel(file, gpu_memory=room + taken, lora=[adapter], **arguments) as model:
        assert model.description["n_gpu_layers"] == whole.n_gpu_layers


def test_room_beside_them_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        device_plan.Device("CUDA0", "", 20 << 30, 24 << 30),
        device_plan.Device("CUDA1", "", 6 << 30, 8 << 30),
    ]
    monkeypatch.setattr(device_plan, "devices", lambda: found)

    def limits(n_bytes: int, **given: Any) -> list[int]:
        return device_plan.limits_beside(n_bytes, device_plan.device_request("auto", None, **given))

    free = [(20 << 30) - (24 << 30) // 20, (6 << 30) - (512 << 20)]  # docs: 512 MiB or a twentieth stay free
    assert limits(0, device="CUDA0,CUDA1", gpu_memory=None) == []
    assert limits(1 << 30, device="CUDA0,CUDA1", gpu_memory=None) == [n - (1 << 30) for n in free]
    assert limits(100, device="CUDA0,CUDA1", gpu_memory=[4000, 50]) == [3900, 1]
    assert limits(100, device="cpu", gpu_memory=None) == limits(100, device="cpu", gpu_memory=9000) == []
