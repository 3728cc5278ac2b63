"""Experts that a checkpoint stores one by one, as quantizers do, stacked as the model has them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pydiffusion.convert.checkpoint.weights import Blocks, JoinedRead, Weight, Weights, as_float32
from pydiffusion.convert.gguf.rows import row_bytes
from pydiffusion.errors import ConversionError

_ONE = re.compile(
    r"(?P<experts>.+\.experts)\.(?P<number>0|[1-9]\d{0,8})\.(?P<part>gate_proj|up_proj|down_proj)\.weight"
)
_STACKED = re.compile(
    r"(.+\.experts\.(?:gate_up_proj|down_proj))\.weight"
)  # as a module's, which MLX makes of them
# The stacked parameter, and the parts of an expert in it.
_PARAMETERS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_ELEMENT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


def stack_experts(weights: Weights) -> Weights:
    """Join ``experts.N.gate_proj.weight``, ``up_proj`` and ``down_proj`` to ``experts.gate_up_proj`` (each
    expert's gate rows, then its up rows) and ``experts.down_proj``.

    Raises ConversionError for a missing expert, and for experts of different shapes.
    """
    by_name: dict[str, Weight] = {}
    singles: dict[str, dict[tuple[int, str], Weight]] = {}
    for name, weight in weights.by_name.items():
        if match := _ONE.fullmatch(name):
            singles.setdefault(match["experts"], {})[int(match["number"]), match["part"]] = weight
        elif match := _STACKED.fullmatch(name):
            if match[1] in weights.by_name:
                raise ConversionError(f"{weight.file}: {match[1]!r} is stored twice: {name!r} is the same")
            by_name[match[1]] = replace(weight, name=match[1])
        else:
            by_name[name] = weight
    for experts, found in singles.items():
        numbers = sorted({number for number, _ in found})
        for parameter, parts in _PARAMETERS.items():
            wanted = [(i, part) for i in range(len(numbers)) for part in parts]
            missing = next((key for key in wanted if key not in found), None)
            if missing is not None:
                raise ConversionError(
                    f"{weights.folder}: tensor '{experts}.{missing[0]}.{missing[1]}.weight' is missing: of "
                    f"{len(numbers)} experts all must be there"
                )
            name = f"{experts}.{parameter}"
            if name in by_name:
                raise ConversionError(
                    f"{by_name[name].file}: {name!r} is stored stacked and expert by expert"
                )
            by_name[name] = _stacked(name, [found[key] for key in wanted], len(numbers))
    return replace(weights, by_name=by_name)


def _stacked(name: str, parts: Sequence[Weight], n_experts: int) -> Weight:
    """Matrices of one shape, one after the other."""
    first = parts[0]
    for part in parts:
        if part.shape != first.shape or len(part.shape) != 2:
            raise ConversionError(
                f"{part.file}: tensor {part.name!r} has the shape {list(part.shape)}, {first.name!r} "
                f"{list(first.shape)}: experts must have the same"
            )
    if len({part.dtype for part in parts}) > 1:
        parts = [as_float32(part) for part in parts]
    n_rows, n_per_row = first.shape
    dtype = parts[0].dtype
    size = math.prod(first.shape) * _ELEMENT_BYTES.get(dtype, 1)
    read = JoinedRead([(part.read, 0, size) for part in parts])
    shape = (n_experts, len(parts) // n_experts * n_rows, n_per_row)
    return Weight(name, dtype, shape, first.file, read, _stacked_blocks(parts))


def _stacked_blocks(parts: Sequence[Weight]) -> Blocks | None:
    """The same as blocks of ggml, if all parts have such of one type."""
    blocks = [part.blocks for part in parts if part.blocks is not None]
    if len(blocks) < len(parts) or len({one.type for one in blocks}) > 1:
        return None
    n_rows, n_per_row = parts[0].shape
    size = n_rows * row_bytes(blocks[0].type, n_per_row)
    factors = None
    if any(one.factors is not None for one in blocks):
        factors = np.concatenate(
            [np.ones(1, np.float32) if one.factors is None else one.factors for one in blocks]
        )
    return Blocks(blocks[0].type, JoinedRead([(one.read, 0, size) for one in blocks]), factors)
