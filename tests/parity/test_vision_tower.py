"""Features of images against transformers, float32, on random towers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.vision_towers import Tower, picture, random_tower, reference_features, write_tower

from pydiffusion import _native
from pydiffusion.convert import convert

pytestmark = pytest.mark.reference

#: Largest difference of float32 features, as a part of their range.
BOUND = 1e-4

PLAIN = {"standardize": False, "use_clipped_linears": False}
TOWERS = {
    "pooled": Tower(64, 4),
    "plain": Tower(64, 4, changes=PLAIN),
    "head of 72": Tower(144, 2, grid=(9, 9), changes={"intermediate_size": 269}),
    "head of 12": Tower(36, 3, pooling=2, grid=(4, 10), changes={"standardize": False}),
    "one patch": Tower(64, 4, pooling=1, grid=(1, 1)),
    "not pooled": Tower(64, 4, pooling=1, grid=(5, 3), changes={"use_clipped_linears": False}),
    "one soft token": Tower(32, 2, pooling=3, grid=(3, 3), changes={"num_hidden_layers": 1}),
    "many patches": Tower(48, 2, grid=(18, 15), changes={"patch_size": 2, "rms_norm_eps": 1e-3}),
}


@pytest.fixture(scope="module")
def references() -> dict[str, Any]:
    return {name: random_tower(tower, seed) for seed, (name, tower) in enumerate(TOWERS.items())}


@pytest.fixture(scope="module")
def files(references: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("towers")
    return {
        name: write_tower(folder / f"{i}.gguf", references[name], tower)
        for i, (name, tower) in enumerate(TOWERS.items())
    }


@pytest.fixture(scope="module")
def text(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text model of every tower."""
    path = tmp_path_factory.mktemp("text") / "text.gguf"
    convert(files["pooled"].with_suffix(""), path, "f32")
    return path


@pytest.fixture(scope="module", params=[1, 3])
def model(request: pytest.FixtureRequest, text: Path) -> Iterator[_native.Model]:
    yield _native.Model(str(text), n_threads=request.param)


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference as a part of the range of the reference's features."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == np.float32
    return float(np.abs(ours - theirs).max() / np.ptp(theirs))


@pytest.mark.parametrize("name", TOWERS)
def test_features(
    name: str, model: _native.Model, references: dict[str, Any], files: dict[str, Path]
) -> None:
    tower = TOWERS[name]
    vision = _native.Vision(str(files[name]), model)
    for seed in range(2):
        patches, positions = picture(tower, seed)
        theirs = reference_features(references[name], patches, positions)
        assert difference(vision.encode(patches, positions), theirs) < BOUND
