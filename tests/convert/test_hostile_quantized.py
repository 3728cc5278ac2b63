"""Damaged and misleading quantized checkpoints: one clear line, no other exception, nothing left behind."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import checkpoint_folders as folders
from support import quantized_folders
from support.quantized_folders import (
    STYLES,
    Stored,
    Style,
    n_bytes,
    quantize,
    tensor,
    write_folder,
    write_stored,
)

from pydiffusion.convert import convert
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


OPTIONAL = ("_zero_point", "input_scale")


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
        without = {key: value for key, value in good.items() if key != part}
        # Codes without scales are refused here, scales without codes by the architecture.
        can_be_missing = part == next(iter(good)) or part.endswith(OPTIONAL)
        assert bool(read_all(tmp_path, without, config)) != can_be_missing, part
        for other in {*other_shapes(shape)} - {shape}:
            n_refused += bool(read_all(tmp_path, good | {part: filled(dtype, other)}, config))
        for other in set(DTYPES) - {dtype}:
            n_refused += bool(read_all(tmp_path, good | {part: filled(other, shape)}, config))
        for byte in (0, 0x80, 0xFF):
            read_all(tmp_path, good | {part: filled(dtype, shape, byte)}, config)
    assert n_refused > 20


BAD_NUMBERS = {
    "nan": np.nan,
    "infinity": np.inf,
    "zero": 0,
    "negative": -0.25,
    "denormal": 1e-45,
    "huge": 3e38,
}
NOT_POSITIVE = ("nan", "infinity", "zero", "negative")


@pytest.mark.parametrize("name", STYLES)
def test_scales_that_are_no_scales(tmp_path: Path, name: str) -> None:
    """Read as what they are, or refused; factors of whole matrices must be positive."""
    style = STYLES[name]
    config = style.config if style.file == "config.json" else {}
    good = one_matrix(style, SHAPES[name])
    for part, (dtype, shape, _) in good.items():
        if dtype not in ("F32", "BF16") or part.endswith("input_scale"):
            continue
        for kind, number in BAD_NUMBERS.items():
            bad = tensor(dtype, np.full(shape, number, np.float32))
            message = read_all(tmp_path, good | {part: bad}, config)
            if part.endswith(("_scale_2", "_global_scale")) and kind in NOT_POSITIVE:
                assert "not positive numbers" in message and part in message


@functools.cache
def _stored(style: str) -> Stored:
    return quantize(STYLES[style], quantized_folders.small_weights()).stored


def stored_folder(style: str = "fp8-channel") -> Stored:
    """The tensors of a whole checkpoint, to be changed."""
    return dict(_stored(style))


def refused(folder: Path, message: str) -> None:
    """A conversion fails with this one line, and leaves nothing behind."""
    target = folder.parent / "out" / "m.gguf"
    target.parent.mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ConversionError, match=message) as caught:
            convert(folder, target, "q8_0")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert list(target.parent.iterdir()) == []


EXPERT = "model.decoder.layers.0.experts"


def rename(stored: Stored, old: str, new: str) -> None:
    for name in [name for name in stored if name.startswith(old)]:
        stored[name.replace(old, new, 1)] = stored.pop(name)


def remove(stored: Stored, start: str) -> None:
    for name in [name for name in stored if name.startswith(start)]:
        del stored[name]


def plain(name: str, shape: tuple[int, ...], dtype: str = "BF16") -> Stored:
    return {name: filled(dtype, shape)}


def one_expert_of(shape: tuple[int, int]) -> Stored:
    name = f"{EXPERT}.1.up_proj.weight"
    return STYLES["fp8-channel"].encoders[0](name, shape, np.random.default_rng(1))[0]


#: What is done to a folder of FP8 with scales of rows, and the message.
SPOILED: dict[str, tuple[Callable[[Stored], object], str]] = {
    "a gap in the experts": (
        lambda stored: rename(stored, f"{EXPERT}.2.", f"{EXPERT}.17."),
        r"experts\.2\.gate_proj\.weight' is missing: of 6 experts all must be there",
    ),
    "an expert without a part": (
        lambda stored: remove(stored, f"{EXPERT}.3.up_proj"),
        r"experts\.3\.up_proj\.weight' is missing",
    ),
    "fewer experts than the config has": (
        lambda stored: remove(stored, f"{EXPERT}.5."),
        r"config\.json requires \[6, 128, 256\]",
    ),
    "an expert of another number": (
        lambda stored: rename(stored, f"{EXPERT}.2.", f"{EXPERT}.02."),
        r"experts\.2\.gate_proj\.weight' is missing",
    ),
    "an expert of another shape": (
        lambda stored: stored.update(one_expert_of((32, 256))),
        r"experts\.1\.up_proj\.weight' has the shape \[32, 256\].*experts must have the same",
    ),
    "an expert of integers without scales": (
        lambda stored: (
            remove(stored, f"{EXPERT}.1.up_proj"),
            stored.update(plain(f"{EXPERT}.1.up_proj.weight", (64, 256), "I16")),
        ),
        r"experts\.1\.up_proj\.weight' is stored as I16, beside others of floats",
    ),
    "experts twice": (
        lambda stored: stored.update(plain(f"{EXPERT}.gate_up_proj", (6, 128, 256))),
        r"gate_up_proj' is stored stacked and expert by expert",
    ),
    "stacked experts twice": (
        lambda stored: (
            remove(stored, f"{EXPERT}."),
            stored.update(plain(f"{EXPERT}.gate_up_proj", (6, 128, 256))),
            stored.update(plain(f"{EXPERT}.gate_up_proj.weight", (6, 128, 256))),
        ),
        r"gate_up_proj' is stored twice",
    ),
    "codes twice": (
        lambda stored: stored.update(plain(f"{MATRIX}_packed", (320, 128), "U8")),
        r"gate_proj\.weight",
    ),
    "codes and plain weights": (
        lambda stored: (
            stored.update(STYLES["int4"].encoders[0](MATRIX, (320, 256), np.random.default_rng(2))[0]),
            stored.update(plain(MATRIX, (320, 256))),
        ),
        rf"the weights '{MATRIX}' are stored twice",
    ),
    "scales alone": (
        lambda stored: stored.pop(MATRIX),
        rf"tensor '{MATRIX}' is missing from the checkpoint",
    ),
    "scales of another matrix": (
        lambda stored: stored.update({"model.decoder.other.weight_scale": filled("F32", (3, 1))}),
        r"unexpected tensor 'model\.decoder\.other\.weight_scale'",
    ),
    "names with newlines": (
        lambda stored: stored.update(
            {
                "evil\nname.weight": filled("F8_E4M3", (4, 4)),
                "evil\nname.weight_scale": filled("F32", (3, 3)),
            }
        ),
        r"evil\\nname\.weight",
    ),
    "an expert with a newline": (
        lambda stored: stored.update(plain(f"{EXPERT}\n.experts.0.up_proj.weight", (64, 256))),
        r"unexpected tensor '.*\\n\.experts",
    ),
    "weights scaled for their inputs": (
        lambda stored: stored.update({f"{MODULE}.pre_quant_scale": filled("BF16", (256,))}),
        r"pre_quant_scale.*ModelOpt's AWQ.*convert the unquantized checkpoint instead",
    ),
    "bitsandbytes": (
        lambda stored: stored.update({f"{MATRIX}.absmax": filled("F32", (4,))}),
        r"absmax.*bitsandbytes.*convert the unquantized checkpoint instead",
    ),
    "NaN": (
        lambda stored: stored.update({MATRIX: filled("F8_E4M3", (320, 256), 0x7F)}),
        r"blk\.0\.ffn_gate\.weight: holds NaN or infinite weights",
    ),
    "scales of NaN": (
        lambda stored: stored.update(
            {f"{MATRIX}_scale": tensor("BF16", np.full((320, 1), np.nan, np.float32))}
        ),
        r"blk\.0\.ffn_gate\.weight: holds NaN or infinite weights",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_folders(tmp_path: Path, name: str) -> None:
    spoil, message = SPOILED[name]
    stored = stored_folder()
    spoil(stored)
    refused(write_folder(tmp_path / "q", stored, STYLES["fp8-channel"]), message)


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
        {"quantization_config": COMPRESSED | {"transform_config": {"config_groups": {}}}},
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
for _bits in (0, -1, 7.0, True, 10**9, "4", [4], {}, 9):
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
