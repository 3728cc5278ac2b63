"""Zero padding: read rows of a padded tensor from an unpadded source."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pydiffusion import _native
from pydiffusion.convert.gguf import rows
from pydiffusion.convert.gguf.tensor_reads import ReadBytes
from pydiffusion.errors import ConversionError


@dataclass(frozen=True)
class PaddedRead:
    """A :data:`ReadBytes` of a padded tensor, in the source's type, for whole rows.

    Each group of ``old_rows`` rows is followed by zero rows up to ``new_rows``; each row of ``old_columns``
    elements by zeros up to ``new_columns``.
    """

    read: ReadBytes
    source_type: str
    old_rows: int
    new_rows: int
    old_columns: int
    new_columns: int

    def __call__(self, start: int, n_bytes: int) -> np.ndarray:
        size = rows.row_bytes(self.source_type, self.new_columns)
        zero_row = np.zeros((1, self.new_columns), np.float32)
        zeros = _native.quantize_rows(zero_row, self.source_type, 1)
        result = np.empty((n_bytes // size, size), np.uint8)
        old_size = rows.row_bytes(self.source_type, self.old_columns)
        first, end = start // size, (start + n_bytes) // size
        for group in range(first // self.new_rows, -(-end // self.new_rows)):
            begin = group * self.new_rows  # the target's first row of this group
            low, high = max(first, begin), min(end, begin + self.old_rows)
            if low < high:
                at = group * self.old_rows + low - begin
                data = self.read(at * old_size, (high - low) * old_size)
                kept = result[low - first : high - first]
                kept[:, :old_size] = data.reshape(high - low, old_size)
                kept[:, old_size:] = zeros[:, old_size:]
            low, high = max(first, begin + self.old_rows), min(end, begin + self.new_rows)
            if low < high:
                result[low - first : high - first] = zeros
        return result.reshape(-1)


def padded_read(
    read: ReadBytes,
    source_type: str,
    old_shape: tuple[int, ...],
    new_shape: tuple[int, ...],
    n_groups: int,
    name: str,
) -> ReadBytes:
    """Wrap ``read`` of a tensor of ``old_shape`` so that it reads one of ``new_shape``.

    ``n_groups``: number of row groups per matrix, each padded separately. Raises ConversionError for shapes
    that padding can't produce.
    """
    if old_shape == new_shape:
        return read
    same_rank = len(old_shape) == len(new_shape) >= 2 and old_shape[:-2] == new_shape[:-2]
    if not same_rank or old_shape[-1] > new_shape[-1] or old_shape[-2] > new_shape[-2]:
        raise ConversionError(f"{name}: a shape of {list(old_shape)} can't be padded to {list(new_shape)}")
    return PaddedRead(
        read,
        source_type,
        old_shape[-2] // n_groups,
        new_shape[-2] // n_groups,
        old_shape[-1],
        new_shape[-1],
    )
