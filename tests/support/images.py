"""Pictures for tests, by integer arithmetic: the same with every version of numpy and Pillow."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

#: Modes of PIL images; after a dash what is transparent: one color, or an alpha for each color of a palette.
MODES = ("RGB", "L", "LA", "1", "P", "P-color", "P-alphas", "RGBA", "RGB-color", "CMYK", "YCbCr", "I;16")
#: Arrays, by axes and type.
ARRAYS = ("hwc-uint8", "chw-uint8", "hw1-uint8", "hw4-uint8", "hwc-int64", "hwc-float32")
SIZES = ((1, 1), (37, 53), (259, 131), (480, 641), (768, 768), (5, 901))  # (height, width)


def pattern(height: int, width: int, channels: int, seed: int = 0) -> np.ndarray:
    """Waves, edges and noise: uint8 (height, width, channels)."""
    y, x, c = np.ogrid[:height, :width, :channels]
    waves = (x * x * (c + 3) + y * (7 * x + 11 * c + seed)) >> 6
    edges = ((x // 29 + y // 31 + c) % 2) * 96
    noise = (x * 7919 + y * 104729 + c * 1299709 + seed * 15485863) % 1021 % 64
    return ((waves % 96) + edges + noise).astype(np.uint8)


def picture(kind: str, height: int, width: int, seed: int = 0) -> Any:
    """A PIL image of one of MODES, or one of ARRAYS."""
    if kind in ARRAYS:
        return _array(kind, height, width, seed)
    mode, _, transparent = kind.partition("-")
    if mode == "I;16":
        wide = pattern(height, width, 2, seed).astype(np.uint16)
        return Image.fromarray(wide[:, :, 0] + wide[:, :, 1] // 64 * 256)
    if mode == "1":
        return Image.fromarray(pattern(height, width, 1, seed)[:, :, 0] > 100)
    bands = len(Image.new(mode, (1, 1)).getbands())
    image = Image.frombytes(mode, (width, height), pattern(height, width, bands, seed).tobytes())
    if mode == "P":
        image.putpalette(pattern(16, 16, 3, seed).tobytes())
    if transparent == "alphas":
        image.info["transparency"] = pattern(256, 1, 1, seed + 1).tobytes()
    elif transparent:
        image.info["transparency"] = image.getpixel((0, 0))
    return image


def _array(kind: str, height: int, width: int, seed: int) -> np.ndarray:
    axes, _, dtype = kind.partition("-")
    channels = int(axes[2]) if axes[2].isdecimal() else 3
    array = pattern(height, width, channels, seed).astype(dtype)
    return np.moveaxis(array, -1, 0) if axes == "chw" else array


def cases() -> Iterator[tuple[str, int, int, int]]:
    """(kind, height, width, soft tokens): every kind with some sizes."""
    budgets = (70, 140, 280)
    for i, kind in enumerate((*MODES, *ARRAYS)):
        for j in range(4):
            height, width = SIZES[(i + j) % len(SIZES)]
            if kind in ARRAYS and height == 1:  # which of its axes are the channels would be a guess
                height, width = 7, 9
            yield kind, height, width, budgets[(i + j) % 3]


def file_bytes(image: Any, format: str, **options: Any) -> bytes:
    """An image as a file of that format."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()
