"""The stored tensors of one quantized matrix, and grids of scales laid over it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from pydiffusion.convert.checkpoint.quantized.codes import BYTE_FLOATS
from pydiffusion.convert.checkpoint.quantized.settings import Quantization
from pydiffusion.convert.checkpoint.safetensors_files import Checkpoint, StoredTensor
from pydiffusion.convert.checkpoint.weights import ReadRows
from pydiffusion.convert.gguf.rows import to_float32
from pydiffusion.errors import ConversionError

FLOATS = ("F32", "F16", "BF16")
_NUMPY = {
    "U8": "<u1", "I8": "<i1", "U16": "<u2", "I16": "<i2", "I32": "<i4", "U32": "<u4", "I64": "<i8",
    "F64": "<f8", "BOOL": "<u1",
}  # fmt: skip
_LIMIT = 2**40  # weights of a matrix; more are no matrix, and would overflow


class Parts:
    """The tensors that store the matrix ``name``; those asked for are recorded in ``used``."""

    def __init__(self, checkpoint: Checkpoint, name: str, settings: Quantization):
        self.checkpoint, self.name, self.settings = checkpoint, name, settings
        self.used: list[str] = []

    @property
    def module(self) -> str:
        """The name without ``.weight``."""
        return self.name.removesuffix(".weight")

    def find(self, name: str, *dtypes: str) -> StoredTensor | None:
        """A stored tensor if it is there. Raises ConversionError if its dtype is not one of these."""
        tensor = self.checkpoint.tensors.get(name)
        if tensor is None:
            return None
        if dtypes and tensor.dtype not in dtypes:
            raise self.error(f"{name!r} is stored as {tensor.dtype}, should be {' or '.join(dtypes)}", tensor)
        self.used.append(name)
        return tensor

    def need(self, name: str, *dtypes: str) -> StoredTensor:
        """As :meth:`find`; raises ConversionError if it is missing."""
        tensor = self.find(name, *dtypes)
        if tensor is None:
            raise ConversionError(
                f"{self.checkpoint.files[0].parent}: tensor {self.name!r} is quantized, and its {name!r} is "
                "missing: download the checkpoint again, or convert the unquantized one"
            )
        return tensor

    def zeros(self, name: str, *dtypes: str) -> StoredTensor | None:
        """Zero points, as :meth:`need` if the settings say that there are any."""
        return self.need(name, *dtypes) if self.settings.has_zeros else self.find(name, *dtypes)

    def error(self, what: str, tensor: StoredTensor) -> ConversionError:
        """An error that names the matrix and the file."""
        return ConversionError(
            f"{tensor.file}: quantized tensor {self.name!r}: {what}; if the files are complete, convert the "
            "unquantized checkpoint instead"
        )

    def matrix_shape(self, tensor: StoredTensor, per_element: int = 1) -> tuple[int, ...]:
        """Shape of the matrix (or stack of them) whose codes a tensor has, ``per_element`` in each element.
        Raises ConversionError if it can't be one.
        """
        shape = (*tensor.shape[:-1], tensor.shape[-1] * per_element) if tensor.shape else ()
        if not 2 <= len(shape) <= 3 or not 0 < math.prod(shape) < _LIMIT:
            raise self.error(
                f"{tensor.name!r} has the shape {list(tensor.shape)}, should be a matrix", tensor
            )
        return shape

    def rows(self, tensor: StoredTensor) -> ReadRows:
        """Read rows of a tensor: (n_rows, n_per_row), all floats as float32, integers as they are."""
        n_per_row = tensor.shape[-1] if tensor.shape else 1
        size = n_per_row * tensor.n_bytes // max(1, math.prod(tensor.shape))

        def read(first: int, count: int) -> np.ndarray:
            data = self.checkpoint.read(tensor, first * size, count * size)
            return decode(data, tensor.dtype).reshape(count, n_per_row)

        return read

    def all_of(self, tensor: StoredTensor) -> np.ndarray:
        """All elements of a tensor, in its shape."""
        return decode(self.checkpoint.read(tensor, 0, tensor.n_bytes), tensor.dtype).reshape(tensor.shape)


def decode(data: np.ndarray, dtype: str) -> np.ndarray:
    """Elements of a dtype of safetensors: (n_bytes,) uint8 -> floats of any kind as float32, integers as they
    are.
    """
    if dtype in FLOATS:
        return to_float32(data, dtype, len(data))
    if dtype in BYTE_FLOATS:
        return BYTE_FLOATS[dtype][data]
    return data.view(_NUMPY[dtype])


@dataclass(frozen=True)
class Grid:
    """Values laid over matrices of ``shape``, one per block of ``height`` rows and ``width`` columns.

    ``rows``: reads rows of the values, (n_rows, n_blocks_per_row). ``per_matrix``: rows of values of each
    matrix, 0 if all share them.
    """

    rows: ReadRows
    shape: tuple[int, ...]
    height: int
    width: int
    per_matrix: int

    def over(self, first: int, count: int) -> np.ndarray:
        """The values over rows of the matrices: (count, n_blocks_per_row)."""
        matrix, row = np.divmod(np.arange(first, first + count), self.shape[-2])
        index = matrix * self.per_matrix + row // self.height
        low, high = int(index.min()), int(index.max())
        return self.rows(low, high + 1 - low)[index - low]

    def expanded(self, first: int, count: int) -> np.ndarray:
        """The value of each weight: (count, n_per_row), or (count, 1) if a row has one value."""
        values = self.over(first, count)
        if values.shape[1] == 1:
            return values
        return np.repeat(values, self.width, axis=1)[:, : self.shape[-1]]


def lay_grid(
    parts: Parts, tensor: StoredTensor, shape: tuple[int, ...], block: tuple[int, int] | None
) -> Grid:
    """Lay the values of ``tensor`` over matrices of ``shape``: one for all, one per matrix, per row, per
    group of a row, or per block of ``block`` (height, width).

    Raises ConversionError for a shape that fits in none of these ways.
    """
    if len(tensor.shape) == 4 and len(shape) == 2 and tensor.shape[1] == tensor.shape[3] == 1:
        tensor = replace(tensor, shape=tensor.shape[::2])  # ModelOpt keeps the dimensions within a block
    n, n_rows, n_columns = math.prod(tensor.shape), shape[-2], shape[-1]
    n_matrices, rows = math.prod(shape[:-2]), parts.rows(tensor)

    def flat(height: int, per_matrix: int) -> Grid:
        def one_per_row(first: int, count: int) -> np.ndarray:
            size = tensor.n_bytes // n
            data = parts.checkpoint.read(tensor, first * size, count * size)
            return decode(data, tensor.dtype).reshape(count, 1)

        return Grid(one_per_row, shape, height, n_columns, per_matrix)

    if n == 1:
        return flat(n_rows, 0)
    if n == n_matrices and tensor.shape[0] == n_matrices:
        return flat(n_rows, 1)
    if tensor.shape in (shape[:-1], (*shape[:-1], 1)):
        return flat(1, n_rows)
    if len(tensor.shape) == len(shape) and tensor.shape[:-2] == shape[:-2] and n:
        high, wide = tensor.shape[-2:]
        if block is not None and (-(-n_rows // block[0]), -(-n_columns // block[1])) == (high, wide):
            return Grid(rows, shape, *block, high)
        if high == n_rows and n_columns % wide == 0:
            return Grid(rows, shape, 1, n_columns // wide, n_rows)
    raise parts.error(
        f"{tensor.name!r} has the shape {list(tensor.shape)}, which fits no blocks of its weights' "
        f"{list(shape)}",
        tensor,
    )
