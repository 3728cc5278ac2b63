"""Sizes of patches that would take more memory than there is are refused before an image is scaled."""

from __future__ import annotations

import numpy as np
import pytest

from pydiffusion.vision import preprocess

IMAGE = np.zeros((20, 30, 3), np.uint8)


@pytest.mark.parametrize("arguments", [{"patch_size": 10**9}, {"pooling_kernel_size": 10**4}])
def test_too_many_pixels(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="pixels: lower one of these"):
        preprocess(IMAGE, **arguments)


def test_the_most() -> None:
    patches, _ = preprocess(IMAGE, 70, patch_size=32, pooling_kernel_size=30)
    assert len(patches) <= 70 * 30**2 and len(patches) % 30**2 == 0
