"""Quantized checkpoints whose parts don't fit each other are refused by name, and transforms of weights."""

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


def integers(*values: int, dtype: type = np.int64) -> tuple[str, tuple[int, ...], bytes]:
    return "I64" if dtype is np.int64 else "I32", (len(values),), np.array(values, dtype).tobytes()


def compressed(n_zero_groups: int, *groups: int) -> Stored:
    stored = {
        f"{Q}.weight_packed": words(N_ROWS, N_COLUMNS // 8),
        f"{Q}.weight_scale": halves(N_ROWS, 4),
        f"{Q}.weight_shape": integers(N_ROWS, N_COLUMNS),
        f"{Q}.weight_zero_point": words(N_ROWS // 8, n_zero_groups),
    }
    return stored | ({f"{Q}.weight_g_idx": integers(*groups, dtype=np.int32)} if groups else {})


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


def test_awq_groups_that_do_not_divide_the_rows(tmp_path: Path) -> None:
    stored = {
        f"{Q}.qweight": words(N_COLUMNS, N_ROWS // 8),
        f"{Q}.qzeros": words(3, N_ROWS // 8),
        f"{Q}.scales": halves(3, N_ROWS),
    }
    folder = make(tmp_path / "m", stored, {"quant_method": "awq", "bits": 4})
    with pytest.raises(ConversionError, match=r"q_proj\.scales' has 3 groups for rows of 256"):
        convert(folder, tmp_path / "m.gguf", "f32")


@pytest.mark.parametrize("n_zero_groups", [1, 2, 8])
@pytest.mark.parametrize("groups", [(), tuple(i // 64 for i in range(N_COLUMNS))], ids=["in order", "g_idx"])
def test_zero_points_of_other_groups_than_the_scales(
    tmp_path: Path, n_zero_groups: int, groups: tuple[int, ...]
) -> None:
    folder = make(tmp_path / "m", compressed(n_zero_groups, *groups), COMPRESSED)
    with pytest.raises(ConversionError, match=r"weight_zero_point.* does not suit 4 groups"):
        convert(folder, tmp_path / "m.gguf", "f32")


@pytest.mark.parametrize("bits", [[4], "4", 0, 16])
def test_bits_that_are_none(tmp_path: Path, bits: object) -> None:
    settings = COMPRESSED | {"config_groups": {"a": {"weights": {"type": "int", "num_bits": bits}}}}
    with pytest.raises(ConversionError, match=r"config\.json.*'num_bits' should be an integer"):
        convert(make(tmp_path / "m", compressed(4), settings), tmp_path / "m.gguf", "f32")


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
    folder = make(tmp_path / "m", compressed(4), COMPRESSED | settings)
    if is_refused:
        with pytest.raises(ConversionError, match=f"{next(iter(settings))}.*not supported"):
            convert(folder, tmp_path / "m.gguf", "f32")
    else:
        convert(folder, tmp_path / "m.gguf", "f32")
