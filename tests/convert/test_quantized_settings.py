"""Settings of quantized checkpoints: wrong ones are refused, and what they promise must be there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import checkpoint_folders as folders
from support import quantized_folders
from support.quantized_folders import STYLES, Stored, n_bytes, tensor, write_folder, write_stored
from support.spoiled_quantized import MATRIX, MODULE, one_matrix, refused, stored_folder

from pydiffusion.convert import convert
from pydiffusion.convert.checkpoint.quantized.reader import open_weights
from pydiffusion.convert.checkpoint.quantized.settings import read_quantization
from pydiffusion.convert.checkpoint.safetensors_files import Checkpoint
from pydiffusion.convert.checkpoint.strict_json import Fields


def with_config(stored: Stored, folder: Path, **changes: Any) -> Path:
    """A folder of these tensors and config.json with these keys, null ones left out."""
    write_folder(folder, stored, STYLES["fp8-channel"])
    config = quantized_folders.small_config() | changes
    folders.write_json(
        folder / "config.json", {key: value for key, value in config.items() if value is not None}
    )
    return folder


COMPRESSED = {"quant_method": "compressed-tensors"}
INT4 = {"type": "int", "num_bits": 4}


def groups(**weights: Any) -> dict[str, Any]:
    return COMPRESSED | {"config_groups": {"group_0": {"weights": weights}}}


#: Style of the tensors, keys of config.json, message.
CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "a list": ("fp8-channel", {"quantization_config": []}, "'quantization_config' should be an object"),
    "a string": ("fp8-channel", {"quantization_config": "fp8"}, "'quantization_config' should be an object"),
    "no method": ("fp8-channel", {"quantization_config": {}}, "'quant_method' is None, which is not supp"),
    "an unknown method": (
        "fp8-channel",
        {"quantization_config": {"quant_method": "bitsandbytes\n" * 40}},
        r"'quant_method' is 'bitsandbytes\\n.*only compressed-tensors, .*convert the unquantized",
    ),
    "a method of another type": (
        "fp8-channel",
        {"quantization_config": {"quant_method": ["fp8"]}},
        "'quant_method' is",
    ),
    "rotated": (
        "fp8-channel",
        {
            "quantization_config": COMPRESSED
            | {"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}}
        },
        "'transform_config' is set, which is not supported",
    ),
    "sparse": (
        "fp8-channel",
        {"quantization_config": COMPRESSED | {"sparsity_config": {"format": "sparse-24"}}},
        "'sparsity_config' is set",
    ),
    "a block of zero": (
        "fp8-block",
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 128]}},
        "'weight_block_size'.*two positive integers",
    ),
    "a block of text": (
        "fp8-block",
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": "128"}},
        "two positive integers",
    ),
    "another block": (
        "fp8-block",
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
        "_scale_inv' has the shape .* which fits no blocks",
    ),
    "a huge block": (
        "fp8-block",
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [10**400, 1]}},
        "_scale_inv' has the shape .* which fits no blocks",
    ),
    "other bits": (
        "int4",
        {"quantization_config": groups(**INT4 | {"num_bits": 8})},
        "do not hold 256 codes",
    ),
    "AWQ of other bits": ("awq", {"quantization_config": {"quant_method": "awq", "bits": 8}}, "'bits' is 8"),
    "AWQ of another version": (
        "awq",
        {"quantization_config": {"quant_method": "awq", "bits": 4, "version": "gemv"}},
        "'version' is",
    ),
    "GPTQ's format for a kernel": (
        "gptq",
        {"quantization_config": {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}},
        "'checkpoint_format' is",
    ),
    "GPTQ without bits": ("gptq", {"quantization_config": {"quant_method": "gptq"}}, "'bits' is missing"),
    "AWQ said to be FP8": (
        "awq",
        {"quantization_config": {"quant_method": "fp8"}},
        "stored as AWQ and GPTQ do",
    ),
    "AWQ without a word": ("awq", {"quantization_config": None}, "no 'quantization_config' that says which"),
    "MLX without a word": (
        "mlx",
        {"quantization_config": None, "quantization": None},
        "no 'quantization' that says how",
    ),
    "an unknown mode": (
        "mlx",
        {"quantization_config": None, "quantization": {"group_size": 64, "bits": 6, "mode": "nf4"}},
        "'mode' is",
    ),
    "MLX of other bits": (
        "mlx",
        {"quantization_config": None, "quantization": {"group_size": 64, "bits": 8}},
        "'model.decoder.embed_tokens.scales' has the shape|no whole groups",
    ),
    "MLX of another mode": (
        "mlx",
        {"quantization_config": None, "quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}},
        "is stored as BF16, should be U8",
    ),
    "a module with a newline": (
        "mlx",
        {"quantization_config": None, "quantization": {"group_size": 64, "bits": 6, "a\nb": {"bits": "4"}}},
        r"a\\nb.*'bits' should be an integer",
    ),
    "said to be quantized and is not": ("", {"quantization_config": {"quant_method": "fp8"}}, ""),
    "both keys": ("mlx", {"quantization": STYLES["mlx"].config["quantization"]}, ""),
    "in the text config": (
        "mlx",
        {
            "quantization_config": None,
            "text_config": quantized_folders.small_config()["text_config"] | STYLES["mlx"].config,
        },
        "",
    ),
    "FP8 without a word": ("fp8-block", {"quantization_config": None}, ""),
    "NVFP4 without a word": ("nvfp4-compressed", {"quantization_config": None}, ""),
}
for _bits in (0, -1, 7.0, True, "4", [4], 10**9):
    CONFIGS[f"MLX of {_bits!r} bits"] = (
        "mlx",
        {"quantization_config": None, "quantization": {"group_size": 64, "bits": _bits}},
        "'bits' should be an integer from 1 to 8",
    )
    CONFIGS[f"GPTQ of {_bits!r} bits"] = (
        "gptq",
        {"quantization_config": {"quant_method": "gptq", "bits": _bits}},
        "'bits' is",
    )
    CONFIGS[f"integers of {_bits!r} bits"] = (
        "int4",
        {"quantization_config": groups(type="int", num_bits=_bits)},
        "'num_bits' should be an integer from 1 to 8",
    )
for _size in (0, -64, 64.0, "64", 10**9, 48):
    CONFIGS[f"MLX of groups of {_size!r}"] = (
        "mlx",
        {"quantization_config": None, "quantization": {"group_size": _size, "bits": 6}},
        "'group_size' should be an integer|no whole groups",
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_config(tmp_path: Path, name: str) -> None:
    style, changes, message = CONFIGS[name]
    if style:
        stored = stored_folder(style)
    else:
        stored = {key: tensor("BF16", value) for key, value in quantized_folders.small_weights().items()}
    folder = with_config(stored, tmp_path / "q", **(STYLES[style or "mlx"].config | changes))
    if message:
        refused(folder, message)
    else:
        convert(folder, tmp_path / "m.gguf", "q8_0")


def test_integers_of_several_widths(tmp_path: Path) -> None:
    """Where groups differ in bits, the width of a row tells."""
    config = COMPRESSED | {
        "config_groups": {"a": {"weights": INT4}, "b": {"weights": INT4 | {"num_bits": 8}}}
    }
    convert(
        with_config(stored_folder("int4"), tmp_path / "q", quantization_config=config), tmp_path / "m.gguf"
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([5, 256], "is \\[5, 256\\], which does not suit codes of \\[320, 32\\]"),
        ([320, -256], "which does not suit codes"),
        ([320, 0], "which does not suit codes"),
        ([320, 2**62], "which does not suit codes"),
        ([320], "which does not suit codes"),
        ([320, 4000], "do not hold 4000 codes"),
    ],
)
def test_stored_shapes(tmp_path: Path, values: list[int], message: str) -> None:
    stored = stored_folder("int4")
    stored[f"{MATRIX}_shape"] = tensor("I64", np.array(values, np.int64))
    refused(write_folder(tmp_path / "q", stored, STYLES["int4"]), message)


@pytest.mark.parametrize("group", [-1, 8, 2**31 - 1, -(2**31)])
def test_groups_of_columns_out_of_range(tmp_path: Path, group: int) -> None:
    stored = stored_folder("gptq")
    name = f"{MODULE}.g_idx"
    indices = np.frombuffer(stored[name][2], np.int32).copy()
    indices[17] = group
    stored[name] = tensor("I32", indices)
    refused(write_folder(tmp_path / "q", stored, STYLES["gptq"]), f"'{name}' should name one of 8 groups")


@pytest.mark.parametrize(
    ("name", "part", "config"),
    [
        ("int4", f"{MATRIX}_zero_point", groups(**INT4, symmetric=False)),
        ("gptq", f"{MODULE}.qzeros", {"quant_method": "gptq", "bits": 4}),
        ("gptq", f"{MODULE}.g_idx", {"quant_method": "gptq", "bits": 4, "desc_act": True}),
        ("awq", f"{MODULE}.qzeros", {"quant_method": "awq", "bits": 4}),
    ],
)
def test_what_the_settings_promise(tmp_path: Path, name: str, part: str, config: dict[str, Any]) -> None:
    """Zero points and groups that are not there are no zeros and no groups in order."""
    stored = stored_folder(name)
    folder = with_config(stored, tmp_path / "q", quantization_config=config)
    convert(folder, tmp_path / "m.gguf", "q8_0")
    del stored[part]
    refused(with_config(stored, tmp_path / "q", quantization_config=config), f"'{part}' is missing: download")


def test_awq_without_zero_points(tmp_path: Path) -> None:
    """Its config says so; they are the middle of the range then."""
    config = {"quantization_config": {"quant_method": "awq", "bits": 4, "zero_point": False}}
    stored = one_matrix(STYLES["awq"], (32, 128))
    stored[f"{MODULE}.qzeros"] = tensor("I32", np.full((4, 4), 0x88888888, np.uint32))
    with_zeros = dequantized(tmp_path, stored, config)
    del stored[f"{MODULE}.qzeros"]
    assert np.array_equal(dequantized(tmp_path, stored, config), with_zeros)


def dequantized(folder: Path, stored: Stored, config: dict[str, Any]) -> np.ndarray:
    write_stored(folder / "model.safetensors", stored)
    settings = read_quantization(folder, Fields(config, "config.json", []), [])
    with Checkpoint(folder) as checkpoint:
        weight = open_weights(checkpoint, settings, []).by_name[MATRIX]
        return weight.read(0, n_bytes("F32", weight.shape)).view(np.float32)


def test_a_claimed_shape_of_many_terabytes(tmp_path: Path) -> None:
    """Without elements, of any size besides."""
    stored = stored_folder()
    stored[MATRIX] = ("F8_E4M3", (2**62, 0, 2**62), b"")
    refused(write_folder(tmp_path / "q", stored, STYLES["fp8-channel"]), f"'{MATRIX}'.*should be a matrix")
