"""Match the tensors of a checkpoint with those that an architecture needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from pydiffusion.convert.checkpoint.tensor_map import Wanted
from pydiffusion.convert.checkpoint.weights import Weight, Weights
from pydiffusion.convert.gguf.rows import to_float32
from pydiffusion.convert.gguf.tensor_reads import SourceTensor
from pydiffusion.errors import ConversionError

_FLOAT_TYPES = ("F32", "F16", "BF16")
_COMPARE_BYTES = 8 << 20


class Inventory:
    """Tensors of a checkpoint by name; each is taken, or rejected by name and file.

    ``prefix``: what the names in the checkpoint begin with, and those in tensor maps don't; a checkpoint of
    the model without its head is saved without it.
    """

    def __init__(self, weights: Weights, prefix: str = ""):
        self.folder = weights.folder
        self.prefix = prefix
        self.stored: dict[str, Weight] = {}
        for name, tensor in weights.by_name.items():
            short = name.removeprefix(prefix)
            if short in self.stored:
                other = self.stored[short]
                raise ConversionError(f"{tensor.file}: tensors {name!r} and {other.name!r} are duplicates")
            self.stored[short] = tensor

    def take(self, wanted: Iterable[Wanted]) -> list[SourceTensor]:
        """The wanted tensors, in order. Raises ConversionError for missing ones and wrong shapes or types."""
        wanted = list(wanted)
        for want in wanted:
            self.check(want.source, want.shape)
        return [
            SourceTensor(want.name, tensor.dtype, want.shape, tensor.read)
            for want in wanted
            for tensor in (self.stored[want.source],)
        ]

    def check(self, source: str, shape: tuple[int, ...]) -> None:
        """Raise ConversionError if a tensor is missing, or its shape or type is wrong."""
        tensor = self.stored.get(source)
        if tensor is None:
            raise ConversionError(
                f"{self.folder}: tensor {self.prefix + source!r} is missing from the checkpoint"
                f"{self._like(source)}"
            )
        if tensor.shape != shape:
            raise ConversionError(
                f"{tensor.file}: tensor {tensor.name!r} has the shape {list(tensor.shape)}; config.json "
                f"requires {list(shape)}"
            )
        if tensor.dtype not in _FLOAT_TYPES:
            raise ConversionError(
                f"{tensor.file}: tensor {tensor.name!r} is stored as {tensor.dtype}, which is not supported "
                "(only F32, F16, BF16)"
            )

    def _like(self, source: str) -> str:
        """Name a tensor whose name ends alike, as those of other programs' layouts do."""
        end = "." + ".".join(source.split(".")[-2:])
        other = next((weight.name for name, weight in self.stored.items() if name.endswith(end)), None)
        return "" if other is None else f"; it has {other!r}: are these names another program's?"

    def refuse_others(self, known: Iterable[str]) -> None:
        """Raise ConversionError for a tensor that is not among the ``known`` names."""
        unexpected = sorted(set(self.stored) - set(known))
        if unexpected:
            more = f" (and {len(unexpected) - 1} more)" if len(unexpected) > 1 else ""
            tensor = self.stored[unexpected[0]]
            raise ConversionError(
                f"{tensor.file}: unexpected tensor {tensor.name!r}{more}: not of this architecture"
            )

    def equal(self, one: str, other: str) -> bool:
        """Whether two stored tensors of the same shape have the same weights; reads both."""
        first, second = self.stored[one], self.stored[other]
        for start, count in _pieces(int(np.prod(first.shape))):
            a, b = self._weights(first, start, count), self._weights(second, start, count)
            if not np.array_equal(a, b):
                return False
        return True

    def _weights(self, tensor: Weight, start: int, count: int) -> np.ndarray:
        size = 4 if tensor.dtype == "F32" else 2
        return to_float32(tensor.read(start * size, count * size), tensor.dtype, count)


def take_all(weights: Weights, wanted: Iterable[Wanted], prefix: str = "") -> list[SourceTensor]:
    """The tensors of a checkpoint that has exactly the wanted ones, in order. Raises ConversionError."""
    inventory, wanted = Inventory(weights, prefix), list(wanted)
    tensors = inventory.take(wanted)
    inventory.refuse_others(want.source for want in wanted)
    return tensors


def _pieces(n_weights: int) -> Iterator[tuple[int, int]]:
    step = _COMPARE_BYTES // 4
    for start in range(0, n_weights, step):
        yield start, min(step, n_weights - start)
