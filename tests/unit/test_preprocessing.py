"""Preprocessing of images: goldens of transformers' image processor, and arithmetic."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from reference.make_pixel_goldens import sampled
from support.images import cases, file_bytes, pattern, picture
from support.paths import GOLDENS

from pydiffusion import ImageError, PyDiffusionWarning
from pydiffusion.vision import preprocess
from pydiffusion.vision.loading import decode_data_url, open_image
from pydiffusion.vision.preprocessing import target_size

GOLDEN = json.loads((GOLDENS / "pixels.json").read_text(encoding="utf-8"))


def test_pixels_of_all_modes_are_those_of_the_reference() -> None:
    assert [image[:4] for image in GOLDEN["images"]] == [list(case) for case in cases()]
    assert len(GOLDEN["images"]) >= 50
    for kind, height, width, n, rows, columns, mean, samples in GOLDEN["images"]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PyDiffusionWarning)  # of 16 bits
            patches, positions = preprocess(picture(kind, height, width), max_soft_tokens=n)
        where = (kind, height, width, n)
        assert patches.dtype == np.float32 and patches.shape == (rows * columns, 3 * 16 * 16), where
        assert positions.dtype == np.int32
        assert positions.tolist() == [[x, y] for y in range(rows) for x in range(columns)], where
        # Another version of Pillow may round another way.
        assert np.abs(np.subtract(sampled(patches), samples)).max() <= 1, where
        assert abs(float(patches.mean(dtype=np.float64)) * 255 - mean) < 0.2, where


def test_sizes_are_those_of_the_reference() -> None:
    for height, width, n, patch_size, pooling, *size in GOLDEN["sizes"]:
        assert list(target_size(height, width, n, patch_size, pooling)) == size, (height, width, n)


def test_an_image_of_the_right_size_is_cut_unchanged() -> None:
    """A patch's pixels are in rows, with their channels together; patches are numbered by rows."""
    array = pattern(70, 100, 3)
    patches, positions = preprocess(array, 70, patch_size=5, pooling_kernel_size=2)
    assert len(patches) == 14 * 20 and positions[41].tolist() == [1, 2]
    assert np.array_equal(patches[41].reshape(5, 5, 3), (array[10:15, 5:10] / 255).astype(np.float32))


@pytest.mark.parametrize("shape", [(10, 20), (10, 20, 1)])
def test_gray_arrays(shape: tuple[int, ...]) -> None:
    gray = pattern(10, 20, 1)
    expected = preprocess(np.repeat(gray, 3, axis=2))[0]
    assert np.array_equal(preprocess(gray.reshape(shape))[0], expected)


def test_floats_and_booleans() -> None:
    array = pattern(30, 40, 3)
    expected = preprocess(array)[0]
    for same in (array / 255, (array / 255).astype(np.float32), array.astype(np.float64)):
        assert np.array_equal(preprocess(same)[0], expected)
    black_or_white = array > 99
    expected = preprocess(black_or_white.astype(np.uint8) * 255)[0]
    assert np.array_equal(preprocess(black_or_white)[0], expected)
    assert np.array_equal(preprocess(black_or_white.astype(np.float32))[0], expected)


def test_transparent_arrays_are_composited_on_white() -> None:
    array = np.zeros((48, 48, 4), np.uint8)
    array[:, :, 3] = 51  # a fifth
    assert np.allclose(preprocess(array)[0], 204 / 255)
    assert np.allclose(preprocess(array / 255)[0], 204 / 255)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((0, 5, 3), np.uint8), r"shape \(0, 5, 3\)"),
        (np.zeros((9, 9, 2), np.uint8), r"shape \(9, 9, 2\)"),
        (np.zeros((2, 9, 9, 3), np.uint8), "shape"),
        (np.full((9, 9), 256), "values from 256 to 256"),
        (np.full((9, 9), -1), "values from -1"),
        (np.full((9, 9), np.nan), "values from nan"),
        (np.full((9, 9), 127.5), "divide it by 255"),
        (np.zeros((9, 9), complex), "complex"),
        (np.full((9, 9), "a"), "not <U1"),
    ],
)
def test_arrays_that_are_no_images(array: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preprocess(array)


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_soft_tokens": 100},
        {"max_soft_tokens": None},
        {"patch_size": 0},
        {"patch_size": 2.5},
        {"pooling_kernel_size": True},
    ],
)
def test_wrong_arguments(arguments: dict) -> None:
    with pytest.raises(ValueError, match="permitted"):
        preprocess(pattern(9, 9, 3), **arguments)


def test_other_types_and_addresses() -> None:
    for wrong in (None, 5, [1, 2], {"url": "x"}):
        with pytest.raises(TypeError, match="must be a PIL image, an array, a path or bytes"):
            preprocess(wrong)
    with pytest.raises(ValueError, match="not fetched"):
        preprocess("https://example.org/a.png")


def turned(orientation: int, format: str) -> tuple[Image.Image, bytes]:
    """An upright image, and its file as a camera stores it."""
    image = Image.fromarray(pattern(40, 64, 3))
    stored = {  # what a viewer undoes, as EXIF 2.3 defines the values by where row 0 and column 0 are
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: a.transpose(1, 0, 2)[::-1],
        7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    }[orientation](np.asarray(image))
    exif = Image.Exif()
    exif[0x0112] = orientation
    return image, file_bytes(Image.fromarray(np.ascontiguousarray(stored)), format, exif=exif)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_files_are_rotated_and_pil_images_are_not(orientation: int, format: str, tmp_path: Path) -> None:
    image, data = turned(orientation, format)
    (tmp_path / "a.img").write_bytes(data)
    for source in (data, bytearray(data), tmp_path / "a.img", str(tmp_path / "a.img")):
        assert np.array_equal(np.asarray(open_image(source)), np.asarray(image)), orientation
    if format == "PNG":  # Pillow itself rotates a TIFF
        as_stored = Image.open(tmp_path / "a.img")
        assert np.array_equal(np.asarray(open_image(as_stored)), np.asarray(as_stored))


def test_rotation_keeps_what_is_transparent() -> None:
    image = picture("P-color", 30, 40)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = file_bytes(image, "PNG", exif=exif, transparency=image.info["transparency"])
    expected = open_image(image).transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(np.asarray(open_image(data)), np.asarray(expected))


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_of_a_file_are_scaled(format: str) -> None:
    """Pillow's conversion clips them at 255, which a PIL image handed over gets as well, with a warning."""
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    image = Image.fromarray(levels * 257)
    if format == "PPM":  # which not every version of Pillow writes
        data = b"P5\n16 16\n65535\n" + (levels * 257).astype(">u2").tobytes()
    else:
        data = file_bytes(image, format)
    found = np.asarray(open_image(data))
    assert np.array_equal(found, np.repeat(levels[:, :, None], 3, axis=2))
    with pytest.warns(PyDiffusionWarning, match="clipped"):
        assert np.asarray(open_image(image)).reshape(-1, 3)[2:].min() == 255


def test_sixteen_bits_with_a_transparent_gray() -> None:
    image = Image.fromarray(np.array([[500, 65535], [0, 500]], np.uint16))
    found = np.asarray(open_image(file_bytes(image, "PNG", transparency=500)))
    assert found[:, :, 0].tolist() == [[255, 255], [0, 255]]


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.fromarray(np.full((9, 9, 3), level, np.uint8)) for level in (50, 250)]
    for format in ("GIF", "WEBP", "PNG", "TIFF"):
        lossless = {"lossless": True} if format == "WEBP" else {}
        data = file_bytes(frames[0], format, save_all=True, append_images=frames[1:], **lossless)
        assert np.asarray(open_image(data)).max() <= 51, format


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # Pillow's own
@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "ICO"])
def test_truncated_files_are_refused_in_one_line(format: str) -> None:
    data = file_bytes(Image.fromarray(pattern(64, 64, 3)), format)
    assert open_image(data).size == (64, 64)
    for length in (0, 1, 10, len(data) // 2):
        with pytest.raises(ImageError) as caught:
            open_image(data[:length])
        assert "\n" not in str(caught.value)


def test_pil_images_that_cannot_be_read() -> None:
    data = file_bytes(Image.fromarray(pattern(64, 64, 3)), "PNG")
    with pytest.raises(ImageError, match="an image of mode RGB can't be read"):
        open_image(Image.open(io.BytesIO(data[: len(data) // 2])))  # opened, and decoded later
    with pytest.raises(ValueError, match="no pixels: 0 x 9"):
        open_image(Image.new("RGB", (0, 9)))


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a picture " * 50)
    with pytest.raises(ImageError, match=r"notes\.txt: not an image in a known format \(.*PNG"):
        open_image(path)
    with pytest.raises(ImageError, match="not an image"):  # a format whose reader starts another program
        open_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    with pytest.raises(FileNotFoundError):
        open_image(tmp_path / "missing.png")
    with pytest.raises(ImageError, match="32 bits per pixel"):
        open_image(file_bytes(Image.new("F", (9, 9)), "TIFF"))


def test_decompression_bombs_are_refused() -> None:
    """Files of a few KB: by the size in their header, before memory for the pixels is allocated."""
    for side, message in ((30_000, "too many pixels"), (10_500, "10500 x 10500 pixels; at most 100 million")):
        data = bytearray(file_bytes(Image.new("1", (8, 8)), "PPM"))
        data[: data.index(b"8 8") + 3] = b"P4\n%d %d" % (side, side)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own
            with pytest.raises(ImageError, match=message) as caught:
                open_image(bytes(data))
        assert "\n" not in str(caught.value)


def test_data_urls() -> None:
    import base64

    data = file_bytes(Image.fromarray(pattern(8, 8, 3)), "PNG")
    text = base64.b64encode(data).decode()
    url_safe = base64.urlsafe_b64encode(data).decode().rstrip("=")
    for url in (
        f"data:image/png;base64,{text}",
        f"DATA:IMAGE/PNG;charset=utf-8;BASE64,{text}",
        f"data:;base64,{url_safe}",
        f"data:image/png;base64,{text[:20]}\n {text[20:]}",
        f"data:image/png;base64,{text.replace('+', '%2B').replace('/', '%2F')}",
        "data:image/png," + "".join(f"%{byte:02x}" for byte in data),
    ):
        assert decode_data_url(url) == data, url[:40]
    assert open_image(f"data:image/png;base64,{text}").size == (8, 8)
    for url, message in (
        ("data:image/png;base64", "no data URL"),
        ("http://example.org", "no data URL"),
        ("data:text/html;base64,aaaa", "text/html"),
        ("data:image/png;base64,a*b", "base64 is invalid"),
        ("data:image/png;base64,abcde", "base64 is invalid"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_data_url(url)


def test_extreme_shapes() -> None:
    patches, positions = preprocess(pattern(2, 2000, 3))
    assert positions.max(axis=0).tolist() == [3 * 280 - 1, 2] and len(patches) == 280 * 9
    with pytest.raises(ImageError, match="no soft token"):
        target_size(10, 10, 0, 16, 3)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_pillow_is_imported_on_first_use_only() -> None:
    code = "import sys, pydiffusion, pydiffusion.model, pydiffusion.vision; sys.exit('PIL' in sys.modules)"
    assert run_python(code).returncode == 0


def test_listing_devices_imports_no_numpy() -> None:
    code = "import sys, pydiffusion; pydiffusion.devices(); sys.exit('numpy' in sys.modules)"
    assert run_python(code).returncode == 0


def test_without_pillow_the_error_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['PIL'] = None\n"
        "import pydiffusion; from pydiffusion.vision import preprocess\n"
        "try: preprocess(b'x')\n"
        "except pydiffusion.PyDiffusionError as error: print(error)"
    )
    assert run_python(code).stdout == "images need a package: pip install pillow\n"
