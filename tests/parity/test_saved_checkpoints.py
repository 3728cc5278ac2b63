"""Logits of checkpoints as transformers saves them: an untied one, and one with another rotary factor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference.random_checkpoint import SHAPES, random_ids
from support.models import WEIGHT_TYPES, compare, open_model

from pydiffusion import _native
from pydiffusion.convert import convert

pytestmark = pytest.mark.reference

SHAPE = SHAPES["small"]
PROMPT = random_ids(3, "prompt", 20, SHAPE.vocab)
CANVAS = random_ids(3, "canvas", SHAPE.canvas, SHAPE.vocab)


def their_logits(folder: Path) -> list[np.ndarray]:
    """Of the reference, loaded from the folder: without self-conditioning and with it."""
    from reference.hf_model import Context, load_reference

    context = Context.new(load_reference(folder))
    context.encode(PROMPT)
    first = context.denoise(CANVAS)
    return [first, context.denoise(CANVAS, (first / np.float32(0.5)).astype(np.float32))]


def assert_converts(folder: Path, target: Path) -> None:
    """Converted to F32, the folder gives the reference's logits within the bar of F32 files."""
    theirs = their_logits(folder)
    convert(folder, target, "f32")
    session = _native.Session(open_model(target, "f32", WEIGHT_TYPES["f32"]), 160)
    session.encode(PROMPT)
    conditioning = (theirs[0] / np.float32(0.5)).astype(np.float32)
    for ours, wanted in zip(
        [session.denoise(CANVAS, None), session.denoise(CANVAS, conditioning)], theirs, strict=True
    ):
        difference = compare(ours, wanted)
        assert difference.mean <= 1e-3 and difference.max <= 1e-2, difference
        assert difference.agreement == 1.0, difference


@pytest.fixture(scope="module")
def untied(checkpoint_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved by transformers with a head of its own and ``tie_word_embeddings`` false at the top alone."""
    import torch
    from reference.hf_model import load_reference
    from transformers import DiffusionGemmaForBlockDiffusion

    source, folder = checkpoint_folder("small"), tmp_path_factory.mktemp("untied") / "small"
    tied = load_reference(source)
    config = tied.config
    config.tie_word_embeddings = False
    model = DiffusionGemmaForBlockDiffusion(config)
    state = {name: tensor.clone() for name, tensor in tied.state_dict().items()}
    noise = torch.randn(state["lm_head.weight"].shape, generator=torch.Generator().manual_seed(1))
    state["lm_head.weight"] += 0.1 * noise
    model.load_state_dict(state)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / name, folder)
    return folder


def test_an_untied_checkpoint(untied: Path, tmp_path: Path) -> None:
    saved = json.loads((untied / "config.json").read_text())
    assert (saved["tie_word_embeddings"], saved["text_config"]["tie_word_embeddings"]) == (False, True)
    assert_converts(untied, tmp_path / "m.gguf")


def test_the_head_makes_the_difference(untied: Path, checkpoint_folder: Callable[..., Path]) -> None:
    """Or a converter that ties it would pass."""
    difference = compare(their_logits(untied)[0], their_logits(checkpoint_folder("small"))[0])
    assert difference.mean > 0.1


@pytest.mark.parametrize(
    "tables",
    [
        # A factor beside the tables is for those without one.
        {"full_attention": None, "sliding_attention": 1.0},
        {"full_attention": 0.75, "sliding_attention": 1.0},
    ],
)
def test_a_rotary_factor_beside_the_tables(
    checkpoint_folder: Callable[..., Path], tmp_path: Path, tables: dict[str, float | None]
) -> None:
    folder = tmp_path / "small"
    shutil.copytree(checkpoint_folder("small"), folder)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config["text_config"]["partial_rotary_factor"] = 0.5
    for kind, factor in tables.items():
        table = config["text_config"]["rope_parameters"][kind]
        table.pop("partial_rotary_factor", None)
        if factor is not None:
            table["partial_rotary_factor"] = factor
    (folder / "config.json").write_text(json.dumps(config))
    assert_converts(folder, tmp_path / "m.gguf")


@pytest.mark.parametrize("epsilon", [1e-12, 1e-3, 0.1])
def test_another_epsilon(checkpoint_folder: Callable[..., Path], tmp_path: Path, epsilon: float) -> None:
    folder = tmp_path / "small"
    shutil.copytree(checkpoint_folder("small"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = epsilon
    (folder / "config.json").write_text(json.dumps(config))
    assert_converts(folder, tmp_path / "m.gguf")
