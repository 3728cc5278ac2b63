"""Damaged and misleading quantized checkpoints: one clear line, never another exception, nothing left behind."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import checkpoint_folders as folders
from support.quantized_folders import (
    STYLES,
    Stored,
    Style,
    n_bytes,
    write_stored,
)

from pydiffusion.convert.checkpoint.quantized.reader import open_weights
from pydiffusion.convert.checkpoint.quantized.settings import read_quantization
from pydiffusion.convert.checkpoint.safetensors_files import Checkpoint
from pydiffusion.convert.checkpoint.strict_json import Fields
from pydiffusion.errors import ConversionError

MATRIX = "model.decoder.layers.0.mlp.gate_proj.weight"
MODULE = MATRIX.removesuffix(".weight")
#: One style for each reader, with the shape of a matrix (or a stack) for it.
SHAPES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(STYLES, (32, 128)),
    **dict.fromkeys(("fp8-stacked", "mxfp4-blocks", "mlx"), (3, 32, 128)),
}
DTYPES = ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "I16", "F16", "BF16", "I32", "U32", "F32")
DTYPES += ("I64", "F64")


def read_all(folder: Path, stored: Stored, config: dict[str, Any]) -> str:
    """Open a checkpoint and read all of its weights; returns the error's message, or nothing."""
    write_stored(folder / "model.safetensors", stored)
    try:
        settings = read_quantization(folder, Fields(config, "config.json", []), [])
        with Checkpoint(folder) as checkpoint, warnings.catch_warnings():
            warnings.simplefilter("error")
            for weight in open_weights(checkpoint, settings, []).by_name.values():
                size = n_bytes(weight.dtype, weight.shape)
                assert weight.read(0, size).size == size, weight.name
    except ConversionError as error:
        message = str(error)
        assert "\n" not in message and 30 < len(message) < 1000, message
        assert MODULE in message or "quantization" in message, message
        assert str(folder) in message or "config.json" in message, message
        return message
    return ""


def filled(dtype: str, shape: tuple[int, ...], byte: int = 1) -> tuple[str, tuple[int, ...], bytes]:
    return dtype, shape, bytes([byte]) * n_bytes(dtype, shape)


def other_shapes(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Shapes that are nearly right, of other ranks, and without elements."""
    yield from ((), (0,), (1,), (7,), (0, 0), (1, 1, 1, 1), (3, 5), (2, 3, 4), (1,) * 8)
    yield from (shape[::-1], (*shape, 1), (1, *shape), (*shape, 2), (2, *shape), shape[:-1], shape[1:])
    for i in range(len(shape)):
        for size in (0, 1, shape[i] - 1, shape[i] + 1, 2 * shape[i], shape[i] // 2, 3 * shape[i]):
            yield (*shape[:i], max(0, size), *shape[i + 1 :])


def one_matrix(style: Style, shape: tuple[int, ...]) -> Stored:
    return style.encoders[0](MATRIX, shape, np.random.default_rng(0))[0]


@pytest.mark.parametrize("name", STYLES)
def test_parts_of_other_shapes_and_dtypes(tmp_path: Path, name: str) -> None:
    style = STYLES[name]
    config = style.config if style.file == "config.json" else {}
    if not config:
        folders.write_json(tmp_path / style.file, style.config)
    good = one_matrix(style, SHAPES[name])
    assert read_all(tmp_path, good, config) == ""
    n_refused = 0
    for part, (dtype, shape, _) in good.items():
        optional = part.endswith(("_zero_point", ".qzeros", ".g_idx", "input_scale"))
        without = {key: value for key, value in good.items() if key != part}
        assert bool(read_all(tmp_path, without, config)) != (optional or len(without) == 0), part
        for other in {*other_shapes(shape)} - {shape}:
            n_refused += bool(read_all(tmp_path, good | {part: filled(dtype, other)}, config))
        for other in set(DTYPES) - {dtype}:
            n_refused += bool(read_all(tmp_path, good | {part: filled(other, shape)}, config))
        for byte in (0, 0x80, 0xFF):
            read_all(tmp_path, good | {part: filled(dtype, shape, byte)}, config)
    assert n_refused > 40
