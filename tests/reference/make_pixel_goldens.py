"""Make the goldens of preprocessing: sizes and sampled pixels of transformers' Pillow image processor.

python -m reference.make_pixel_goldens    (in tests/, with the extras test and reference)
"""

from __future__ import annotations

import json
import random

import numpy as np
from support.images import cases, picture
from support.paths import GOLDENS

N_SAMPLES = 24


def sampled(patches: np.ndarray) -> list[int]:
    """Levels (0 to 255) of pixels spread over an image's patches."""
    places = np.linspace(0, patches.size - 1, N_SAMPLES).astype(np.int64)
    return np.rint(patches.reshape(-1)[places] * 255).astype(int).tolist()


def sides() -> list[tuple[int, int, int, int, int]]:
    """(height, width, soft tokens, patch size, pooling): ordinary images, strips, and limits between rows."""
    generator = random.Random(18)
    found = [(1, 1, 280, 16, 3), (1, 100_000, 280, 16, 3), (100_000, 1, 1120, 16, 3), (3, 901, 70, 16, 3)]
    for n in (70, 140, 280, 560, 1120):
        found += [(48 * rows, 48 * (n // rows), n, 16, 3) for rows in (1, 2, 7, 10, 14) if n % rows == 0]
        found += [
            (int(2 ** generator.uniform(0, 13)), int(2 ** generator.uniform(0, 13)), n, 16, 3)
            for _ in range(40)
        ]
    small = [(4, 1), (4, 2), (4, 3), (14, 2), (8, 5)]
    return found + [
        (generator.randint(1, 900), generator.randint(1, 900), 70, *generator.choice(small))
        for _ in range(60)
    ]


def main() -> None:
    from transformers.models.gemma4.image_processing_pil_gemma4 import (
        Gemma4ImageProcessorPil,
        get_aspect_ratio_preserving_size,
    )

    reference = Gemma4ImageProcessorPil()
    images = []
    for kind, height, width, n in cases():
        answer = reference(picture(kind, height, width), max_soft_tokens=n, return_tensors="np")
        real = answer["image_position_ids"][0][:, 0] >= 0
        patches = answer["pixel_values"][0][real]
        columns, rows = (answer["image_position_ids"][0].max(axis=0) + 1).tolist()
        mean = round(float(patches.mean(dtype=np.float64)) * 255, 3)
        images.append([kind, height, width, n, rows, columns, mean, sampled(patches)])
    sizes = [
        [*side, *get_aspect_ratio_preserving_size(side[0], side[1], side[3], side[2] * side[4] ** 2, side[4])]
        for side in sides()
    ]
    lines = ",\n".join(json.dumps(image) for image in images)
    text = f'{{"images": [\n{lines}\n],\n"sizes": {json.dumps(sizes)}}}\n'
    (GOLDENS / "pixels.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
