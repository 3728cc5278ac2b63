"""Fuzz target for quantized checkpoints: other names, dtypes, shapes and contents, other settings."""

from __future__ import annotations

import random
import warnings
from pathlib import Path

import numpy as np
from support.quantized_folders import STYLES, Stored, n_bytes, quantize, write_stored

from pydiffusion.convert.architectures.diffusion_gemma.experts import stack_experts
from pydiffusion.convert.checkpoint.quantized.reader import open_weights
from pydiffusion.convert.checkpoint.quantized.settings import read_quantization
from pydiffusion.convert.checkpoint.safetensors_files import Checkpoint
from pydiffusion.convert.checkpoint.strict_json import Fields, read_json_object
from pydiffusion.convert.checkpoint.weights import Blocks, Weight
from pydiffusion.convert.gguf.rows import row_bytes
from pydiffusion.errors import PyDiffusionError

from .files import refusal
from .folder import json_bytes
from .mutation import mutated, text

_LAYER = "model.decoder.layers.0"
_SHAPES = {
    f"{_LAYER}.mlp.up_proj.weight": (16, 128),
    f"{_LAYER}.experts.gate_up_proj": (2, 32, 64),
    f"{_LAYER}.experts.down_proj": (2, 32, 64),
    f"{_LAYER}.input_layernorm.weight": (8,),
}
_DTYPES = (
    "BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "I16", "F16", "BF16", "I32", "U32", "F32", "I64",
    "F64",
)  # fmt: skip
_SUFFIXES = (
    "weight", "weight_packed", "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale",
    "weight_zero_point", "weight_g_idx", "weight_shape", "weight_blocks", "weight_scales", "qweight",
    "qzeros", "scales", "biases", "g_idx", "input_scale", "k_scale", "pre_quant_scale", "bias",
)  # fmt: skip
_MOST_ELEMENTS = 1 << 16


class Target:
    """A checkpoint opens, and all of its weights can be read, whole and in part, or a typed error of one line
    says why not; nothing warns.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "quantized"
        self._folder.mkdir()
        plain = {name: np.ones(shape, np.float32) for name, shape in _SHAPES.items()}
        self._good = {name: quantize(style, plain).stored for name, style in STYLES.items()}
        for name in STYLES:
            assert self.one((self._good[name], json_bytes(STYLES[name].config), 0)) == "done", name

    def close(self) -> None:
        pass

    def make(self, draw: random.Random) -> tuple[Stored, bytes, float]:
        """Create an input: the tensors, config.json, and what the ranges to read depend on."""
        name = draw.choice(list(STYLES))
        stored, config = dict(self._good[name]), STYLES[name].config
        for _ in range(draw.choice((0, 1, 1, 2, 4))):
            if stored:
                self._change(draw, stored)
        if draw.random() < 0.4:
            config = mutated(draw, config, STYLES[draw.choice(list(STYLES))].config)
        return stored, json_bytes(config), draw.random()

    def _change(self, draw: random.Random, stored: Stored) -> None:
        name = draw.choice(list(stored))
        dtype, shape, data = stored[name]
        action = draw.randrange(7)
        if action == 0:
            del stored[name]
        elif action == 1:
            stored[_other_name(draw, name)] = stored[name] if draw.random() < 0.5 else stored.pop(name)
        elif action == 2:
            stored[name] = _resized(draw.choice(_DTYPES), shape, data)
        elif action in (3, 4):
            stored[name] = _resized(dtype, _other_shape(draw, shape), data)
        elif action == 5:
            stored[name] = dtype, shape, _other_content(draw, data)
        else:
            other = self._good[draw.choice(list(STYLES))]
            taken = draw.choice(list(other))
            stored[draw.choice((taken, name))] = other[taken]

    def one(self, given: tuple[Stored, bytes, float]) -> str:
        """Open the tensors as a checkpoint, and read them."""
        stored, config, part = given
        write_stored(self._folder / "model.safetensors", stored)
        (self._folder / "config.json").write_bytes(config)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                fields = Fields(read_json_object(self._folder / "config.json"), "config.json", [])
                settings = read_quantization(self._folder, fields, [])
                with Checkpoint(self._folder) as checkpoint:
                    weights = stack_experts(open_weights(checkpoint, settings, []))
                    for weight in weights.by_name.values():
                        _read(weight, part)
            except PyDiffusionError as error:
                assert len(str(error)) < 2000
                return refusal(error)
        return "done"


def _read(weight: Weight, part: float) -> None:
    size = n_bytes(weight.dtype, weight.shape)
    whole = weight.read(0, size)
    assert whole.dtype == np.uint8 and whole.shape == (size,), (weight.name, whole.shape)
    unit = n_bytes(weight.dtype, ())
    start = int(part * size) // unit * unit
    count = min(size - start, unit * int(1 + 100 * part))
    assert weight.read(start, count).tobytes() == whole[start : start + count].tobytes(), weight.name
    if weight.blocks is not None:
        _read_blocks(weight, weight.blocks)


def _read_blocks(weight: Weight, blocks: Blocks) -> None:
    *rows, n_per_row = weight.shape
    size = int(np.prod(rows)) * row_bytes(blocks.type, n_per_row)
    assert blocks.read(0, size).shape == (size,), weight.name
    assert blocks.factors is None or np.prod(rows) % len(blocks.factors) == 0, weight.name


def _resized(dtype: str, shape: tuple[int, ...], data: bytes) -> tuple[str, tuple[int, ...], bytes]:
    """The data cut, or repeated, to the size of the shape."""
    size = n_bytes(dtype, shape)
    return dtype, shape, (data * (size // max(1, len(data)) + 1))[:size] if data else bytes(size)


def _other_name(draw: random.Random, name: str) -> str:
    base, _, suffix = name.rpartition(".")
    kind = draw.randrange(4)
    if kind == 0:
        return f"{base}.{draw.choice(_SUFFIXES)}"
    if kind == 1:
        return name.replace(".experts.1.", f".experts.{draw.choice(('0', '2', '01', '999999999', '-1'))}.")
    return f"{base}.{text(draw)}" if kind == 2 else f"{base}{text(draw)}.{suffix}"


def _other_shape(draw: random.Random, shape: tuple[int, ...]) -> tuple[int, ...]:
    sizes = list(shape)
    kind = draw.randrange(5)
    if kind == 0 or not sizes:
        sizes.insert(draw.randrange(len(sizes) + 1), draw.choice((0, 1, 2, 3)))
    elif kind == 1:
        del sizes[draw.randrange(len(sizes))]
    elif kind == 2:
        sizes.reverse()
    else:
        i = draw.randrange(len(sizes))
        sizes[i] = max(
            0, draw.choice((0, 1, sizes[i] - 1, sizes[i] + 1, sizes[i] * 2, sizes[i] // 2, 33, 127))
        )
    return tuple(sizes) if np.prod(sizes) <= _MOST_ELEMENTS else shape


def _other_content(draw: random.Random, data: bytes) -> bytes:
    kind = draw.randrange(3)
    if kind == 0:
        return bytes([draw.choice((0, 1, 0x7F, 0x80, 0xFF))]) * len(data)
    if kind == 1:
        return draw.randbytes(len(data))
    changed = bytearray(data)
    if changed:
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)
