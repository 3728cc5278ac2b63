"""An architecture, to the converter; :mod:`~pydiffusion.convert.architectures.registry` lists them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydiffusion.convert.checkpoint.strict_json import Fields
from pydiffusion.convert.checkpoint.tensor_map import TensorKinds
from pydiffusion.convert.checkpoint.weights import Weights
from pydiffusion.convert.gguf.header import Value
from pydiffusion.convert.gguf.tensor_reads import SourceTensor
from pydiffusion.convert.gguf.writer import PlannedTensor

Config = TypeVar("Config")


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
