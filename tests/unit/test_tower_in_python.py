"""The vision tower in Python: lazy loading, preprocessing for it, features kept by an image's key."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.fake_vision import INFO, FakeSource, write_mmproj
from support.images import file_bytes, pattern

from pydiffusion import ImageError, PyDiffusionError
from pydiffusion.vision import preprocess
from pydiffusion.vision.tower import VisionTower

ARRAY = pattern(40, 60, 3)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_mmproj(tmp_path / "mmproj.gguf")


def test_it_is_loaded_on_first_use(path: Path) -> None:
    model = FakeSource()
    vision = VisionTower(path, model)
    assert model.opened == []
    assert vision.max_soft_tokens == 70 and vision.info == INFO
    vision.prepare(ARRAY)
    assert model.opened == [path]


def test_an_image_is_prepared_as_preprocess_does(path: Path) -> None:
    vision = VisionTower(path, FakeSource())
    for n in (None, 70, 140):
        image = vision.prepare(ARRAY, n)
        patches, positions = preprocess(ARRAY, n or 70, 4, 3)
        assert np.array_equal(image.patches, patches) and np.array_equal(image.positions, positions)
        assert image.n_soft_tokens == len(patches) // 9 == len(vision.features(image))
    assert vision.prepare(image) is image


def test_the_files_own_number_of_soft_tokens(path: Path) -> None:
    vision = VisionTower(path, FakeSource(max_soft_tokens=12))
    assert vision.prepare(ARRAY).n_soft_tokens <= 12
    assert vision.prepare(ARRAY, 12).n_soft_tokens <= 12
    with pytest.raises(
        ValueError, match="max_soft_tokens is 13; permitted are 12, 70, 140, 280, 560 and 1120"
    ):
        vision.prepare(ARRAY, 13)


def test_keys_depend_on_pixels_options_and_tower_only(path: Path, tmp_path: Path) -> None:
    vision = VisionTower(path, FakeSource())
    image = Image.fromarray(ARRAY)
    (tmp_path / "a.png").write_bytes(file_bytes(image, "PNG"))
    same = [ARRAY, image, tmp_path / "a.png", file_bytes(image, "PNG"), ARRAY / 255]
    assert len({vision.prepare(source).key for source in same}) == 1
    changed = ARRAY.copy()
    changed[20, 30] ^= 128
    (tmp_path / "other").mkdir()
    other = VisionTower(write_mmproj(tmp_path / "other/mmproj.gguf", content=1.0), FakeSource())
    moved = VisionTower(write_mmproj(tmp_path / "other/moved.gguf"), FakeSource())
    keys = [vision.prepare(changed).key, vision.prepare(ARRAY, 140).key, other.prepare(ARRAY).key]
    # The same patches, side by side or one below the other.
    keys += [
        vision.prepare(np.zeros((48, 96), np.uint8)).key,
        vision.prepare(np.zeros((96, 48), np.uint8)).key,
    ]
    assert len({vision.prepare(ARRAY).key, *keys}) == 6
    assert moved.prepare(ARRAY).key == vision.prepare(ARRAY).key


def test_an_image_is_encoded_once(path: Path) -> None:
    model = FakeSource()
    vision = VisionTower(path, model)
    first, again = vision.prepare(ARRAY), vision.prepare(Image.fromarray(ARRAY))
    features = vision.features(first)
    assert features.dtype == np.float32 and not features.flags.writeable
    assert vision.features(again) is features
    assert vision.n_encoded == model.tower.n_runs == 1
    vision.features(vision.prepare(255 - ARRAY))
    assert vision.n_encoded == 2


def test_threads_share_one_run(path: Path) -> None:
    model = FakeSource()
    vision = VisionTower(path, model)
    image, other = vision.prepare(ARRAY), vision.prepare(255 - ARRAY)
    found: list[np.ndarray] = []
    threads = [
        threading.Thread(target=lambda i=i: found.append(vision.features(image if i % 2 else other)))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and model.opened == [path]
    assert vision.n_encoded == model.tower.n_runs == 2


def test_the_least_recently_used_features_go_first(path: Path) -> None:
    vision = VisionTower(path, FakeSource())
    images = [vision.prepare(ARRAY ^ np.uint8(1 << i)) for i in range(4)]
    one = vision.features(images[0]).nbytes
    vision._features.max_bytes = 3 * one
    for i in (1, 2, 0, 3):  # 1 is the least recently used when 3 comes
        vision.features(images[i])
    assert vision.n_encoded == 4
    for i in (0, 2, 3):
        vision.features(images[i])
    assert vision.n_encoded == 4
    vision.features(images[1])
    assert vision.n_encoded == 5
    vision._features.max_bytes = 1  # less than one image: the last is kept all the same
    for i in (0, 0, 1, 1):
        vision.features(images[i])
    assert vision.n_encoded == 7


def test_a_run_that_fails_leaves_nothing_behind(path: Path) -> None:
    model = FakeSource()
    vision = VisionTower(path, model)
    image = vision.prepare(ARRAY)
    for error in (KeyboardInterrupt(), MemoryError()):
        model.tower.fails = error
        with pytest.raises(type(error)):
            vision.features(image)
    assert vision.n_encoded == 0
    assert len(vision.features(image)) == image.n_soft_tokens


def test_an_image_beyond_the_position_table(path: Path) -> None:
    strip = np.zeros((12, 12 * 22), np.uint8)  # 39 soft tokens in a row: the whole part of (70 * 22) ** 0.5
    assert VisionTower(path, FakeSource(n_positions=117)).prepare(strip).positions.max() == 116
    vision = VisionTower(path, FakeSource(n_positions=116))
    with pytest.raises(ImageError, match=r"264 x 12 pixels has 117 patches .* 116 positions") as caught:
        vision.prepare(strip)
    assert "\n" not in str(caught.value)
    with pytest.raises(ImageError, match="12 x 264"):
        vision.prepare(strip.T)


def test_after_close(path: Path) -> None:
    vision = VisionTower(path, FakeSource())
    image = vision.prepare(ARRAY)
    vision.close()
    for call in (lambda: vision.features(image), lambda: vision.prepare(ARRAY), vision.load):
        with pytest.raises(PyDiffusionError, match="is closed"):
            call()


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    model = FakeSource()
    with pytest.raises(FileNotFoundError):
        VisionTower(tmp_path / "missing.gguf", model).load()
    assert model.opened == []
