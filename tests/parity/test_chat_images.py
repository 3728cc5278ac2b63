"""Chats with images against transformers: tokens and pixels that it makes of the same messages; and one such
chat all the way through a server, with a tower and a model of random weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from reference.random_checkpoint import SHAPES
from support.fake_vision import noise
from support.seeing_model import grey_part
from support.server_fakes import serving
from support.vision_towers import Tower, random_tower, write_tower

from pydiffusion import DiffusionModel
from pydiffusion.chat.formats.registry import BUILT_IN_TEMPLATES

pytestmark = pytest.mark.reference

TOWER = Tower(64, 4, changes={"position_embedding_size": 512})
TEMPLATE = BUILT_IN_TEMPLATES["diffusion-gemma"].read_text("utf-8")


def image(seed: int, width: int, height: int) -> dict[str, Any]:
    return {"type": "image", "image": noise(seed, width, height)}


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "an image and a question": [
        {"role": "user", "content": [image(1, 60, 40), text("what is in the river?")]}
    ],
    "several, at any place": [
        {"role": "user", "content": [text("the first "), image(2, 9, 200), text(" and "), image(3, 70, 70)]},
        {"role": "assistant", "content": "the same"},
        {"role": "user", "content": [image(4, 33, 21), image(5, 100, 12), text("and there?")]},
    ],
    "nothing but an image": [{"role": "user", "content": [image(6, 17, 90)]}],
    "with instructions": [
        {"role": "system", "content": "a list of names"},
        {"role": "user", "content": [text("the teacher\n"), image(7, 64, 64)]},
    ],
}


@pytest.fixture(scope="module")
def model(
    gguf_file: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[DiffusionModel]:
    folder = tmp_path_factory.mktemp("vision")
    tower = random_tower(TOWER, text_size=SHAPES["small"].d)
    mmproj = write_tower(folder / "mmproj.gguf", tower, TOWER)
    file = gguf_file("small", "f32", seed=3, dtype="f32")
    with DiffusionModel(file, mmproj=mmproj, chat_template="diffusion-gemma", n_threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def theirs(checkpoint_folder: Callable[..., Path]) -> Any:
    from transformers import PreTrainedTokenizerFast
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
    from transformers.models.gemma4.processing_gemma4 import Gemma4Processor

    folder = checkpoint_folder("small", seed=3, dtype="f32")
    named = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), pad_token="<pad>", extra_special_tokens=named
    )

    class TextAndImages(Gemma4Processor):
        """Without sound and films, for which the tokenizer has no tokens."""

        def validate_inputs(self, *_: Any, **__: Any) -> None:
            pass

        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            return type(argument)

    images = Gemma4ImageProcessorPil(patch_size=TOWER.config["patch_size"], pooling_kernel_size=TOWER.pooling)
    return TextAndImages(None, images, tokenizer, None, chat_template=TEMPLATE)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_prompts_of_transformers(name: str, model: DiffusionModel, theirs: Any) -> None:
    messages = CONVERSATIONS[name]
    expected = theirs.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="np"
    )
    ours = model.chat_prompt(messages)
    assert ours.ids.tolist() == expected["input_ids"][0].tolist()
    assert len(ours.images) == len(expected["pixel_values"])
    for placed, pixels in zip(ours.images, expected["pixel_values"], strict=True):
        n = len(placed.image.patches)
        assert np.abs(pixels[:n] - placed.image.patches).max() < 1e-6
        assert not pixels[n:].any(), "the rest is padding"


def test_a_chat_through_the_server(model: DiffusionModel) -> None:
    """The answer is that of the library; a second question about an image encodes no image again."""
    assert model.vision is not None
    parts = [grey_part(9), text("the river")]
    messages = [{"role": "user", "content": parts}]
    alone = model.chat(messages, seed=4, max_tokens=8)
    with serving(model) as (address, _), httpx.Client(base_url=address, timeout=60) as client:
        body = {"messages": messages, "seed": 4, "max_tokens": 8}
        before = model.vision.n_encoded
        for n_cached in (0, alone.n_prompt):
            answer = client.post("/v1/chat/completions", json=body).json()
            assert answer["choices"][0]["message"]["content"] == alone.text
            usage = answer["usage"]
            assert (usage["prompt_tokens"], usage["completion_tokens"]) == (alone.n_prompt, 8)
            assert usage["prompt_tokens_details"]["cached_tokens"] == n_cached
        assert model.vision.n_encoded == before, "its features are kept"
        parts[0] = grey_part(200)
        other = client.post("/v1/chat/completions", json=body).json()
        assert model.vision.n_encoded == before + 1
        assert other["usage"]["prompt_tokens_details"]["cached_tokens"] < 10
        assert other["choices"][0]["message"]["content"] != alone.text
