"""Prompts with images of random features, for a native session and for the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pydiffusion import _native
from pydiffusion.convert import edit_metadata
from pydiffusion.convert.gguf.header import Value

#: As the toy tokenizer has them.
IMAGE, BEGIN, END = 12, 10, 11
KEY = "diffusion-gemma.attention.bidirectional"

Placed = tuple[int, np.ndarray, bytes]


@dataclass(frozen=True)
class ImagePrompt:
    """Token ids, and images as ``_native.Session.encode`` takes them."""

    ids: np.ndarray
    images: list[Placed]

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, begin: int, end: int) -> ImagePrompt:
        """Tokens [begin, end), which cut no image."""
        inside = [image for image in self.images if begin <= image[0] < end]
        return ImagePrompt(self.ids[begin:end], [(at - begin, x, key) for at, x, key in inside])

    def pieces(self, cuts: Sequence[int]) -> list[ImagePrompt]:
        ends = [*cuts, len(self)]
        return [self.part(begin, end) for begin, end in zip([0, *cuts], ends, strict=True)]

    @property
    def is_image(self) -> np.ndarray:
        return self.ids == IMAGE


def image_prompt(d: int, n_vocab: int, parts: Sequence[int | tuple[int]]) -> ImagePrompt:
    """Text and images in turns: a number is that many random tokens, ``(n,)`` an image of n soft tokens
    between its begin and end token. Features are as loud as scaled embeddings, each dimension otherwise.
    """
    rng = np.random.default_rng(0)
    ids: list[int] = []
    images: list[Placed] = []
    for part in parts:
        if isinstance(part, int):
            ids += rng.integers(13, n_vocab, part).tolist()
            continue
        (n,) = part
        features = rng.standard_normal((n, d)) * rng.uniform(2.0, 10.0, d) + rng.standard_normal(d)
        images.append((len(ids) + 1, features.astype(np.float32), bytes([len(images)])))
        ids += [BEGIN, *[IMAGE] * n, END]
    return ImagePrompt(np.asarray(ids, np.int32), images)


def encode(session: _native.Session, prompt: ImagePrompt, cuts: Sequence[int] = ()) -> np.ndarray:
    """Encode a prompt, cut at these tokens; returns the hidden states (n, d)."""
    pieces = prompt.pieces(cuts)
    return np.concatenate([session.encode(p.ids, images=p.images, return_hidden=True) for p in pieces])


def reading_images(file: Path, target: Path, how: str = "vision") -> Path:
    """A copy of a model file that says how tokens of an image see each other, "vision" or "none"."""
    edit_metadata(file, {KEY: Value("str", how)}, target)
    return target


def reference_encode(context: Any, prompt: ImagePrompt, how: str | None = "vision") -> np.ndarray:
    """As ``Context.encode`` of an empty context, with images; the mask is the one that ``generate`` makes."""
    import torch
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    model = context.model
    config = model.config.text_config
    before, config.use_bidirectional_attention = config.use_bidirectional_attention, how
    model.config.image_token_id = IMAGE
    n = len(prompt)
    positions = torch.arange(n)[None]
    try:
        masks = model.model.encoder.create_masks_for_generate(
            config=model.config,
            inputs_embeds=torch.empty((1, n, 0)),
            attention_mask=torch.ones((1, n), dtype=torch.bool),
            past_key_values=context.cache,
            position_ids=positions,
            mm_token_type_ids=torch.from_numpy(prompt.is_image.astype(np.int64))[None],
        )
        features = np.concatenate([features for _, features, _ in prompt.images])
        with torch.no_grad():
            out = model.model.encoder(
                input_ids=torch.from_numpy(prompt.ids.astype(np.int64))[None],
                attention_mask=masks,
                past_key_values=context.cache,
                position_ids=positions,
                mm_encoder_outputs={
                    "image": BaseModelOutputWithPooling(pooler_output=torch.from_numpy(features))
                },
            )
    finally:
        config.use_bidirectional_attention = before
    context.n_past += n
    return out.last_hidden_state[0].float().numpy()
