"""Broken vision files and arguments: one line that says what is wrong, whatever it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.gguf_mutator import ARRAY, F32, I32, STRING, U32, Array, RawGguf, String, float_tensor, read_gguf
from support.vision_folders import LAYERS, PATCH, POSITIONS, D, make_folder

from pydiffusion import _native
from pydiffusion.convert import convert, convert_mmproj
from pydiffusion.errors import ModelFormatError, PyDiffusionError, UnsupportedModelError
from pydiffusion.vision.preprocessing import MAX_SOFT_TOKENS

Change = Callable[[RawGguf], object]
V = "clip.vision."


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("checkpoint") / "small")


@pytest.fixture(scope="module")
def whole(checkpoint: Path) -> Path:
    convert_mmproj(checkpoint, checkpoint.parent / "v.gguf", "f32")
    return checkpoint.parent / "v.gguf"


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> _native.Model:
    convert(checkpoint, checkpoint.parent / "text.gguf", "q8_0")
    return _native.Model(str(checkpoint.parent / "text.gguf"), n_threads=2)


def put(key: str, type: int, value: object) -> Change:
    return lambda f: f.set(key, type, value)


def drop(key: str) -> Change:
    return lambda f: f.drop(key)


def without(name: str) -> Change:
    return lambda f: f.drop_tensor(name)


def shaped(name: str, dims: list[int]) -> Change:
    return lambda f: setattr(f.tensor(name), "dims", dims)


def filled(name: str, value: float) -> Change:
    def change(file: RawGguf) -> None:
        tensor = file.tensor(name)
        tensor.data = np.full(len(tensor.data) // 4, value, np.float32).tobytes()

    return change


def added(name: str, dims: list[int]) -> Change:
    return lambda f: f.tensors.append(float_tensor(name, dims, bytes(4 * int(np.prod(dims)))))


#: Change -> what the message names.
BROKEN: dict[str, tuple[Change, str]] = {
    "no layers": (put(V + "block_count", U32, 0), "block_count' is 0; it must be 1 to 1024"),
    "more layers": (put(V + "block_count", U32, LAYERS + 1), f"v.blk.{LAYERS}.ln1.weight' is missing"),
    "fewer layers": (put(V + "block_count", U32, LAYERS - 1), "' is not part of this vision tower"),
    "no width": (drop(V + "embedding_length"), "embedding_length' is missing"),
    "width": (put(V + "embedding_length", U32, D + 1), "from the metadata"),
    "negative width": (put(V + "embedding_length", I32, -1), "it must be 1 to"),
    "feed-forward": (put(V + "feed_forward_length", U32, 7), "ffn_gate.weight' has shape"),
    "heads": (put(V + "attention.head_count", U32, 5), "attn_q.weight' has shape"),
    "heads as text": (put(V + "attention.head_count", STRING, String(b"four")), "must be an integer"),
    "patches": (put(V + "patch_size", U32, PATCH + 1), "v.patch_embd.weight' has shape"),
    "large patches": (put(V + "patch_size", U32, 1 << 30), "patch_size' is 1073741824"),
    "no pooling": (put(V + "projector.scale_factor", U32, 0), "scale_factor' is 0"),
    "soft tokens": (put(V + "max_soft_tokens", U32, 0), "max_soft_tokens' is 0"),
    "large images by default": (
        put(V + "max_soft_tokens", U32, MAX_SOFT_TOKENS[-1] + 1),
        f"max_soft_tokens' is 1121; it must be 1 to {MAX_SOFT_TOKENS[-1]}",
    ),
    "large images": (put(V + "projector.scale_factor", U32, 32), "280, but that many of 32 x 32 patches"),
    "epsilon": (put(V + "attention.layer_norm_epsilon", F32, float("nan")), "layer_norm_epsilon' is nan"),
    "mean": (put(V + "image_mean", ARRAY, Array(F32, [0.0, 0.0])), "must be an array of 3 floats"),
    "mean as numbers": (put(V + "image_mean", ARRAY, Array(I32, [0, 0, 0])), "array of 3 floats"),
    "deviation": (put(V + "image_std", ARRAY, Array(F32, [1.0, 0.0, 1.0])), "image_std' holds 0"),
    "infinite mean": (put(V + "image_mean", ARRAY, Array(F32, [0.0, np.inf, 0.0])), "image_mean' holds inf"),
    "another projector": (put(V + "projector_type", STRING, String(b"gemma3")), "only 'gemma4v' is"),
    "no projector": (drop(V + "projector_type"), "projector_type' is missing"),
    "another activation": (put("clip.use_silu", U32, 1), "use_silu' is true"),
    "no vision": (put("clip.has_vision_encoder", U32, 0), "has no vision encoder"),
    "not a vision file": (put("general.architecture", STRING, String(b"llama")), "not the vision part"),
    "another model's": (
        lambda f: [put(V + "projection_dim", U32, 8)(f), shaped("mm.input_projection.weight", [D, 8])(f),
                   setattr(f.tensor("mm.input_projection.weight"), "data", bytes(4 * D * 8))],
        "the vision part of another model",
    ),
    "no projection": (without("mm.input_projection.weight"), "'mm.input_projection.weight' is missing"),
    "no positions": (without("v.position_embd.weight"), "'v.position_embd.weight' is missing"),
    "one table": (shaped("v.position_embd.weight", [D, 2 * POSITIONS]), "'v.position_embd.weight' has shape"),
    "no norm": (without("v.blk.1.attn_q_norm.weight"), "'v.blk.1.attn_q_norm.weight' is missing"),
    "head size": (shaped("v.blk.0.attn_q_norm.weight", [2, 8]), "invalid shape [2, 8]"),
    "rotation": (shaped("v.blk.0.attn_q_norm.weight", [6]), "heads have 6 elements; rotating them"),
    "scale without bias": (without("v.std_bias"), "'v.std_bias' is missing"),
    "bounds": (filled("v.blk.0.attn_q.input_min", 1e30), "attn_q.input_min and _max are 1e+30"),
    "bound": (filled("v.blk.1.ffn_down.output_max", np.nan), "'v.blk.1.ffn_down.output_max' is NaN"),
    "unknown tensor": (added("v.blk.0.attn_q.bias", [D]), "'v.blk.0.attn_q.bias' is not part of"),
    "unknown projector": (added("mm.soft_emb_norm.weight", [D]), "soft_emb_norm.weight' is not part"),
    "type": (lambda f: setattr(f.tensor("v.blk.0.ln1.weight"), "type", 26), "ln1.weight' must be F32"),
    "integers": (lambda f: setattr(f.tensor("v.blk.0.attn_q.weight"), "type", 26), "has type i32: not"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(name: str, whole: Path, model: _native.Model, tmp_path: Path) -> None:
    change, message = BROKEN[name]
    raw = read_gguf(whole)
    change(raw)
    path = tmp_path / "broken.gguf"
    path.write_bytes(raw.to_bytes())
    with pytest.raises((ModelFormatError, UnsupportedModelError)) as error:
        _native.Vision(str(path), model)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value), str(error.value)
    assert "\n" not in str(error.value)


def test_a_text_model(model: _native.Model) -> None:
    path = model.file.path
    with pytest.raises(UnsupportedModelError, match="is not the vision part of a model"):
        _native.Vision(path, model)


def test_cut_files(whole: Path, model: _native.Model, tmp_path: Path) -> None:
    data = whole.read_bytes()
    for n in (0, 3, 24, 200, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.gguf").write_bytes(data[:n])
        with pytest.raises(ModelFormatError):
            _native.Vision(str(tmp_path / "cut.gguf"), model)
    with pytest.raises(PyDiffusionError):
        _native.Vision(str(tmp_path / "none.gguf"), model)


def grid(columns: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    positions = np.array([(x, y) for y in range(rows) for x in range(columns)], np.int32).reshape(-1, 2)
    return np.full((columns * rows, 3 * PATCH**2), 0.5, np.float32), positions


def test_nan(whole: Path, model: _native.Model, tmp_path: Path) -> None:
    """Of pixels or weights: features without meaning are no features."""
    patches, positions = grid(3, 3)
    vision = _native.Vision(str(whole), model)
    spoiled = patches.copy()
    spoiled[4, 7] = np.nan
    with pytest.raises(PyDiffusionError, match="NaN or infinite"):
        vision.encode(spoiled, positions)
    for name in ("v.blk.0.attn_q.weight", "v.std_scale", "mm.input_projection.weight"):
        raw = read_gguf(whole)
        filled(name, np.nan)(raw)
        (tmp_path / "nan.gguf").write_bytes(raw.to_bytes())
        with pytest.raises(PyDiffusionError, match=r"nan\.gguf: the features .* NaN or infinite"):
            _native.Vision(str(tmp_path / "nan.gguf"), model).encode(patches, positions)
    assert np.isfinite(vision.encode(patches, positions)).all()


PATCHES, GRID = grid(6, 3)
ARGUMENTS: dict[str, tuple[np.ndarray, np.ndarray, str]] = {
    "no patch": (PATCHES[:0], GRID[:0], "0 patches; an image has 1 to"),
    "narrow": (PATCHES[:, 1:], GRID, "patches have 47 values; those of this tower have 48"),
    "fewer positions": (PATCHES, GRID[1:], r"positions have shape \(17, 2\), expected \(18, 2\)"),
    "positions of three": (PATCHES, np.zeros((18, 3), np.int32), r"shape \(18, 3\)"),
    "left of it": (PATCHES, GRID - np.int32([1, 0]), r"a patch is at \(-1, 0\); positions are 0 to 19"),
    "right of it": (PATCHES, GRID + np.int32([15, 0]), r"at \(20, 0\); positions are 0 to 19"),
    "far": (PATCHES, np.full_like(GRID, 2**31 - 1), "positions are 0 to 19"),
    "not whole": (PATCHES[1:], GRID[1:], "are no full grid"),
    "not of squares": (*grid(4, 3), "multiples of 3"),
    "twice": (PATCHES, np.concatenate([GRID[:1], GRID[:1], GRID[2:]]), r"two patches are at \(0, 0\)"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(name: str, whole: Path, model: _native.Model) -> None:
    patches, positions, message = ARGUMENTS[name]
    with pytest.raises(ValueError, match=message):
        _native.Vision(str(whole), model).encode(
            np.ascontiguousarray(patches), np.ascontiguousarray(positions)
        )
