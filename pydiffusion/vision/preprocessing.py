"""Preprocessing of an image for the vision tower: size, scaling, patches and their positions.

Values are those of the reference's Pillow image processor (``Gemma4ImageProcessorPil`` of transformers):
bicubic with antialiasing on 8-bit values, then division by 255.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pydiffusion.errors import ImageError

from .loading import open_image

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_SOFT_TOKENS = (70, 140, 280, 560, 1120)  # those that Gemma 4 was trained with
_MAX_PIXELS = 1 << 26  # of a scaled image, as a vision file may ask for
_BICUBIC = 3  # PIL.Image.Resampling.BICUBIC


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """An image as the vision tower takes it.

    patches: float32 (n_patches, 3 * patch_size**2), 0 to 1. positions: int32 (n_patches, 2), column and row.
    n_soft_tokens: what the tower makes of it. key: hash of the pixels, the shape, the options and the tower.
    """

    patches: npt.NDArray[np.float32]
    positions: npt.NDArray[np.int32]
    n_soft_tokens: int
    key: bytes

    @property
    def nbytes(self) -> int:
        """Size of the patches."""
        return self.patches.nbytes


def preprocess(
    image: Any, max_soft_tokens: int = 280, patch_size: int = 16, pooling_kernel_size: int = 3
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    """Scale an image to the number of soft tokens, and cut it into patches.

    image: a PIL image, an array, a path or the bytes of a file; see ``loading.open_image``.
    max_soft_tokens: 70, 140, 280, 560 or 1120; small images are scaled up to it as well.
    patch_size: side of a patch in pixels. pooling_kernel_size: side, in patches, of what one soft token
    covers.
    Returns (patches, positions): float32 (n_patches, 3 * patch_size**2), 0 to 1, a patch's pixels by rows
    with interleaved channels; int32 (n_patches, 2), column and row of each patch.
    Raises ValueError for an invalid argument, else as ``loading.open_image``; ImageError also for an image
    that has no room for a soft token.
    """
    if max_soft_tokens not in MAX_SOFT_TOKENS:
        raise ValueError(
            f"max_soft_tokens is {max_soft_tokens!r}; permitted are {permitted(MAX_SOFT_TOKENS)}"
        )
    for name, value in (("patch_size", patch_size), ("pooling_kernel_size", pooling_kernel_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; permitted is an integer of at least 1")
    if max_soft_tokens * (patch_size * pooling_kernel_size) ** 2 > _MAX_PIXELS:
        raise ValueError(
            f"{max_soft_tokens} soft tokens of {pooling_kernel_size} x {pooling_kernel_size} patches of"
            f" {patch_size} x {patch_size} pixels have more than {_MAX_PIXELS} pixels: lower one of these"
        )
    return cut(open_image(image), max_soft_tokens, patch_size, pooling_kernel_size)


def permitted(values: tuple[int, ...]) -> str:
    """Values as a text: 70, 140 and 280."""
    return f"{', '.join(map(str, values[:-1]))} and {values[-1]}"


def cut(
    image: Image, max_soft_tokens: int, patch_size: int, pooling: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    """As ``preprocess``, of an RGB image and with any number of soft tokens."""
    width, height = image.size
    height, width = target_size(height, width, max_soft_tokens, patch_size, pooling)
    if image.size != (width, height):
        image = image.resize((width, height), resample=_BICUBIC)
    pixels = np.asarray(image, dtype=np.uint8)  # (height, width, 3)
    rows, columns = height // patch_size, width // patch_size
    grid = pixels.reshape(rows, patch_size, columns, patch_size, 3).transpose(0, 2, 1, 3, 4)
    # In float64 first, as the reference: float32 alone is off in the last bit for some values.
    patches = _SCALED[grid.reshape(rows * columns, -1)]
    y, x = np.divmod(np.arange(rows * columns, dtype=np.int32), np.int32(columns))
    return patches, np.stack([x, y], axis=1)


_SCALED = (np.arange(256) * (1 / 255)).astype(np.float32)


def target_size(
    height: int, width: int, max_soft_tokens: int, patch_size: int, pooling: int
) -> tuple[int, int]:
    """Height and width in pixels that an image is scaled to: about its aspect ratio, multiples of the side of
    a soft token, as many soft tokens as permitted.

    Raises ImageError for an image that has no room for a soft token.
    """
    side = pooling * patch_size
    budget = max_soft_tokens * pooling**2 * patch_size**2  # pixels
    # Float for float as the reference, since rounding decides about a whole row of soft tokens.
    factor = math.sqrt(budget / (height * width))
    rows = math.floor(factor * height / side)
    columns = math.floor(factor * width / side)
    if rows == 0 and columns == 0:
        raise ImageError(f"an image of {width} x {height} pixels has no soft token of {side} x {side}")
    # A strip: one soft token high or wide, its length the aspect ratio.
    if rows == 0:
        rows, columns = 1, min(math.floor(width / height), max_soft_tokens)
    elif columns == 0:
        rows, columns = min(math.floor(height / width), max_soft_tokens), 1
    if rows * columns > max_soft_tokens:
        raise ImageError(
            f"an image of {width} x {height} pixels would take {rows * columns} soft tokens, more than"
            f" {max_soft_tokens}"
        )
    return rows * side, columns * side


def image_key(patches: np.ndarray, positions: np.ndarray, options: bytes) -> bytes:
    """Hash of an image's patches, its shape, and whatever else the tower's features depend on; 32 bytes."""
    digest = hashlib.blake2b(digest_size=32)
    columns, rows = (positions.max(axis=0) + 1).tolist()
    digest.update(f"{rows} {columns} {len(options)} ".encode())
    digest.update(options)
    digest.update(np.ascontiguousarray(patches).data)
    return digest.digest()
