"""Ways to break a vision file, and invalid arguments of its tower, with what the one line must name.

The files are those of ``vision_folders``; a model for them is ``model.gguf`` in the same folder.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pydiffusion import _native
from support.gguf_mutator import ARRAY, BOOL, F32, I32, STRING, U32, Array, RawGguf, float_tensor
from support.hostile_cases import Case, change, change_tensor, edit, put
from support.vision_folders import FF, HEADS, LAYERS, PATCH, POSITIONS, D

C = "clip.vision."
SIDE = 6  # patches of the image that is encoded


def _set_float(name: str, value: float) -> Callable[[RawGguf], RawGguf]:
    def make(file: RawGguf) -> RawGguf:
        tensor = file.tensor(name)
        tensor.data = struct.pack("<f", value) + tensor.data[4:]
        return file

    return make


def _add(name: str, dims: list[int]) -> Callable[[RawGguf], RawGguf]:
    data = bytes(4 * int(np.prod(dims)))
    return edit(lambda f: f.tensors.append(float_tensor(name, dims, data)))


CASES: dict[str, Case] = {
    "empty": Case(lambda f: b"", "empty"),
    "text": Case(lambda f: b"this is a text file, not a tower\n" * 40, "GGUF"),
    "keys only": Case(change(tensors=[]), "v."),
    "tail cut": Case(change(cut_tail=32), "past the end"),
    "a model": Case(put("general.architecture", STRING, "diffusion-gemma"), "mmproj"),
    "another projector": Case(put(C + "projector_type", STRING, "qwen3vl_merger"), "qwen3vl_merger"),
    "projector of a number": Case(put(C + "projector_type", U32, 3), "projector_type"),
    "no vision encoder": Case(put("clip.has_vision_encoder", BOOL, False), "has_vision_encoder"),
    "for another model": Case(
        edit(
            lambda f: f.set(C + "projection_dim", U32, 64),
            lambda f: setattr(f.tensor("mm.input_projection.weight"), "dims", [D, 64]),
        ),
        "another model",
    ),
    "heads that rotate by no two axes": Case(
        edit(
            lambda f: [
                setattr(f.tensor(f"v.blk.{i}.attn_{x}_norm.weight"), "dims", [6])
                for i in range(LAYERS)
                for x in "qk"
            ]
        ),
        "6",
    ),
    "layer past the last": Case(_add(f"v.blk.{LAYERS}.ln1.weight", [D]), f"v.blk.{LAYERS}"),
    "unknown tensor": Case(_add("v.strange.weight", [8]), "v.strange"),
    "bound of a tensor without bounds": Case(_add("v.blk.0.ln1.input_max", [1]), "ln1.input_max"),
    "two bounds": Case(change_tensor("v.blk.0.attn_q.input_max", dims=[1, 1, 2]), "attn_q.input_max"),
    "bound of NaN": Case(_set_float("v.blk.1.ffn_up.input_max", float("nan")), "ffn_up.input_max"),
    "lower bound above the upper": Case(_set_float("v.blk.1.ffn_up.output_min", 1e9), "ffn_up.output"),
    "norm of F16": Case(change_tensor("v.blk.0.ln1.weight", type=1), "ln1"),
    "matrix of integers": Case(change_tensor("v.blk.0.attn_q.weight", type=26), "attn_q"),
    "position table of one axis": Case(
        change_tensor("v.position_embd.weight", dims=[D, 2 * POSITIONS]), "position_embd"
    ),
    "position table of three axes": Case(
        change_tensor("v.position_embd.weight", dims=[D, POSITIONS // 4, 8]), "position_embd"
    ),
    "kernel turned around": Case(
        change_tensor("v.patch_embd.weight", dims=[3, PATCH, PATCH, D]), "patch_embd"
    ),
    "dimensions that overflow": Case(change_tensor("v.blk.0.attn_q.weight", dims=[2**32, 2**32]), "attn_q"),
    "tensor twice": Case(edit(lambda f: f.tensors.append(f.tensors[3])), "duplicate"),
    "weights of NaN": Case(_set_float("v.blk.0.ffn_gate.weight", float("nan")), "NaN", "PyDiffusionError"),
}
for _key, _type, _values in (
    ("block_count", U32, (0, LAYERS - 1, LAYERS + 1, 2**31)),
    ("block_count", I32, (-1,)),
    ("embedding_length", U32, (0, D - 1, 2 * D, 2**32 - 1)),
    ("embedding_length", STRING, ("64",)),
    ("feed_forward_length", U32, (0, FF + 1, 2**31)),
    ("attention.head_count", U32, (0, HEADS + 1, 2**31)),
    ("attention.head_count", ARRAY, (Array(U32, [HEADS, HEADS + 1]),)),
    ("patch_size", U32, (0, PATCH + 1, 2**16, 2**31)),
    ("patch_size", F32, (4.0,)),
    ("projector.scale_factor", U32, (0, 2**16)),
    ("projection_dim", U32, (0, 2**31)),
    ("max_soft_tokens", U32, (0, 2**24, 2**32 - 1)),
    ("max_soft_tokens", STRING, ("280",)),
    ("attention.layer_norm_epsilon", F32, (0.0, -1.0, float("nan"), float("inf"))),
    ("image_mean", ARRAY, (Array(F32, [0.0, 0.0]), Array(F32, [float("nan")] * 3), Array(I32, []))),
    ("image_std", ARRAY, (Array(F32, [0.0] * 3), Array(F32, [1.0, 1.0, -1.0]))),
    ("image_std", F32, (1.0,)),
):
    for _value in _values:
        # A wrong size shows where a tensor does not have it: either may be named.
        _is_size = _type == U32 and _value not in (0, 2**24, 2**32 - 1)
        _about = "" if _is_size else _key
        CASES[f"{_key} = {_value!r} of type {_type}"] = Case(put(C + _key, _type, _value), _about)
for _key in (
    "block_count", "embedding_length", "feed_forward_length", "attention.head_count", "patch_size",
    "projection_dim", "attention.layer_norm_epsilon", "projector_type",
):  # fmt: skip
    CASES[f"without {_key}"] = Case(edit(lambda f, key=C + _key: f.drop(key)), _key.rpartition(".")[2])
for _name in (
    "v.patch_embd.weight", "v.position_embd.weight", "v.std_bias", "v.std_scale",
    "mm.input_projection.weight", "v.blk.0.attn_q_norm.weight", "v.blk.1.attn_out.weight",
    "v.blk.1.ffn_post_norm.weight",
):  # fmt: skip
    CASES[f"without {_name}"] = Case(edit(lambda f, name=_name: f.drop_tensor(name)), _name)


@functools.cache
def _model(path: Path) -> _native.Model:
    return _native.Model(str(path), n_threads=1)


def _tower(path: str) -> _native.Vision:
    return _native.Vision(path, _model(Path(path).parent / "model.gguf"))


def image(side: int = SIDE) -> tuple[np.ndarray, np.ndarray]:
    """Patches and positions of a square image."""
    positions = np.array([(x, y) for y in range(side) for x in range(side)], np.int32)
    patches = np.random.default_rng(0).random((side * side, 3 * PATCH**2), np.float32)
    return patches, positions


def _encoding(change: Callable[[np.ndarray, np.ndarray], tuple[object, object]]) -> Callable[[str], object]:
    """Encode a changed image; the tower gives what it gave before, also after an error."""

    def call(path: str) -> None:
        tower = _tower(path)
        before = tower.encode(*image())
        try:
            tower.encode(*change(*image()))
        except (ValueError, TypeError):
            assert np.array_equal(tower.encode(*image()), before)
            raise

    return call


def _moved(x: int, y: int) -> Callable[[np.ndarray, np.ndarray], tuple[object, object]]:
    def change(patches: np.ndarray, positions: np.ndarray) -> tuple[object, object]:
        positions[3] = x, y
        return patches, positions

    return change


#: Invalid arguments, and what the message names.
REFUSED: dict[str, tuple[Callable[[str], object], str]] = {
    "patches too narrow": (_encoding(lambda p, at: (p[:, 1:].copy(), at)), "3 * 4 * 4"),
    "patches of one dimension": (_encoding(lambda p, at: (p[0].copy(), at)), ""),
    "patches none": (_encoding(lambda p, at: (None, at)), ""),
    "no patches": (_encoding(lambda p, at: (p[:0].copy(), at[:0].copy())), "0 patches"),
    "fewer positions": (_encoding(lambda p, at: (p, at[1:].copy())), "(35, 2)"),
    "positions of three": (_encoding(lambda p, at: (p, np.zeros((len(p), 3), np.int32))), "(36, 3)"),
    "position below zero": (_encoding(_moved(-1, 0)), "(-1, 0)"),
    "position past the table": (_encoding(_moved(POSITIONS, 0)), f"({POSITIONS}, 0)"),
    "position of 2^31 - 1": (_encoding(_moved(2**31 - 1, 2**31 - 1)), "2147483647"),
    "position twice": (_encoding(_moved(0, 0)), "(0, 0)"),
    "a side that pooling does not divide": (
        _encoding(lambda p, at: (p[:25].copy(), image(5)[1])),
        "multiples of 3",
    ),
}


def encode(path: str) -> list[int]:
    """Load the tower and encode an image; its features' shape."""
    features = _tower(path).encode(*image())
    assert np.isfinite(features).all()
    return list(features.shape)


#: For the worker: how to open a vision file, and all invalid arguments.
CALLS: dict[str, Callable[[str], object]] = {
    "vision": encode,
    **{f"vision: {name}": call for name, (call, _) in REFUSED.items()},
}
