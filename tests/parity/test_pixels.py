"""Preprocessing compared live with transformers' image processor: sizes at random, pixels of every mode."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable

import numpy as np
import pytest
from support.images import ARRAYS, MODES, picture

from pydiffusion import ImageError
from pydiffusion.vision import preprocess
from pydiffusion.vision.preprocessing import MAX_SOFT_TOKENS, target_size

pytestmark = pytest.mark.reference


def test_sizes() -> None:
    from transformers.models.gemma4.image_processing_pil_gemma4 import get_aspect_ratio_preserving_size

    generator = random.Random(1)
    refused = 0
    for _ in range(20_000):
        height, width = (int(2 ** generator.uniform(0, 16)) for _ in range(2))
        n, patch_size, pooling = (
            generator.choice((1, *MAX_SOFT_TOKENS)),
            generator.choice((4, 5, 16)),
            generator.randint(1, 4),
        )
        where = (height, width, n, patch_size, pooling)
        try:
            expected = get_aspect_ratio_preserving_size(height, width, patch_size, n * pooling**2, pooling)
        except ValueError:
            refused += 1
            with pytest.raises(ImageError):
                target_size(height, width, n, patch_size, pooling)
        else:
            assert target_size(height, width, n, patch_size, pooling) == expected, where
    assert refused < 4000


def test_pixels(report: Callable[[str], None]) -> None:
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    reference = Gemma4ImageProcessorPil()
    generator = random.Random(2)
    worst, n_images = 0.0, 0
    for kind in (*MODES, *ARRAYS):
        for seed in range(6):
            height, width = generator.randint(5, 900), generator.randint(5, 900)
            image = picture(kind, height, width, seed)
            n = generator.choice(MAX_SOFT_TOKENS[:3])
            theirs = reference(image, max_soft_tokens=n, return_tensors="np")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                patches, positions = preprocess(image, n)
            assert np.array_equal(theirs["image_position_ids"][0][: len(positions)], positions)
            assert (theirs["image_position_ids"][0][len(positions) :] == -1).all()
            assert theirs["num_soft_tokens_per_image"][0] == len(patches) // 9
            worst = max(worst, float(np.abs(theirs["pixel_values"][0][: len(patches)] - patches).max()))
            n_images += 1
    report(f"pixels of {n_images} images against transformers: largest difference {worst:.1e}")
    assert worst < 1e-6
