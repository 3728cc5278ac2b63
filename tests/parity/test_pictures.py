"""Pictures through everything: pixels, tower, prompt and encoder, as transformers has it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from reference.random_checkpoint import SHAPES, random_ids
from support.image_prompts import BEGIN, END, IMAGE, ImagePrompt, reading_images, reference_encode
from support.images import picture
from support.models import compare
from support.parity import MAX_BOUND, MEAN_BOUND
from support.vision_towers import Tower, random_tower, reference_features, write_tower

from pydiffusion import DiffusionModel

pytestmark = pytest.mark.reference


def test_pictures_in_a_prompt(
    gguf_file: Callable[..., Path],
    checkpoint_folder: Callable[..., Path],
    tmp_path: Path,
    report: Callable[[str], None],
) -> None:
    from reference.hf_model import Context, load_reference
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    shape = SHAPES["small"]
    tower = Tower(64, 4, changes={"position_embedding_size": 48})
    reference = random_tower(tower, text_size=shape.d)
    write_tower(tmp_path / "mmproj.gguf", reference, tower)
    reading_images(gguf_file("small", seed=3, dtype="f32"), tmp_path / "m.gguf")
    pixels = Gemma4ImageProcessorPil(patch_size=tower.config["patch_size"], max_soft_tokens=70)

    pictures: list[Image.Image] = [picture("RGBA", 41, 60), picture("P", 70, 33)]
    text = [random_ids(i, "text", 5, shape.vocab).tolist() for i in range(3)]
    ids, images, items = [*text[0]], [], [*text[0]]
    for image, words in zip(pictures, text[1:], strict=True):
        cut = pixels(image, return_tensors="np")
        real = cut["image_position_ids"][0][:, 0] >= 0
        positions = cut["image_position_ids"][0][real].astype(np.int32)
        features = reference_features(reference, cut["pixel_values"][0][real], positions)
        images.append((len(ids) + 1, features, b""))
        ids += [BEGIN, *[IMAGE] * len(features), END, *words]
        items += [image, *words]
    context = Context.new(load_reference(checkpoint_folder("small", seed=3, dtype="f32")))
    theirs = reference_encode(context, ImagePrompt(np.asarray(ids, np.int32), images))

    with DiffusionModel(tmp_path / "m.gguf", n_threads=2, n_ctx=512, kv_type="f32") as model:
        prepare = model.require_vision().prepare
        session = model.new_session()
        prepared = [prepare(item, 70) if isinstance(item, Image.Image) else item for item in items]
        ours = session.encode(prepared, return_hidden=True)
        assert session.tokens.tolist() == ids
        canvas = random_ids(0, "canvas", shape.canvas, shape.vocab)
        difference = compare(session.native.denoise(canvas, None), context.denoise(canvas))
        found = np.abs(ours - theirs).max() / np.abs(theirs).max()
    report(f"pictures: hidden states {found:.1e} of their range; canvas: {difference}")
    assert found < 1e-4
    assert difference.mean <= MEAN_BOUND and difference.max <= MAX_BOUND and difference.agreement == 1.0
