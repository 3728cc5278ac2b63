"""Features of images against transformers, float32, on random towers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.gguf_mutator import ARRAY, F32, Array, read_gguf
from support.vision_towers import (
    Tower,
    picture,
    random_tower,
    reference_features,
    with_weights_of,
    write_as_llama_cpp,
    write_tower,
)

from pydiffusion import _native
from pydiffusion.convert import convert

pytestmark = pytest.mark.reference

#: Largest difference of float32 features, as a part of their range; on the host in place of a device ggml's
#: GELU goes through a table of float16.
BOUND, HOST_BOUND = 1e-4, 5e-4

PLAIN = {"standardize": False, "use_clipped_linears": False}
TOWERS = {
    "pooled": Tower(64, 4),
    "plain": Tower(64, 4, changes=PLAIN),
    "head of 72": Tower(144, 2, grid=(9, 9), changes={"intermediate_size": 269}),
    "head of 12": Tower(36, 3, pooling=2, grid=(4, 10), changes={"standardize": False}),
    "heads wider than the rest": Tower(48, 3, changes={"head_dim": 32}),
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


def open_text(path: Path, **options: Any) -> _native.Model:
    return _native.Model(str(path), n_threads=options.pop("n_threads", 2), **options)


@pytest.fixture(
    scope="module",
    params=[
        {"n_threads": 1},
        {"n_threads": 3},
        {"device": "host"},
        {"device": "host", "kernels": "cuda"},
        {"device": "host", "n_gpu_layers": 0},
    ],
    ids=lambda options: " ".join(f"{key} {value}" for key, value in options.items()),
)
def model(request: pytest.FixtureRequest, text: Path) -> _native.Model:
    return open_text(text, **request.param)


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference as a part of the range of the reference's features."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == np.float32
    return float(np.abs(ours - theirs).max() / np.ptp(theirs))


@pytest.mark.parametrize("name", TOWERS)
def test_features(
    name: str,
    model: _native.Model,
    references: dict[str, Any],
    files: dict[str, Path],
    report: Callable[[str], None],
) -> None:
    tower = TOWERS[name]
    vision = _native.Vision(str(files[name]), model)
    backend = model.description["backend"]
    differences = []
    for seed in range(2):
        patches, positions = picture(tower, seed)
        theirs = reference_features(references[name], patches, positions)
        differences.append(difference(vision.encode(patches, positions), theirs))
    report(f"features of a tower, {name}, {backend}: {max(differences):.1e} of their range")
    assert max(differences) < (BOUND if backend == "CPU" else HOST_BOUND)


def test_what_a_file_says(text: Path, files: dict[str, Path]) -> None:
    info = _native.Vision(str(files["many patches"]), open_text(text)).info
    assert info["n_bytes"] == files["many patches"].stat().st_size
    tower = TOWERS["many patches"]
    expected = {
        "patch_size": 2, "pooling": 3, "n_positions": 20, "max_soft_tokens": 280, "projection_dim": 256,
        "n_layer": 2, "n_embd": tower.width, "n_ff": 96, "n_head": 2, "head_dim": 24,
        "rms_eps": float(np.float32(1e-3)), "rope_theta": 100.0, "standardize": True, "clipped": True,
    }  # fmt: skip
    assert {key: info[key] for key in expected} == expected
    assert list(info["weight_types"]) == ["F32"]
    assert not _native.Vision(str(files["plain"]), open_text(text)).info["clipped"]


def test_patches_in_any_order(text: Path, files: dict[str, Path]) -> None:
    """Soft tokens are in the order of their places, whatever that of the patches."""
    vision = _native.Vision(str(files["many patches"]), open_text(text))
    patches, positions = picture(TOWERS["many patches"])
    order = np.random.default_rng(1).permutation(len(patches))
    ours = vision.encode(patches[order], positions[order])
    assert difference(ours, vision.encode(patches, positions)) < BOUND


#: Mean difference of features as a part of their standard deviation, against the dequantized weights.
TYPES = {
    "f16": ("F16", "head of 72", 0.02), "bf16": ("BF16", "head of 72", 0.02), "q8_0": ("Q8_0", "pooled", 0.04)
}  # fmt: skip


@pytest.mark.parametrize("type", TYPES)
def test_types_of_weights(type: str, references: dict[str, Any], text: Path, tmp_path: Path) -> None:
    type_name, name, bound = TYPES[type]
    tower = TOWERS[name]
    path = write_tower(tmp_path / "v.gguf", references[name], tower, type)
    patches, positions = picture(tower)
    theirs = reference_features(with_weights_of(path, references[name], tower), patches, positions)
    kernels = [{"kernels": kernel} for kernel in _native.kernels()]
    for options in ({}, *kernels, {"device": "host"}):
        vision = _native.Vision(str(path), open_text(text, **options))
        assert type_name in vision.info["weight_types"]
        gap = np.abs(vision.encode(patches, positions) - theirs).mean() / theirs.std()
        assert 1e-6 < gap < bound, (options, gap)  # rounded, but not more than that


@pytest.mark.parametrize("name", ["pooled", "plain", "head of 72"])
def test_a_file_of_llama_cpp(
    name: str, references: dict[str, Any], files: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    """By its keys and the gguf package's table of names: the same features, bit for bit."""
    model, tower = open_text(text), TOWERS[name]
    path = write_as_llama_cpp(tmp_path / "v.gguf", references[name], tower)
    patches, positions = picture(tower)
    ours = _native.Vision(str(files[name]), model).encode(patches, positions)
    np.testing.assert_array_equal(_native.Vision(str(path), model).encode(patches, positions), ours)
    tables = ("v.patch_embd.weight", "v.position_embd.weight")
    rounded = write_as_llama_cpp(tmp_path / "half.gguf", references[name], tower, half=tables)
    assert 0 < difference(_native.Vision(str(rounded), model).encode(patches, positions), ours) < 0.01


def test_pixels_are_normalized_as_the_file_says(text: Path, files: dict[str, Path], tmp_path: Path) -> None:
    raw = read_gguf(files["pooled"])
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.25, 2.0]
    raw.set("clip.vision.image_mean", ARRAY, Array(F32, mean))
    raw.set("clip.vision.image_std", ARRAY, Array(F32, std))
    (tmp_path / "v.gguf").write_bytes(raw.to_bytes())
    model = open_text(text)
    patches, positions = picture(TOWERS["pooled"])
    pixels = ((patches.reshape(-1, 3) - np.float32(mean)) / np.float32(std)).reshape(patches.shape)
    ours = _native.Vision(str(tmp_path / "v.gguf"), model).encode(patches, positions)
    same = _native.Vision(str(files["pooled"]), model).encode(pixels.astype(np.float32), positions)
    assert difference(ours, same) < BOUND
