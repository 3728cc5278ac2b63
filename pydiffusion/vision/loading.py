"""Images from what users have: PIL images, arrays, files, bytes and data URLs, as RGB images of Pillow."""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import unquote_to_bytes

import numpy as np

from pydiffusion._util.warn import warn_caller
from pydiffusion.errors import ImageError, PyDiffusionError, PyDiffusionWarning

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 100_000_000  # of a file; decoding takes at least 4 bytes for each
# Pillow lets no other thread run while it decodes this format: 4 s for 100 million, of a file of 1 KB.
_MAX_PIXELS_JPEG2000 = 16_000_000
# What photographs, scans, drawings and screenshots come in. Left out of Pillow's formats: those that start
# other programs (EPS), that any bytes pass for (TGA), or whose decoders few have tried with hostile files.
# HEIF, and AVIF before Pillow 11.3, are there once a plug-in has registered them.
_FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "ICO", "AVIF", "HEIF")
# Of pixels with 16 bits; of files PNG and PPM have these in mode I too, with some versions of Pillow.
_MODES_16 = ("I;16", "I;16L", "I;16B", "I;16N")
_DATA_URL = re.compile(r"data:(?P<type>[^;,]*)(?P<parameters>(?:;[^;,]*)*),", re.IGNORECASE)
_MAX_PERCENT = 1_000_000  # decoding takes a hundred times the memory that base64 does
_URL_SAFE_BASE64 = bytes.maketrans(b"-_", b"+/")
_ORIENTATION = 0x0112  # EXIF's tag


def pillow() -> Any:
    """The module ``PIL.Image``. Raises PyDiffusionError, saying what to install, without Pillow."""
    try:
        from PIL import Image
    except ImportError:
        raise PyDiffusionError("images need a package: pip install pillow") from None
    return Image


def open_image(source: Any) -> Image:
    """An image as RGB: transparency composited on white, of an animated image the first frame.

    source: a PIL image or an array, taken as it is; a path, the bytes of a file, or a data URL, rotated as
        its EXIF says, 16 bits scaled to 8. Arrays (or tensors in memory): (height, width), (height, width,
        channels) or (channels, height, width) with 1, 3 or 4 channels, channels first where the first of
        three axes is 1, 3 or 4; integers 0 to 255, booleans, or floats 0 to 1.
    Raises ImageError for a file that is no image, damaged, truncated or too large; TypeError for anything
    else, ValueError for an array of another shape or range; OSError when a file can't be read;
    PyDiffusionError without Pillow.
    """
    image_module = pillow()
    if isinstance(source, image_module.Image):
        return _of_pil(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return open_file(io.BytesIO(source), "image")
    if isinstance(source, str) and source[:5].lower() == "data:":
        return open_file(io.BytesIO(decode_data_url(source)), "image")
    if isinstance(source, str) and re.match(r"https?://", source, re.IGNORECASE):
        raise ValueError("an image's address is not fetched: give its bytes, or the path of a file")
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        with path.open("rb") as file:
            return open_file(file, str(path))
    if hasattr(source, "__array__"):
        return image_module.fromarray(_pixels(np.asarray(source)))
    raise TypeError(f"an image must be a PIL image, an array, a path or bytes, not {type(source).__name__}")


def decode_data_url(url: str) -> bytes:
    """The bytes of a data URL, ``data:image/png;base64,...``. Raises ValueError for an invalid one."""
    match = _DATA_URL.match(url)
    if match is None:
        raise ValueError(f"{url[:40]!r} is no data URL: it should begin with data:image/TYPE;base64,")
    if match["type"] and not match["type"].strip().lower().startswith(("image/", "application/octet-stream")):
        raise ValueError(f"the data URL has {match['type'][:80]!r}, not an image")
    if url.count("%", match.end()) > _MAX_PERCENT:
        raise ValueError("the data URL has very many percent signs: encode the image in base64")
    body = unquote_to_bytes(url[match.end() :])
    if not match["parameters"].replace(" ", "").lower().endswith(";base64"):
        return body
    text = body.translate(_URL_SAFE_BASE64, b" \t\r\n").rstrip(b"=")
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError(f"the data URL's base64 is invalid: {_one_line(error)}") from None


def pixels_to_decode(source: Any) -> int:
    """How many pixels ``open_image`` would decode, by the file's header: of the bytes of a file or its path;
    0 for anything else, and for what it refuses.
    """
    is_bytes = isinstance(source, (bytes, bytearray, memoryview))
    if not is_bytes and not isinstance(source, os.PathLike):
        return 0
    try:
        file = io.BytesIO(source) if is_bytes else source
        with pillow().open(file, formats=_formats()) as image:
            width, height = image.size
            return int(width * height)
    except Exception:  # which open_image explains
        return 0


def _formats() -> list[str]:
    """Those of _FORMATS that Pillow has here."""
    pillow().init()
    return [format for format in _FORMATS if format in pillow().OPEN]


def open_file(file: BinaryIO, name: str) -> Image:
    """As ``open_image``, of a file's content. name: for errors."""
    image_module = pillow()
    from PIL import UnidentifiedImageError

    formats = _formats()
    try:
        with image_module.open(file, formats=formats) as image:
            _check_size(image, name)
            image.load()
            return _rgb(_of_8_bits(_upright(image), image.format, name))
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise ImageError(f"{name}: not an image in a known format ({', '.join(formats)})") from None
    except image_module.DecompressionBombError as error:
        raise ImageError(f"{name}: too many pixels: {_one_line(error)}") from None
    except Exception as error:  # decoders raise almost anything: OSError, SyntaxError, struct.error, ...
        raise ImageError(f"{name}: damaged or truncated image: {_one_line(error)}") from None


def _check_size(image: Image, name: str) -> None:
    width, height = image.size
    of_format, limit = "", MAX_PIXELS
    if image.format == "JPEG2000":
        of_format, limit = " of JPEG 2000", _MAX_PIXELS_JPEG2000
    if width * height > limit:
        raise ImageError(
            f"{name}: {width} x {height} pixels; at most {limit // 10**6} million{of_format} are decoded:"
            " scale it down"
        )


def _of_8_bits(image: Image, format: str | None, name: str) -> Image:
    """A decoded file with 16 bits per pixel as L or LA; Pillow's own conversion would clip it at 255."""
    if image.mode not in ("I", "F", *_MODES_16):
        return image
    if image.mode not in _MODES_16 and format not in ("PNG", "PPM"):
        raise ImageError(f"{name}: 32 bits per pixel, whose range is unknown: convert it to 8 or 16 bits")
    values = np.asarray(image).astype(np.int64)
    gray = pillow().fromarray(((values * 255 + 32767) // 65535).clip(0, 255).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        gray.putalpha(pillow().fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return gray


def _upright(image: Image) -> Image:
    """A file's image rotated or mirrored as its EXIF says; damaged EXIF says nothing."""
    operations = pillow().Transpose
    operation = {
        2: operations.FLIP_LEFT_RIGHT,
        3: operations.ROTATE_180,
        4: operations.FLIP_TOP_BOTTOM,
        5: operations.TRANSPOSE,
        6: operations.ROTATE_270,
        7: operations.TRANSVERSE,
        8: operations.ROTATE_90,
    }.get(_orientation(image))
    if operation is None:
        return image
    turned = image.transpose(operation)
    turned.info = image.info  # which may have the transparent color
    return turned


def _orientation(image: Image) -> Any:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # the picture itself is whole
        return 1


def _of_pil(image: Image) -> Image:
    """A PIL image, which is decoded here if it was opened lazily."""
    if 0 in image.size:
        raise ValueError(f"the image has no pixels: {image.size[0]} x {image.size[1]}")
    try:
        image.load()
        if image.mode in ("I", "F", *_MODES_16) and np.asarray(image).max() > 255:
            warn_caller(
                f"an image of mode {image.mode} has values above 255, which are clipped: scale it to mode L,"
                " or give the file's path",
                PyDiffusionWarning,
            )
        return _rgb(image)
    except (PyDiffusionWarning, MemoryError):
        raise
    except Exception as error:  # truncated, or of a mode that Pillow doesn't convert
        raise ImageError(f"an image of mode {image.mode} can't be read: {_one_line(error)}") from None


def _rgb(image: Image) -> Image:
    """RGB, with transparency composited on white, as the reference does."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image if image.mode == "RGB" else image.convert("RGB")
    white = pillow().new("RGBA", image.size, (255, 255, 255, 255))
    return pillow().alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _pixels(array: np.ndarray) -> np.ndarray:
    """An array as uint8 (height, width, 3)."""
    array = _channels_last(array)
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    is_float = np.issubdtype(array.dtype, np.floating)
    if not is_float and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"an image's array must be of integers or floats, not {array.dtype}")
    low, high = array.min(), array.max()
    if not (low >= 0 and high <= 255):  # also where it is not a number
        raise ValueError(
            f"an image's array has values from {low} to {high}; permitted are integers 0 to 255 and floats 0"
            " to 1"
        )
    white = 1 if is_float and high <= 1 else 255
    if white == 255 and is_float and np.any(array != np.rint(array)):
        raise ValueError("an image's array has floats above 1, and fractions: divide it by 255")
    if array.shape[2] == 4:
        array = _on_white(array, white)
    if white == 1:
        # Fractions are dropped, as by the reference.
        array = (array.astype(np.float64) * 255).astype(np.float32)
    return np.ascontiguousarray(np.broadcast_to(array.astype(np.uint8), (*array.shape[:2], 3)))


def _on_white(array: np.ndarray, white: int) -> np.ndarray:
    alpha = array[:, :, 3:] / white
    composite = alpha * array[:, :, :3] + (1 - alpha) * white
    return np.round(composite) if white == 255 else composite.astype(array.dtype)


def _channels_last(array: np.ndarray) -> np.ndarray:
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim == 3 and array.size:
        if array.shape[0] in (1, 3, 4):
            return np.moveaxis(array, 0, -1)
        if array.shape[2] in (1, 3, 4):
            return array
    raise ValueError(
        f"an image's array has the shape {array.shape}; permitted are (height, width), (height, width,"
        " channels) and (channels, height, width) with 1, 3 or 4 channels"
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
