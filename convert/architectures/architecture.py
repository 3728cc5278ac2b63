"""An architecture, to the converter; :mod:`~pydiffusion.convert.architectures.registry` lists them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

from pydiffusion.convert.checkpoint.strict_json import Fields
from pydiffusion.convert.checkpoint.tensor_map import TensorKinds
from pydiffusion.convert.checkpoint.weights import Weights
from pydiffusion.convert.gguf.header import Value
from pydiffusion.convert.gguf.tensor_reads import SourceTensor
from pydiffusion.convert.gguf.writer import PlannedTensor

Config = TypeVar("Config")
_BLOCK = 256  # feed-forward lengths are padded to a multiple of this
# In which of a model's modes a matrix is used: a prompt is read, a canvas is denoised.
Mode = Literal["encoder", "decoder", "both"]


@dataclass(frozen=True)
class ModelShape:
    """A model's size, in a file and in memory, as ``config.json`` alone tells it.

    ``tensors``: names and shapes of all tensors of a GGUF, of these ``kinds``; ``metadata``: its keys without
    the tokenizer's, with defaults for what other files of the checkpoint say.
    """

    kinds: TensorKinds
    tensors: dict[str, tuple[int, ...]]
    metadata: dict[str, Value]


@dataclass(frozen=True)
class Mmproj:
    """The vision part of a checkpoint as an ``mmproj`` file: all metadata, and the tensors.

    ``implied``: values that readers take for keys that a file of another writer lacks.
    """

    metadata: dict[str, Value]
    tensors: list[PlannedTensor]
    implied: Mapping[str, Any]


@dataclass(frozen=True)
class Matrix:
    """A matrix that adapters can change. shape: (n_out, n_in), of experts (n_expert, n_out, n_in); None if
    the model is not known. padded: for n_out and n_in, how many feed-forward lengths it is, each of which
    a file may have padded.
    """

    shape: tuple[int, ...] | None
    padded: tuple[int, int]
    of_experts: bool

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether factors of a matrix of this shape can change it."""
        if self.shape is None or len(shape) != len(self.shape):
            return self.shape is None
        lengths = (*[0] * (len(shape) - 2), *self.padded)
        return all(
            size == wanted or abs(size - wanted) < n_lengths * _BLOCK
            for size, wanted, n_lengths in zip(shape, self.shape, lengths, strict=True)
        )


@dataclass(frozen=True)
class Place:
    """The place of a checkpoint's module in a GGUF: a tensor, without ``.weight``, in one of its modes."""

    tensor: str
    side: Mode


class Matrices(Protocol):
    """The matrices of a model that adapters can change."""

    @property
    def architecture(self) -> str:
        """``general.architecture`` of the model."""

    @property
    def n_experts(self) -> int | None:
        """Number of experts of a layer, None if the model is not known."""

    def place(self, module: str, shared: bool = False) -> Place | None:
        """The place of a module by its path; None if it can't be adapted. ``shared``: serves both modes."""

    def other(self, module: str) -> str:
        """Describe a module without a place; empty if unknown."""

    def module(self, tensor: str, side: str) -> str:
        """The path of a module: the inverse of ``place``."""

    def matrix(self, tensor: str) -> Matrix | None:
        """Sizes of a tensor; None if it can't be adapted, or the model doesn't have it."""

    def missing(self, tensor: str) -> str:
        """Why the model doesn't have a tensor that others of its architecture have; empty if unknown."""

    def is_used(self, tensor: str, side: str) -> bool:
        """Whether a tensor is used in a mode."""


@dataclass(frozen=True)
class Architecture(Generic[Config]):
    """An architecture, as functions of its config, which is a class of its own.

    All of them raise ConversionError, naming the file, key or tensor; ``notes`` are added to the report.

    Args:
        name: ``general.architecture`` of its GGUF files.
        model_types: values of ``model_type`` in ``config.json`` that select it.
        class_names: accepted entries of ``architectures`` in ``config.json``.
        kinds: kinds of its tensors.
        read_config: (``config.json``) -> config.
        shape: (config) -> the model's size.
        metadata: (folder, model's name, config, notes) -> all keys, the tokenizer's included.
        tensors: (weights, config, notes) -> tensors in GGUF order. Every tensor of the checkpoint is
            taken, known to be superfluous, or refused.
        mmproj: (folder, weights, config, model's name, type, notes) -> the vision part; None if there is
            no such part.
        implied: (keys of a GGUF) -> values that the runtime takes for keys that the file lacks.
        matrices: (keys of a GGUF, or None for a model of any size) -> the matrices that adapters can change;
            None: adapters are not supported.
    """

    name: str
    model_types: tuple[str, ...]
    class_names: tuple[str, ...]
    kinds: TensorKinds
    read_config: Callable[[Fields], Config]
    shape: Callable[[Config], ModelShape]
    metadata: Callable[[Path, str, Config, list[str]], dict[str, Value]]
    tensors: Callable[[Weights, Config, list[str]], list[SourceTensor]]
    mmproj: Callable[[Path, Weights, Config, str, str, list[str]], Mmproj] | None = None
    implied: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda keys: {}
    matrices: Callable[[Mapping[str, Any] | None], Matrices] | None = None
