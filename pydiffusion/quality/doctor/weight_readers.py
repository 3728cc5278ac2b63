"""Weights by their names in the checkpoint, from the checkpoint itself and from a GGUF, one at a time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from pydiffusion.convert.architectures.diffusion_gemma.tensor_names import EMBEDDING, LM_HEAD, PREFIX
from pydiffusion.convert.checkpoint.weights import Weights
from pydiffusion.convert.gguf import rows
from pydiffusion.convert.gguf.tensor_reads import SourceTensor
from pydiffusion.errors import ConversionError

_ROWS = 16384  # of the vocabulary, read at a time
_EXPERTS = {"ffn_gate_up_exps.weight": ("ffn_gate_exps.weight", "ffn_up_exps.weight")}


class WeightReader(ABC):
    """Reads weights as float32; names are those of the checkpoint without the prefix ``model.``"""

    @abstractmethod
    def find(self, name: str) -> SourceTensor:
        """The stored tensor. Raises ConversionError if there is none."""

    def read(self, name: str) -> np.ndarray:
        """The whole tensor, in its own shape."""
        tensor = self.find(name)
        return self._rows(tensor, 0, math.prod(tensor.shape[:-1])).reshape(tensor.shape)

    def read_rows(self, name: str, ids: Sequence[int]) -> np.ndarray:
        """These rows of a matrix: (len(ids), n_per_row)."""
        tensor = self.find(name)
        return np.concatenate([self._rows(tensor, i, 1) for i in ids])

    def chunks(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """All rows of a matrix in chunks: (index of the first, rows)."""
        tensor = self.find(name)
        for first in range(0, tensor.shape[0], _ROWS):
            yield first, self._rows(tensor, first, min(_ROWS, tensor.shape[0] - first))

    @property
    def head(self) -> str:
        """The name of the output head: the embedding's unless there is one of its own."""
        try:
            self.find(LM_HEAD)
        except ConversionError:
            return EMBEDDING
        return LM_HEAD

    def _rows(self, tensor: SourceTensor, first: int, n_rows: int) -> np.ndarray:
        """Rows of all matrices of a tensor: (n_rows, n_per_row) float32."""
        return _to_float32(tensor, first, n_rows)


class CheckpointReader(WeightReader):
    """Weights of a checkpoint folder."""

    def __init__(self, weights: Weights) -> None:
        self._by_name = weights.by_name

    def find(self, name: str) -> SourceTensor:
        """See ``WeightReader``."""
        weight = self._by_name.get(PREFIX + name) or self._by_name.get(name)
        if weight is None:
            raise ConversionError(f"the reference has no tensor {name!r}")
        return SourceTensor(name, weight.dtype, weight.shape, weight.read)


class FileReader(WeightReader):
    """Weights of a GGUF, dequantized, times the scale that may be beside a matrix.

    source_to_name: names in the checkpoint -> names in the GGUF.
    """

    def __init__(self, tensors: Mapping[str, SourceTensor], source_to_name: Mapping[str, str]) -> None:
        self._tensors = tensors
        self._names = {**source_to_name, LM_HEAD: "output.weight"}

    def find(self, name: str) -> SourceTensor:
        """See ``WeightReader``."""
        own = self._names.get(name, name)
        if own not in self._tensors:
            raise ConversionError(f"the file has no tensor {own!r}")
        return self._tensors[own]

    def read(self, name: str) -> np.ndarray:
        """See ``WeightReader``. Gate and up of experts may be stored apart."""
        own = self._names.get(name, name)
        for joined, parts in _EXPERTS.items():
            if own.endswith(joined) and own not in self._tensors:
                prefix = own.removesuffix(joined)
                return np.concatenate([super(FileReader, self).read(prefix + part) for part in parts], axis=1)
        return super().read(name)

    def _rows(self, tensor: SourceTensor, first: int, n_rows: int) -> np.ndarray:
        rows_read = super()._rows(tensor, first, n_rows)
        scale = self._tensors.get(tensor.name.removesuffix("weight") + "scale")
        if scale is None or scale.name in self._names.values():  # the router's are weights in their own right
            return rows_read
        scales = _to_float32(scale, 0, 1)[0]  # one, or one per expert
        rows_of_each = math.prod(tensor.shape[:-1]) // len(scales)
        return rows_read * scales[np.arange(first, first + n_rows) // rows_of_each, None]


def _to_float32(tensor: SourceTensor, first: int, n_rows: int) -> np.ndarray:
    n_per_row = tensor.shape[-1] if tensor.shape else 1
    size = rows.row_bytes(tensor.type, n_per_row)
    data = tensor.read(first * size, n_rows * size).reshape(n_rows, size)
    return rows.to_float32(data, tensor.type, n_per_row)
