"""Quantized checkpoints with transforms of their weights are refused; settings of none are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import checkpoint_folders as folders
from support.fp4_folders import Stored, write_stored

from pydiffusion.convert import convert
from pydiffusion.errors import ConversionError

Q = "model.decoder.layers.0.self_attn.q_proj"
N_ROWS, N_COLUMNS = folders.HEADS * folders.HEAD_DIM, folders.D
COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}


def words(*shape: int) -> tuple[str, tuple[int, ...], bytes]:
    return "I32", shape, np.full(shape, 0x55555555, np.int32).tobytes()


def halves(*shape: int) -> tuple[str, tuple[int, ...], bytes]:
    return "F16", shape, np.full(shape, 0.01, np.float16).tobytes()


def compressed() -> Stored:
    return {
        f"{Q}.weight_packed": words(N_ROWS, N_COLUMNS // 8),
        f"{Q}.weight_scale": halves(N_ROWS, 4),
        f"{Q}.weight_shape": ("I64", (2,), np.array([N_ROWS, N_COLUMNS], np.int64).tobytes()),
    }


def make(folder: Path, stored: Stored, settings: dict[str, Any]) -> Path:
    """A checkpoint folder with the queries of the first layer stored so."""
    folders.make_folder(folder)
    plain = {
        name: ("F32", values.shape, values.astype(np.float32).tobytes())
        for name, values in folders.weights().items()
        if name != f"{Q}.weight"
    }
    write_stored(folder / "model.safetensors", plain | stored)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    folders.write_json(folder / "config.json", config | {"quantization_config": settings})
    return folder


@pytest.mark.parametrize(
    ("settings", "is_refused"),
    [
        ({"transform_config": {}}, False),
        ({"transform_config": {"config_groups": {}}}, False),
        ({"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}}, True),
        ({"sparsity_config": {"format": "dense", "ignore": [], "targets": []}}, False),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, True),
    ],
)
def test_transforms_and_sparsity(tmp_path: Path, settings: dict[str, Any], is_refused: bool) -> None:
    folder = make(tmp_path / "m", compressed(), COMPRESSED | settings)
    if is_refused:
        with pytest.raises(ConversionError, match=f"{next(iter(settings))}.*not supported"):
            convert(folder, tmp_path / "m.gguf", "f32")
    else:
        convert(folder, tmp_path / "m.gguf", "f32")
