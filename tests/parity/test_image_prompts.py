"""Prompts with images against transformers: masks, features in their places, the canvas behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from reference.random_checkpoint import SHAPES, random_ids
from support.image_prompts import ImagePrompt, encode, image_prompt, reading_images, reference_encode
from support.models import compare
from support.parity import MAX_BOUND, MEAN_BOUND

from pydiffusion import _native

Parts = Sequence[int | tuple[int]]

#: The window of "small" is 16 tokens, of "wide" 12.
PROMPTS: dict[str, Parts] = {
    "one": [5, (9,), 6],
    "longer than the window": [3, (40,), 7],
    "first and last": [(6,), 11, (5,)],
    "several, one after another": [9, (4,), (1,), (23,), 2, (12,), 30],
    "behind the window": [4, (8,), 60],
    "across chunks": [470, (60,), 40, (30,), 5],  # no chunk of 512 may end within the first image
    "longer than a chunk": [20, (600,), 9],
}


@pytest.fixture(scope="module")
def model_file(
    gguf_file: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """``model_file("small", "vision", "f32")``: a file that says how an image's tokens see each other."""

    def get(shape: str, how: str = "vision", type: str = "f32") -> Path:
        folder = tmp_path_factory.mktemp("images")
        return reading_images(gguf_file(shape, type, seed=3, dtype="f32"), folder / f"{how}.gguf", how)

    return get


def prompt_for(shape: str, parts: Parts, seed: int = 0) -> ImagePrompt:
    return image_prompt(SHAPES[shape].d, SHAPES[shape].vocab, parts, seed)


def new_session(model: _native.Model) -> _native.Session:
    return _native.Session(model, 1024, image_tokens=1000)


@pytest.mark.reference
@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("shape", ["small", "wide"])
def test_against_transformers(
    shape: str,
    name: str,
    model_file: Callable[..., Path],
    checkpoint_folder: Callable[..., Path],
    report: Callable[[str], None],
) -> None:
    from reference.hf_model import Context, load_reference

    prompt, s = prompt_for(shape, PROMPTS[name]), SHAPES[shape]
    context = Context.new(load_reference(checkpoint_folder(shape, seed=3, dtype="f32")))
    session = new_session(_native.Model(str(model_file(shape)), n_threads=2, kv_type="f32"))
    wanted, found = reference_encode(context, prompt), encode(session, prompt)
    hidden = np.abs(found - wanted).max() / np.abs(wanted).max()
    canvas = random_ids(0, "canvas", s.canvas, s.vocab)
    difference = compare(session.denoise(canvas, None), context.denoise(canvas))
    report(f"images: {shape}, {name}: hidden states {hidden:.1e} of their range; canvas: {difference}")
    assert hidden < 1e-4
    assert difference.mean <= MEAN_BOUND and difference.max <= MAX_BOUND and difference.agreement == 1.0
    assert session.images == [(at, len(x), key) for at, x, key in prompt.images]
