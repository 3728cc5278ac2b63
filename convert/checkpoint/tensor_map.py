"""Tensor maps: tables of names in a checkpoint, names in a GGUF, and shapes by dimension names.

Shapes are in C order, as in numpy and safetensors; a GGUF stores them reversed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pydiffusion.errors import ConversionError

# (name in the checkpoint, name in the GGUF, names of its dimensions)
Row = tuple[str, str, tuple[str, ...]]
Table = Sequence[Row]


@dataclass(frozen=True)
class Wanted:
    """A required tensor: its checkpoint name ``source`` and its GGUF name ``name``."""

    source: str
    name: str
    shape: tuple[int, ...]


def wanted(table: Table, sizes: Mapping[str, int], source: str = "", name: str = "") -> list[Wanted]:
    """The tensors of a table, for ``sizes`` by dimension name.

    ``source`` and ``name`` go before the names: ``layers.3.`` and ``blk.3.`` for those of a layer.
    """
    return [
        Wanted(source + old, name + new, tuple(sizes[dimension] for dimension in dimensions))
        for old, new, dimensions in table
    ]


def shapes_of(tensors: Iterable[Wanted]) -> dict[str, tuple[int, ...]]:
    """GGUF names and shapes, in order."""
    return {tensor.name: tensor.shape for tensor in tensors}


def split_name(name: str) -> tuple[str, int | None]:
    """Split a GGUF name into kind and layer: ``blk.3.attn_q.weight`` -> (``attn_q``, 3);
    ``token_embd.weight`` -> (``token_embd``, None).
    """
    match = re.fullmatch(r"(?:blk\.(0|[1-9][0-9]{0,5})\.)?(.+)", name, re.DOTALL)
    if match is None:
        return "", None
    return match[2].removesuffix(".weight"), None if match[1] is None else int(match[1])


@dataclass(frozen=True)
class TensorKinds:
    """Kinds of tensors of an architecture, as :func:`split_name` gives them: of the model, of its layers, and
    of both those that are always stored as F32.
    """

    architecture: str
    of_model: frozenset[str]
    of_layer: frozenset[str]
    float32: frozenset[str]

    @classmethod
    def from_tables(
        cls,
        architecture: str,
        of_model: Table,
        of_layer: Table,
        *,
        more_of_model: Iterable[str] = (),
        more_of_layer: Iterable[str] = (),
        more_float32: Iterable[str] = (),
    ) -> TensorKinds:
        """The kinds in two tables, and others. Tensors of one dimension (norms, scales) are F32."""
        vectors = {split_name(name)[0] for _, name, shape in (*of_model, *of_layer) if len(shape) == 1}
        return cls(
            architecture,
            frozenset({split_name(name)[0] for _, name, _ in of_model} | {*more_of_model}),
            frozenset({split_name(name)[0] for _, name, _ in of_layer} | {*more_of_layer}),
            frozenset(vectors | {*more_float32}),
        )

    def kind(self, name: str) -> str:
        """The kind of a tensor. Raises ConversionError for a name that is not of this architecture."""
        kind, layer = split_name(name)
        if not kind:
            raise ConversionError(f"a tensor without a name: not a valid GGUF of {self.architecture}")
        if kind not in (self.of_model if layer is None else self.of_layer):
            raise ConversionError(
                f"unexpected tensor {name!r}: {self.architecture} has no tensor of this name"
            )
        return kind
