"""Small files that are much work to decode are refused by their headers."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image, features
from support.images import file_bytes
from support.seeing_model import SeeingModel, image_part, png
from support.server_fakes import ask, script

from pydiffusion.chat.image_parts import ImagePartError
from pydiffusion.errors import ImageError
from pydiffusion.generation import chat_images
from pydiffusion.vision.loading import open_image, pixels_to_decode


@pytest.mark.skipif(not features.check("jpg_2000"), reason="this Pillow has no JPEG 2000")
def test_jpeg_2000_is_smaller() -> None:
    """Its decoder stops all other threads; the header of a small file says that it has many pixels."""
    data = file_bytes(Image.new("L", (64, 64)), "JPEG2000")
    assert open_image(data).size == (64, 64)
    grown = data.replace((64).to_bytes(4, "big"), (4001).to_bytes(4, "big"))
    with pytest.raises(ImageError, match="4001 x 4001 pixels; at most 16 million of JPEG 2000 are decoded"):
        open_image(grown)


def test_pixels_by_the_header(tmp_path: Path) -> None:
    data = png(size=(40, 30))
    (tmp_path / "a.png").write_bytes(data)
    for source in (data, bytearray(data), memoryview(data), tmp_path / "a.png"):
        assert pixels_to_decode(source) == 1200
    for source in (Image.new("L", (5, 5)), b"", b"no image", tmp_path / "missing", tmp_path, None, "x"):
        assert pixels_to_decode(source) == 0


def test_all_images_of_a_prompt_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_images, "MAX_PIXELS_TOGETHER", 3_000_000)
    model = SeeingModel(script, n_ctx=4096)
    big = [image_part(png(color, size=(1000, 1000))) for color in range(8)]
    assert len(model.chat_prompt(ask(big[:3])).images) == 3
    assert len(model.chat_prompt(ask(big[:3] + big[:3])).images) == 6  # kept, so not decoded again
    model.vision.images.clear()
    with pytest.raises(ImagePartError, match="4000000 pixels; at most 3 million are") as caught:
        model.chat_prompt(ask(big[3:]))
    assert caught.value.where == "messages[0].content[3]"
    assert not model.vision.images  # the first ones are not decoded either


def test_a_missing_file_is_an_error_of_its_part(tmp_path: Path) -> None:
    """Of one request then, not of all those of a batch."""
    model = SeeingModel(script, n_ctx=2048)
    with pytest.raises(ImagePartError, match=r"gone\.png: No such file") as caught:
        model.chat_prompt(ask([{"type": "image", "path": str(tmp_path / "gone.png")}]))
    assert caught.value.where == "messages[0].content[0]"
    with pytest.raises(ImagePartError, match="Is a directory"):
        model.chat_prompt(ask([{"type": "image", "image": tmp_path}]))


def test_data_urls_in_percent_are_short() -> None:
    data = png()
    assert open_image("data:image/png," + "".join(f"%{byte:02x}" for byte in data)).size == (40, 30)
    with pytest.raises(ValueError, match="very many percent signs: encode the image in base64"):
        open_image("data:image/png," + "%41" * 1_000_001)
