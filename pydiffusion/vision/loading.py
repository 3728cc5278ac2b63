"""Images from what users have: PIL images, arrays, files, bytes and data URLs, as RGB images of Pillow."""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

import numpy as np

from pydiffusion.errors import PyDiffusionError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 100_000_000  # of a file; decoding takes at least 4 bytes for each
# Formats that Pillow decodes by itself or with the usual libraries. Left out: those that start other programs
# (EPS), and rare ones, whose decoders few have tried with hostile files.
_FORMATS = (
    "PNG", "JPEG", "MPO", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "TGA", "HEIF",
)  # fmt: skip
_DATA_URL = re.compile(r"data:(?P<type>[^;,]*)(?P<parameters>(?:;[^;,]*)*),", re.IGNORECASE)


def pillow() -> Any:
    """The module ``PIL.Image``. Raises PyDiffusionError, saying what to install, without Pillow."""
    try:
        from PIL import Image
    except ImportError:
        raise PyDiffusionError("images need a package: pip install pillow") from None
    return Image


def open_image(source: Any) -> Image:
    """An image as RGB, transparency composited on white, of an animated one the first frame.

    source: a PIL image or an array, taken as they are; a path or the bytes of a file, rotated as their EXIF
        says; a data URL. Arrays: (height, width), (height, width, channels) or (channels, height, width) with
        1, 3 or 4 channels; integers from 0 to 255, or floats from 0 to 1.
    Raises TypeError for anything else, ValueError for an array of another shape or range, PyDiffusionError
    for a file that is no image, truncated, damaged or too large, OSError when it can't be read.
    """
    image_module = pillow()
    if isinstance(source, image_module.Image):
        return _decoded(source, "the image")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _from_file(io.BytesIO(source), "the image's bytes")
    if isinstance(source, str) and source[:5].lower() == "data:":
        return _from_file(io.BytesIO(decode_data_url(source)), "the data URL")
    if isinstance(source, str) and re.match(r"https?://", source, re.IGNORECASE):
        raise ValueError("an image's address is not fetched: give its bytes, or the path of a file")
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        with path.open("rb") as file:
            return _from_file(file, str(path))
    if hasattr(source, "__array__"):
        return _from_array(np.asarray(source))
    raise TypeError(f"an image must be a PIL image, an array, a path or bytes, not {type(source).__name__}")


def decode_data_url(url: str) -> bytes:
    """The bytes of a data URL, ``data:image/png;base64,...``. Raises ValueError for an invalid one."""
    match = _DATA_URL.match(url)
    if match is None:
        raise ValueError(f"{url[:40]!r} is no data URL: it should begin with data:image/TYPE;base64,")
    if match["type"] and not match["type"].lower().startswith(("image/", "application/octet-stream")):
        raise ValueError(f"the data URL has {match['type'][:80]!r}, not an image")
    body = url[match.end() :]
    if not match["parameters"].lower().endswith(";base64"):
        return unquote_to_bytes(body)
    text = unquote_to_bytes(body).translate(_URL_SAFE, b" \t\r\n")
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError(f"the data URL's base64 is invalid: {str(error)[:100]}") from None


_URL_SAFE = bytes.maketrans(b"-_", b"+/")


def _from_file(file: Any, name: str) -> Image:
    """Decode a file, rotated as its EXIF says."""
    image_module = pillow()
    from PIL import ImageOps, UnidentifiedImageError

    image_module.init()
    formats = [name for name in _FORMATS if name in image_module.OPEN]
    try:
        with image_module.open(file, formats=formats) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise PyDiffusionError(
                    f"{name}: {width} x {height} pixels; at most {MAX_PIXELS // 10**6} million are decoded:"
                    " scale it down"
                )
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
    except (PyDiffusionError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise PyDiffusionError(f"{name}: not an image in a known format ({', '.join(formats)})") from None
    except image_module.DecompressionBombError:
        raise PyDiffusionError(
            f"{name}: too many pixels; at most {MAX_PIXELS // 10**6} million are decoded: scale it down"
        ) from None
    except Exception as error:  # decoders raise almost anything: OSError, SyntaxError, struct.error, ...
        raise PyDiffusionError(f"{name}: damaged or truncated image: {_one_line(error)}") from None


def _decoded(image: Image, name: str) -> Image:
    """A PIL image as RGB; one that was opened lazily is decoded here."""
    if 0 in image.size:
        raise ValueError(f"{name} has no pixels: {image.size[0]} x {image.size[1]}")
    try:
        image.load()
        return _rgb(image)
    except (PyDiffusionError, MemoryError):
        raise
    except Exception as error:
        raise PyDiffusionError(f"{name}: damaged or truncated image: {_one_line(error)}") from None


def _rgb(image: Image) -> Image:
    """RGB, with transparency composited on white."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    background = pillow().new("RGBA", image.size, (255, 255, 255, 255))
    return pillow().alpha_composite(background, image).convert("RGB")


def _from_array(array: np.ndarray) -> Image:
    pixels = _to_bytes(_channels_last(array))
    if pixels.shape[2] == 1:
        pixels = np.repeat(pixels, 3, axis=2)
    return pillow().fromarray(np.ascontiguousarray(pixels), "RGB")


def _channels_last(array: np.ndarray) -> np.ndarray:
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.size == 0:
        raise ValueError(
            f"an image's array has the shape {array.shape}; permitted are (height, width), (height,"
            " width, channels) and (channels, height, width)"
        )
    if array.shape[0] in (1, 3, 4) and array.shape[2] != 3 and array.shape[2] not in (1, 4):
        return np.moveaxis(array, 0, -1)
    if array.shape[2] in (1, 3, 4):
        return array
    raise ValueError(f"an image's array has the shape {array.shape}; permitted are 1, 3 or 4 channels")


def _to_bytes(array: np.ndarray) -> np.ndarray:
    """Integers from 0 to 255, and floats from 0 to 1, as uint8; four channels composited on white."""
    if not (
        array.dtype == bool
        or np.issubdtype(array.dtype, np.integer)
        or np.issubdtype(array.dtype, np.floating)
    ):
        raise ValueError(f"an image's array must have integers or floats, not {array.dtype}")
    if array.dtype == bool:
        array = array.astype(np.uint8) * np.uint8(255)
    low, high = array.min(), array.max()
    if not (low >= 0 and high <= 255):  # also not a number
        raise ValueError(
            f"an image's array has values from {low} to {high}; permitted are 0 to 255, or floats 0 to 1"
        )
    if np.issubdtype(array.dtype, np.floating):
        array = _from_floats(array, float(high))
    pixels = array.astype(np.uint8)
    if pixels.shape[2] != 4:
        return pixels
    alpha = pixels[:, :, 3:] / 255
    return np.round(alpha * pixels[:, :, :3] + (1 - alpha) * 255).astype(np.uint8)


def _from_floats(array: np.ndarray, high: float) -> np.ndarray:
    if high <= 1:
        return (array.astype(np.float64) * 255).astype(np.float32)
    if not np.allclose(array, np.round(array)):
        raise ValueError(
            "an image's array has floats above 1 that are no whole numbers: give 0 to 1, or 0 to 255"
        )
    return array


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
