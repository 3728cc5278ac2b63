"""The weights of a checkpoint, as a model has them: stored as such, or dequantized while they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from pydiffusion.convert.checkpoint.safetensors_files import Checkpoint, StoredTensor
from pydiffusion.convert.gguf.rows import to_float32
from pydiffusion.convert.gguf.tensor_reads import ReadBytes
from pydiffusion.errors import ConversionError

# (first row, number of rows) of a tensor's rows, leading dimensions flattened -> (n_rows, any)
ReadRows = Callable[[int, int], np.ndarray]


@dataclass(frozen=True)
class Blocks:
    """A quantized matrix in a ggml type that has the same codes: copied, it loses nothing.

    ``read`` gives rows of blocks. ``factors``: by which the weights are multiplied besides, (n,) float32, one
    for each n-th of the rows; None for 1.
    """

    type: str
    read: ReadBytes
    factors: np.ndarray | None = None


@dataclass(frozen=True)
class Weight:
    """A tensor: ``read`` gives its elements in ``dtype`` (names of safetensors), F32 if it is dequantized.

    ``file``: where it is stored, for messages. ``blocks``: the same without dequantizing, where ggml has a
    type for it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    read: ReadBytes
    blocks: Blocks | None = None


@dataclass(frozen=True)
class Weights:
    """All tensors of a checkpoint by name. ``keep``: the ggml type to which the target's tensors can be
    copied in blocks, empty for none.
    """

    folder: Path
    by_name: Mapping[str, Weight]
    keep: str = ""


def stored_weight(checkpoint: Checkpoint, tensor: StoredTensor) -> Weight:
    """A tensor as it is stored."""
    read = partial(checkpoint.read, tensor)
    return Weight(tensor.name, tensor.dtype, tensor.shape, tensor.file, read)


@dataclass(frozen=True)
class RowsAsBytes:
    """A :data:`ReadBytes` of rows of ``row_bytes`` bytes, which ``rows`` computes."""

    rows: ReadRows
    row_bytes: int

    def __call__(self, start: int, n_bytes: int) -> np.ndarray:
        size = self.row_bytes
        first, end = start // size, -(-(start + n_bytes) // size)
        data = np.ascontiguousarray(self.rows(first, end - first)).reshape(-1).view(np.uint8)
        return data[start - first * size : start - first * size + n_bytes]


@dataclass(frozen=True)
class JoinedRead:
    """A :data:`ReadBytes` of ranges one after the other: (read, first byte, number of bytes) of each."""

    ranges: Sequence[tuple[ReadBytes, int, int]]

    def __call__(self, start: int, n_bytes: int) -> np.ndarray:
        pieces, position, end = [], 0, start + n_bytes
        for read, first, length in self.ranges:
            low, high = max(start, position), min(end, position + length)
            if low < high:
                pieces.append(read(first + low - position, high - low))
            position += length
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, np.uint8), *pieces])


def as_float32(weight: Weight) -> Weight:
    """The same tensor, read as F32. Raises ConversionError if it isn't one of floats."""
    if weight.dtype == "F32":
        return weight
    if weight.dtype not in ("F16", "BF16"):
        raise ConversionError(
            f"{weight.file}: tensor {weight.name!r} is stored as {weight.dtype}, beside others of floats"
        )

    def read(start: int, n_bytes: int) -> np.ndarray:
        halves = weight.read(start // 2, n_bytes // 2)
        return to_float32(halves, weight.dtype, len(halves) // 2).view(np.uint8)

    return Weight(weight.name, "F32", weight.shape, weight.file, read)
