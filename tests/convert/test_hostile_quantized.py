"""Damaged and misleading quantized checkpoints: one clear line, no other exception, nothing left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from support.quantized_folders import STYLES, Stored, tensor, write_folder
from support.spoiled_quantized import (
    MATRIX,
    MODULE,
    filled,
    one_matrix,
    read_all,
    refused,
    stored_folder,
)

#: The styles with a reader of their own, and the shape of a matrix (or a stack) for it.
SHAPES: dict[str, tuple[int, ...]] = {
    name: (3, 32, 128) if style.stacked else (32, 128)
    for name, style in STYLES.items()
    if name not in ("mixed", "nvfp4-file")
}
DTYPES = ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "I16", "F16", "BF16", "I32", "U32", "F32")
DTYPES += ("I64", "F64")


OPTIONAL = ("_zero_point", "input_scale")


def other_shapes(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Shapes that are nearly right, of other ranks, and without elements."""
    yield from ((), (0,), (7,), (0, 0), (3, 5), (2, 3, 4), (1,) * 8)
    yield from (shape[::-1], (*shape, 1), (2, *shape), shape[:-1], shape[1:])
    for i in range(len(shape)):
        for size in (0, shape[i] - 1, shape[i] + 1, 2 * shape[i]):
            yield (*shape[:i], max(0, size), *shape[i + 1 :])


@pytest.mark.parametrize("name", SHAPES)
def test_parts_of_other_shapes_and_dtypes(tmp_path: Path, name: str) -> None:
    style = STYLES[name]
    config = style.config
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


@pytest.mark.parametrize("name", SHAPES)
def test_scales_that_are_no_scales(tmp_path: Path, name: str) -> None:
    """Read as what they are, or refused; factors of whole matrices must be positive."""
    style = STYLES[name]
    config = style.config
    good = one_matrix(style, SHAPES[name])
    for part, (dtype, shape, _) in good.items():
        if dtype not in ("F32", "BF16") or part.endswith("input_scale"):
            continue
        for kind, number in BAD_NUMBERS.items():
            bad = tensor(dtype, np.full(shape, number, np.float32))
            message = read_all(tmp_path, good | {part: bad}, config)
            if part.endswith(("_scale_2", "_global_scale")) and kind in NOT_POSITIVE:
                assert "not positive numbers" in message and part in message


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
