"""Tensors copied in the blocks that the checkpoint has (NVFP4, MXFP4), with their factors as ``.scale``.

The names are those of llama.cpp's converter: the factor of a matrix in ``NAME.scale``, those of experts in
one tensor, with gate and up apart, since they have factors of their own; ``ffn_down_exps.scale``, the
router's scale per expert, is multiplied by the factors of the down matrices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pydiffusion.convert.architectures.diffusion_gemma.tensor_names import KINDS
from pydiffusion.convert.checkpoint.tensor_map import split_name
from pydiffusion.convert.checkpoint.weights import Blocks, JoinedRead, Weight, as_float32
from pydiffusion.convert.gguf.rows import row_bytes
from pydiffusion.convert.gguf.tensor_reads import SourceTensor

_GATE_UP, _DOWN = "ffn_gate_up_exps", "ffn_down_exps"


def keep_blocks(
    planned: Sequence[SourceTensor], weights: Mapping[str, Weight], type: str
) -> list[SourceTensor]:
    """Replace tensors by their blocks where the checkpoint has them in this type.

    ``weights``: the checkpoint's, by the name of the planned tensor.
    """
    result: list[SourceTensor] = []
    down_factors: dict[str, np.ndarray] = {}  # by the name of the tensor to multiply
    for tensor in planned:
        weight = weights.get(tensor.name)
        blocks = weight.blocks if weight is not None else None
        if (
            weight is None
            or blocks is None
            or blocks.type != type
            or split_name(tensor.name)[0] in KINDS.float32
        ):
            result.append(tensor)
        elif blocks.factors is None:
            result.append(SourceTensor(tensor.name, type, tensor.shape, blocks.read))
        elif split_name(tensor.name)[0] == _GATE_UP:
            result += _apart(tensor, blocks, blocks.factors)
        else:
            result.append(SourceTensor(tensor.name, type, tensor.shape, blocks.read))
            if split_name(tensor.name)[0] == _DOWN:
                down_factors[_scale_name(tensor.name)] = blocks.factors
            else:
                result.append(_constant(_scale_name(tensor.name), blocks.factors))
    return [
        _constant(tensor.name, _elements(weights[tensor.name]) * down_factors[tensor.name])
        if tensor.name in down_factors
        else tensor
        for tensor in result
    ]


def _apart(tensor: SourceTensor, blocks: Blocks, factors: np.ndarray) -> list[SourceTensor]:
    """Gate and up of the experts, each with its factors."""
    n_experts, n_rows, n_per_row = tensor.shape
    size = n_rows // 2 * row_bytes(blocks.type, n_per_row)
    of_both = np.repeat(factors, 2) if len(factors) == n_experts else factors
    result = []
    for half, kind in enumerate(("ffn_gate_exps", "ffn_up_exps")):
        name = tensor.name.replace(_GATE_UP, kind)
        read = JoinedRead([(blocks.read, (2 * i + half) * size, size) for i in range(n_experts)])
        result.append(SourceTensor(name, blocks.type, (n_experts, n_rows // 2, n_per_row), read))
        result.append(_constant(_scale_name(name), of_both[half::2]))
    return result


def _scale_name(name: str) -> str:
    return name.removesuffix(".weight") + ".scale"


def _elements(weight: Weight) -> np.ndarray:
    """All elements of a vector, as float32."""
    return as_float32(weight).read(0, 4 * weight.shape[0]).view(np.float32)


def _constant(name: str, values: np.ndarray) -> SourceTensor:
    data = np.ascontiguousarray(values, np.float32).view(np.uint8)
    return SourceTensor(name, "F32", values.shape, lambda start, n_bytes: data[start : start + n_bytes])
