"""Adapters in Python: their files, and sessions with images and session files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from support.adapter_folders import write_random_folder
from support.adapters_by_hand import IDS, SHORT, fresh_logits, logits, opened, random_adapter, shapes_of
from support.fake_vision import give_vision, noise

from pydiffusion import AdapterError, DiffusionModel, ModelFormatError
from pydiffusion.adapters import applied
from pydiffusion.adapters.adapter import Adapter
from pydiffusion.convert import convert

pytestmark = pytest.mark.filterwarnings("ignore::pydiffusion.PromptWarning")


@pytest.fixture(scope="module")
def path(gguf_file: Callable[..., Path]) -> Path:
    return gguf_file("small", "f32", seed=0, dtype="f32")


@pytest.fixture(scope="module")
def one(path: Path) -> Adapter:
    return random_adapter(shapes_of(path), seed=1, kinds=("attn_q", "self_cond_up"), name="random-1")


@pytest.fixture(scope="module")
def model(path: Path) -> DiffusionModel:
    return opened(path)


def test_a_file_is_read_once(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_random_folder(tmp_path / "attention", path, 3)
    reads: list[Any] = []
    load = applied._read
    monkeypatch.setattr(applied, "_read", lambda *given: (reads.append(given[0]), load(*given))[1])
    with opened(path) as model:
        adapter = model.load_lora(folder)
        assert adapter.name == "attention" and len(adapter.factors) > 2
        monkeypatch.chdir(tmp_path)
        for _ in range(2):
            model.set_lora([("attention", 0.5), str(folder)])
            model.generate(IDS, lora=[folder], **SHORT)
        assert model.load_lora(folder) is adapter and len(reads) == 1
        with opened(path, lora=[folder]) as other:
            other.set_lora([(folder, 2)])
            assert len(reads) == 2  # of another model
        assert model.lora == ((adapter, 0.5), (adapter, 1.0))
        before = fresh_logits(model)
        write_random_folder(folder, path, 4)
        again = model.load_lora(folder)
        assert len(reads) == 3 and again != adapter and model.lora[0][0] is adapter
        np.testing.assert_array_equal(fresh_logits(model), before)  # until it is set again
        assert not np.array_equal(fresh_logits(model, [again]), fresh_logits(model, [adapter]))


def test_an_unloaded_one_is_gone_once_nothing_applies_it(path: Path, tmp_path: Path) -> None:
    with opened(path) as model:
        adapter = model.load_lora(write_random_folder(tmp_path / "a", path, 3))
        native = model.adapters.set_of([adapter]).native[0][0]
        session = model.new_session(lora=[adapter])
        for _ in range(2):
            model.unload_lora(adapter)
        session.encode(IDS)
        expected = logits(session)
        n_users = sys.getrefcount(native)
        session.set_lora([])
        logits(session)
        assert sys.getrefcount(native) == 2 < n_users, "somebody other than this test still has it"
        again = model.load_lora(tmp_path / "a")
        assert again is not adapter and again == adapter
        assert model.adapters.set_of([again]).native[0][0] is not native
        np.testing.assert_array_equal(fresh_logits(model, [adapter]), expected)


def test_a_split_model(
    checkpoint_folder: Callable[..., Path], path: Path, one: Adapter, model: DiffusionModel, tmp_path: Path
) -> None:
    checkpoint = checkpoint_folder("small", seed=0, dtype="f32")
    parts = convert(checkpoint, tmp_path / "m.gguf", "f32", split_max_size=3_000_000).files
    assert len(parts) > 2
    folder = write_random_folder(tmp_path / "a", path, 3)
    with opened(parts[0], lora=[one, (folder, 0.5)]) as split:
        np.testing.assert_array_equal(fresh_logits(split), fresh_logits(model, [one, (folder, 0.5)]))


def test_what_is_wrong_is_found_before_the_weights_are_read(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pydiffusion import _native

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the weights are read")

    monkeypatch.setattr(_native, "Model", never)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}), encoding="utf-8")
    with pytest.raises(AdapterError, match="IA3"):
        DiffusionModel(path, lora=[tmp_path])


@pytest.fixture
def seeing(path: Path) -> Iterator[DiffusionModel]:
    with opened(path) as model:
        give_vision(model)
        yield model


def test_a_session_with_images_encodes_them_anew(
    seeing: DiffusionModel, one: Adapter, tmp_path: Path
) -> None:
    prompt = [20, noise(0), 30]
    session, fresh = seeing.new_session(), seeing.new_session(lora=[one])
    session.encode(prompt)
    fresh.prefill([*prompt, 40])
    seeing.set_lora([one])
    session.prefill([*session.tokens.tolist(), 40])  # the image is the session's own
    assert session.tokens.tolist() == fresh.tokens.tolist() and session.native.images == fresh.native.images
    np.testing.assert_array_equal(logits(session), logits(fresh))
    session.save(tmp_path / "session")
    loaded = seeing.load_session(tmp_path / "session")
    assert loaded.native.images == fresh.native.images
    np.testing.assert_array_equal(logits(loaded), logits(fresh))


@pytest.mark.parametrize("names", ["", "{", "[1]", "[[1, 2, 3]]", '[["a", "b"]]', "[" * 10000])
def test_a_session_file_whose_names_are_damaged(
    names: str, model: DiffusionModel, one: Adapter, tmp_path: Path
) -> None:
    session = model.new_session(lora=[one])
    session.encode(IDS[:3])
    session.save(tmp_path / "session")
    with safe_open(tmp_path / "session", framework="numpy") as file:
        metadata = file.metadata() | {"lora_names": names}
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(arrays, tmp_path / "session", metadata=metadata)
    with pytest.raises(
        ModelFormatError, match=r"other adapters \(others, whose names are damaged; here none\)"
    ):
        model.load_session(tmp_path / "session")
    assert model.load_session(tmp_path / "session", lora=[one]).n_past == 3
