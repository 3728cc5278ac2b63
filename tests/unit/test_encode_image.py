"""Images through ``DiffusionModel``: the file beside the model, features, and the second question."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import checkpoint_folders as folders
from support.images import file_bytes, pattern
from support.vision_folders import TOWER, make_folder, vision_weights

from pydiffusion import DiffusionModel, ImageError, PyDiffusionError, UnsupportedModelError, _native
from pydiffusion.convert import convert, convert_mmproj, edit_metadata
from pydiffusion.convert.gguf.model_keys import u32
from pydiffusion.vision import preprocess

ARRAY = pattern(40, 60, 3)
TABLE = TOWER + "patch_embedder.position_embedding_table"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A text model and its vision tower, with positions for 40 patches in a row."""
    folder = tmp_path_factory.mktemp("vision")
    weights = vision_weights()
    weights[TABLE] = np.resize(weights[TABLE], (2, 40, weights[TABLE].shape[2]))
    checkpoint = make_folder(folder / "checkpoint", weights, position_embedding_size=40)
    convert(checkpoint, folder / "text.gguf", "f32")
    ids = {"image": 12, "image_begin": 10, "image_end": 11}
    named = {f"diffusion-gemma.{name}_token_id": u32(id) for name, id in ids.items()}
    edit_metadata(folder / "text.gguf", named, folder / "m.gguf")
    convert_mmproj(checkpoint, folder / "mmproj-m.gguf", "f32")
    return folder / "m.gguf", folder / "mmproj-m.gguf"


@pytest.fixture
def model(files: tuple[Path, Path]) -> Iterator[DiffusionModel]:
    with DiffusionModel(files[0], n_threads=1, n_ctx=512) as model:
        yield model


def test_features_are_the_towers(files: tuple[Path, Path], model: DiffusionModel) -> None:
    features = model.encode_image(ARRAY, max_soft_tokens=70)
    assert model.vision is not None and model.vision.path == files[1]
    patches, positions = preprocess(ARRAY, 70, 4, 3)
    assert features.shape == (len(patches) // 9, folders.D) and features.dtype == np.float32
    text = _native.Model(str(files[0]), n_threads=1)
    assert np.array_equal(features, _native.Vision(str(files[1]), text).encode(patches, positions))
    assert np.isfinite(features).all() and features.std() > 0


def test_an_image_is_encoded_once_whatever_is_asked(model: DiffusionModel) -> None:
    tower = model.require_vision()
    image = tower.prepare(Image.fromarray(ARRAY), 70)
    for question in ([5, 6], [7], [8, 9, 10]):
        model.generate([2, image, *question], max_tokens=model.canvas_length, seed=1, steps=1)
    session = model.new_session()
    session.prefill([2, tower.prepare(file_bytes(Image.fromarray(ARRAY), "PNG"), 70), 5])
    n = session.prefill([2, image, 6])
    assert n == image.n_soft_tokens + 3, "the image is still in the cache"
    assert tower.n_encoded == 1
    model.encode_image(ARRAY, 70)
    assert tower.n_encoded == 1


def test_images_that_are_refused(model: DiffusionModel) -> None:
    with pytest.raises(ImageError, match=r"patches in a row, but the vision tower has 40 positions"):
        model.encode_image(np.zeros((12, 300), np.uint8), 70)
    with pytest.raises(ImageError, match="damaged or truncated"):
        model.encode_image(file_bytes(Image.fromarray(ARRAY), "PNG")[:100])
    with pytest.raises(ValueError, match="permitted are 70"):
        model.encode_image(ARRAY, 100)


def test_without_a_vision_file(files: tuple[Path, Path]) -> None:
    with DiffusionModel(files[0], n_threads=1, mmproj=None) as model:
        assert model.vision is None
        with pytest.raises(UnsupportedModelError, match="mmproj=None"):
            model.encode_image(ARRAY)
        with pytest.raises(UnsupportedModelError, match="mmproj=None"):
            model.new_session().encode([2, ARRAY])


def test_a_given_file(files: tuple[Path, Path], gguf_file: Callable[..., Path], tmp_path: Path) -> None:
    with DiffusionModel(files[0], n_threads=1, mmproj=files[1]) as model:
        assert model.vision is not None and model.vision.path == files[1]
        model.encode_image(ARRAY, 70)
        model.close()
        with pytest.raises(PyDiffusionError, match="is closed"):
            model.encode_image(ARRAY, 70)
    with pytest.raises(FileNotFoundError):
        DiffusionModel(files[0], n_threads=1, mmproj=tmp_path / "missing.gguf")
    with pytest.raises(
        UnsupportedModelError, match="not the vision part"
    ):  # a text model in the place of a tower
        DiffusionModel(files[0], n_threads=1, mmproj=gguf_file("small"))
    with pytest.raises(UnsupportedModelError, match="no image tokens"):
        DiffusionModel(files[0].with_name("text.gguf"), n_threads=1, mmproj=files[1])
