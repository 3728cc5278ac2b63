"""Images that are longer than a chunk, in sessions that have room for them and in those that have none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.image_prompts import BEGIN, END, IMAGE

from pydiffusion import _native
from pydiffusion.convert import edit_metadata
from pydiffusion.convert.gguf.header import Value

N = 600  # soft tokens; a chunk has 512 tokens, the window 16


@pytest.fixture(scope="module")
def model(gguf_file: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> _native.Model:
    path = tmp_path_factory.mktemp("model") / "long.gguf"
    edit_metadata(gguf_file("small", "q8_0"), {"diffusion-gemma.context_length": Value("u32", 2048)}, path)
    return _native.Model(str(path), n_threads=1)


def test_a_copy_needs_room_for_the_images_too(model: _native.Model) -> None:
    """Else going back would encode a chunk that the cache can't take."""
    features = np.random.default_rng(0).standard_normal((N, model.hparams["n_embd"])).astype(np.float32)
    ids = np.array([20, BEGIN, *[IMAGE] * N, END, *[21] * 700], np.int32)
    source, other = _native.Session(model, 2048, N), _native.Session(model, 2048, N)
    without_room = _native.Session(model, 2048)
    source.encode(ids, images=[(2, features, b"key")])
    without_room.encode(ids[:1])
    with pytest.raises(ValueError, match="600 soft tokens, but this session has room for images of up to 5"):
        without_room.copy_from(source)
    assert without_room.tokens.tolist() == [20] and not without_room.images
    other.copy_from(source)
    other.truncate(N + 3)
    assert other.tokens.tolist() == ids[: N + 3].tolist() and other.images == [(2, N, b"key")]
