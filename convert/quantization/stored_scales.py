"""A source's tensors as a file stores them that keeps scales beside its matrices (NVFP4, as llama.cpp's)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pydiffusion.convert.checkpoint.weights import JoinedRead, RowsAsBytes
from pydiffusion.convert.gguf import rows
from pydiffusion.convert.gguf.tensor_reads import SourceTensor
from pydiffusion.convert.quantization.type_plan import FUSED_KIND

_APART = ("ffn_gate_exps", "ffn_up_exps")
_DOWN = "ffn_down_exps"
_SCALE, _INPUT_SCALE = ".scale", ".input_scale"

Tensors = Mapping[str, SourceTensor]


def as_stored(source: Tensors, file: Tensors) -> dict[str, SourceTensor]:
    """The source's tensors with the file's names: gate and up of experts apart, matrices divided by scales
    that only the file has. Both by name.

    The scales themselves are the file's own: whether they are right shows in the matrices. A file whose
    experts have scales has those of their down matrices in the router's.
    """
    result = _with_experts_apart(dict(source), file)
    own = [name for name in file if name not in result and name.endswith((_SCALE, _INPUT_SCALE))]
    for name in own:
        matrix = name.removesuffix(_SCALE) + ".weight"
        if name.endswith(_SCALE) and matrix in result:
            result[matrix] = _divided(result[matrix], _values(file[name]))
        result[name] = file[name]
    for layer in {name.rpartition(".ffn_")[0] for name in own if name.endswith(f"_exps{_SCALE}")}:
        router, down = f"{layer}.{_DOWN}{_SCALE}", f"{layer}.{_DOWN}.weight"
        if router in file and router in source and down in source:
            given, wanted = _values(file[router]), _values(source[router])
            if given.shape == wanted.shape:
                factors = np.where(wanted == 0, 1, given / np.where(wanted == 0, 1, wanted))
                result[down] = _divided(result[down], factors.astype(np.float32))
                result[router] = file[router]
    return result


def _with_experts_apart(source: dict[str, SourceTensor], file: Tensors) -> dict[str, SourceTensor]:
    for name in [name for name in source if FUSED_KIND in name and name not in file]:
        joined = source[name]
        parts = [name.replace(FUSED_KIND, kind) for kind in _APART]
        if not all(part in file for part in parts) or len(joined.shape) != 3:
            continue
        n_experts, n_rows, n_per_row = joined.shape
        size = n_rows // 2 * rows.row_bytes(joined.type, n_per_row)
        for half, part in enumerate(parts):
            read = JoinedRead([(joined.read, (2 * i + half) * size, size) for i in range(n_experts)])
            source[part] = SourceTensor(part, joined.type, (n_experts, n_rows // 2, n_per_row), read)
        del source[name]
    return source


def _values(tensor: SourceTensor) -> np.ndarray:
    """All elements of a small tensor: (n,) float32."""
    n = int(np.prod(tensor.shape))
    data = tensor.read(0, rows.row_bytes(tensor.type, n)).reshape(1, -1)
    return rows.to_float32(data, tensor.type, n)[0]


def _divided(tensor: SourceTensor, factors: np.ndarray) -> SourceTensor:
    """A tensor as F32, each n-th of its rows divided by one of n factors; not for factors of another number,
    which then differ as they are.
    """
    n_per_row, n_rows = tensor.shape[-1], int(np.prod(tensor.shape[:-1]))
    if not len(factors) or n_rows % len(factors):
        return tensor
    size = rows.row_bytes(tensor.type, n_per_row)

    def read(first: int, count: int) -> np.ndarray:
        data = tensor.read(first * size, count * size).reshape(count, size)
        index = np.arange(first, first + count) // (n_rows // len(factors))
        with np.errstate(all="ignore"):
            return rows.to_float32(data, tensor.type, n_per_row) / factors[index, None]

    return SourceTensor(tensor.name, "F32", tensor.shape, RowsAsBytes(read, 4 * n_per_row))
