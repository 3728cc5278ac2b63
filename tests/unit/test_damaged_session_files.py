"""Session files whose images or shapes are damaged: the error says which part is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from support.fake_vision import give_vision, noise

from pydiffusion import DiffusionModel, ModelFormatError

pytestmark = pytest.mark.filterwarnings("ignore::pydiffusion.PromptWarning")


@pytest.fixture(scope="module")
def model(gguf_file: Callable[..., Path]) -> DiffusionModel:
    model = DiffusionModel(gguf_file("small", "f32", seed=0, dtype="f32"), n_ctx=256, mmproj=None)
    give_vision(model)
    return model


@pytest.fixture
def saved(model: DiffusionModel, tmp_path: Path) -> Path:
    session = model.new_session()
    session.encode([20, noise(0), 30])
    session.save(tmp_path / "session")
    return tmp_path / "session"


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, str]], object]) -> None:
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(arrays, metadata)
    save_file(arrays, path, metadata=metadata)


@pytest.mark.parametrize("images", [[], {}, [[1 << 40, "aa"]], [[10**30, "aa"]], [[-1, "aa"]]])
def test_images_at_impossible_places(images: Any, model: DiffusionModel, saved: Path) -> None:
    rewrite(saved, lambda _, metadata: metadata.update(images=json.dumps(images)))
    with pytest.raises(ModelFormatError, match="not a usable session file: its list of images is damaged"):
        model.load_session(saved)


@pytest.mark.parametrize("name", ["tokens", "k.0", "v.1", "image.0"])
def test_arrays_of_other_dimensions(name: str, model: DiffusionModel, saved: Path) -> None:
    rewrite(saved, lambda arrays, _: arrays.update({name: arrays[name][None]}))
    with pytest.raises(ModelFormatError, match=rf"session file: {name} has the shape \[1, .* dimensions"):
        model.load_session(saved)


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        (b'"images":"[[2', b'"images":"[[3', "must be"),
        (b'"images":"[[2', b'"images":"[[-', "damaged"),
        (b'"images":"[[2', b'"images":"{{2', "damaged"),
        (b'"images":"', b'"imagex":"', "damaged"),
        (b'"image.0"', b'"image.1"', "image.0"),
        (b"[24,256]", b"[48,128]", "256"),
    ],
)
def test_changed_bytes(old: bytes, new: bytes, why: str, model: DiffusionModel, saved: Path) -> None:
    whole = saved.read_bytes()
    assert whole.count(old) == 1
    saved.write_bytes(whole.replace(old, new))
    with pytest.raises(ModelFormatError, match=why):
        model.load_session(saved)
