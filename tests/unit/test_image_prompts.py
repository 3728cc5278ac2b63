"""Prompts with images: where their tokens are, and the keys that caches are compared by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pydiffusion.errors import UnsupportedModelError
from pydiffusion.vision.preprocessing import PreparedImage
from pydiffusion.vision.prompt import PlacedImage, Prompt, as_prompt, is_image, place

TOKENS = {"image": 90, "begin": 91, "end": 92}


def prepared(n: int, name: str) -> PreparedImage:
    return PreparedImage(np.zeros((n, 3)), np.zeros((n, 2), np.int32), n, name.encode() * 32)


CAT, DOG = prepared(2, "c"), prepared(3, "d")


def test_an_image_in_a_list() -> None:
    asked: list[Any] = []

    def prepare(image: Any) -> PreparedImage:
        asked.append(image)
        return DOG

    picture = Image.new("RGB", (4, 4))
    prompt = as_prompt([1, CAT, np.int64(2), np.array(3), picture, picture], TOKENS, prepare)
    assert prompt.ids.dtype == np.int32
    assert prompt.ids.tolist() == [1, 91, 90, 90, 92, 2, 3, 91, 90, 90, 90, 92, 91, 90, 90, 90, 92]
    assert asked == [picture, picture]
    assert prompt.images == (PlacedImage(2, CAT), PlacedImage(8, DOG), PlacedImage(13, DOG))
    assert [(placed.begin, placed.end) for placed in prompt.images] == [(2, 4), (8, 11), (13, 16)]
    assert len(prompt) == 17


def test_places_in_a_chat_prompt() -> None:
    prompt = place([1, 90, 2, 90], [CAT, DOG], TOKENS)
    assert prompt.ids.tolist() == [1, 91, 90, 90, 92, 2, 91, 90, 90, 90, 92]
    assert prompt.images == (PlacedImage(2, CAT), PlacedImage(7, DOG))
    same = as_prompt([1, CAT, 2, DOG], TOKENS, lambda image: image)
    assert np.array_equal(same.ids, prompt.ids) and np.array_equal(same.keys, prompt.keys)
    assert place([1, 2], [], TOKENS).ids.tolist() == place([1, 2], [], {}).ids.tolist() == [1, 2]
    assert place([], [], TOKENS).ids.dtype == np.int32


@pytest.mark.parametrize(("ids", "images"), [([1, 90], []), ([1], [CAT]), ([90, 90], [CAT, DOG, CAT])])
def test_a_wrong_number_of_places(ids: list[int], images: list[PreparedImage]) -> None:
    what = rf"{ids.count(90)} image tokens?, but {len(images)} images?: the chat template has to write one"
    with pytest.raises(ValueError, match=what):
        place(ids, images, TOKENS)


def test_keys_tell_images_apart() -> None:
    """Equal prefixes of keys are equal text and images, and nothing else."""
    cat = as_prompt([1, CAT, 5], TOKENS, lambda image: image)
    other = as_prompt([1, prepared(2, "x"), 5], TOKENS, lambda image: image)
    assert cat.keys.dtype == np.int64
    assert np.flatnonzero(cat.keys != other.keys).tolist() == [2, 3]
    assert (cat.keys[2:4] < 0).all() and np.array_equal(cat.keys[[0, 1, 4, 5]], [1, 91, 92, 5])
    again = as_prompt([1, prepared(2, "c"), 6], TOKENS, lambda image: image)
    assert np.flatnonzero(cat.keys != again.keys).tolist() == [5]
    assert np.array_equal(Prompt(np.array([1, 2], np.int32)).keys, [1, 2])


def test_what_is_an_image(tmp_path: Path) -> None:
    images = [CAT, Image.new("L", (1, 1)), np.zeros((2, 2)), tmp_path, b"", bytearray(), memoryview(b"")]
    assert all(map(is_image, images))
    others = [1, np.int32(1), np.array(1), True, "a.png", None, 1.5, [1], np.zeros(3), object()]
    assert not any(map(is_image, others))


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("a.png", r"not text: tokenize 'a.png', or give pathlib.Path"),
        (1.5, "of type float"),
        (None, "of type NoneType"),
        ([1], "of type list"),
        (np.zeros(3), "of type ndarray"),
    ],
)
def test_what_is_neither_id_nor_image(item: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        as_prompt([1, item], TOKENS, lambda image: CAT)


def test_ids_beyond_32_bits() -> None:
    for ids in ([1 << 31], [-(1 << 31) - 1]):
        with pytest.raises(ValueError, match="32 bits"):
            as_prompt(ids, TOKENS, lambda image: CAT)
        with pytest.raises(ValueError, match="32 bits"):
            place(ids, [], TOKENS)


def test_a_model_without_image_tokens() -> None:
    with pytest.raises(UnsupportedModelError, match="no image tokens"):
        as_prompt([1, CAT], {}, lambda image: image)
    with pytest.raises(UnsupportedModelError, match="no image tokens"):
        place([1], [CAT], {})
    assert as_prompt([1], {}, lambda image: image).ids.tolist() == [1]
