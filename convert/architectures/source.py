"""Sources of a conversion: a checkpoint folder or a GGUF, as tensors to read and metadata to write."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pydiffusion._util.atomic import explaining
from pydiffusion.convert.architectures.diffusion_gemma import metadata, vocabulary
from pydiffusion.convert.architectures.diffusion_gemma.config import (
    TextConfig,
    read_sampler_config,
    read_text_config,
)
from pydiffusion.convert.architectures.diffusion_gemma.inventory import Inventory
from pydiffusion.convert.architectures.diffusion_gemma.metadata import ARCHITECTURE, QUANTIZATION_VERSION
from pydiffusion.convert.architectures.diffusion_gemma.tensor_names import FLOAT32_KINDS, split_name
from pydiffusion.convert.checkpoint.hub import find_checkpoint
from pydiffusion.convert.checkpoint.safetensors_files import INDEX, Checkpoint
from pydiffusion.convert.gguf.header import DEFAULT_ALIGNMENT, Value
from pydiffusion.convert.gguf.reader import open_parts
from pydiffusion.convert.gguf.tensor_reads import ReadBytes
from pydiffusion.errors import ConversionError

if TYPE_CHECKING:
    from pydiffusion import _native

_SMALL_FILES = (
    "config.json",
    "generation_config.json",
    INDEX,
    vocabulary.TOKENIZER,
    vocabulary.CONFIG,
    vocabulary.SPECIALS,
    vocabulary.TEMPLATE,
)


@dataclass(frozen=True)
class SourceTensor:
    """A tensor: its GGUF name, its type and shape in the source, and a function to read it."""

    name: str
    type: str
    shape: tuple[int, ...]
    read: ReadBytes


@dataclass
class Source:
    """An open source. ``metadata`` is complete except for what the recipe decides."""

    path: Path
    files: list[Path]
    tensors: list[SourceTensor]
    metadata: dict[str, Value]
    notes: list[str] = field(default_factory=list)
    alignment: int = DEFAULT_ALIGNMENT


@contextlib.contextmanager
def open_source(source: str | os.PathLike[str], revision: str | None = None) -> Iterator[Source]:
    """Open a checkpoint folder, a Hugging Face repo id, or a GGUF."""
    found = find_checkpoint(source, revision)
    path = found.path
    is_gguf = path.is_file() or (path.suffix == ".gguf" and not path.is_dir())  # also a missing one
    opener = open_gguf(path) if is_gguf else open_folder(path, found.name)
    with opener as opened:
        yield opened


@contextlib.contextmanager
def open_checkpoint(source: str | os.PathLike[str], revision: str | None = None) -> Iterator[Source]:
    """Open a checkpoint folder or a Hugging Face repo id."""
    found = find_checkpoint(source, revision)
    with open_folder(found.path, found.name) as opened:
        yield opened


@contextlib.contextmanager
def open_folder(folder: Path, name: str = "") -> Iterator[Source]:
    """Open and validate a checkpoint folder. Raises ConversionError naming the file, key or tensor.

    ``name``: the model's name if it differs from the folder's.
    """
    notes: list[str] = []
    with contextlib.ExitStack() as stack:
        with explaining(folder, "can't be read"):
            if not folder.is_dir():
                raise ConversionError(
                    f"{folder}: no such folder; give a checkpoint folder with config.json in it"
                )
            config = read_text_config(folder, notes)
            sampler = read_sampler_config(folder, config, notes)
            checkpoint = stack.enter_context(Checkpoint(folder))
            inventory = Inventory(checkpoint, config)
            planned = inventory.plan(notes)
            tokenizer = vocabulary.read_tokenizer(folder, config, sampler.eos_token_ids, notes)
            inventory.compare_tied()
        keys = metadata.model_metadata(name or folder.resolve().name or "model", config, sampler, 0)
        yield Source(
            path=folder,
            files=[*checkpoint.files, *(folder / small for small in _SMALL_FILES)],
            tensors=[SourceTensor(*entry) for entry in planned],
            metadata=keys | tokenizer,
            notes=notes,
        )


@contextlib.contextmanager
def open_gguf(path: Path) -> Iterator[Source]:
    """Open a GGUF, or any part of a split one. Raises ModelFormatError if it is damaged or a part is missing,
    ConversionError if it has another architecture.
    """
    parts = open_parts(path)
    architecture = parts.metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise ConversionError(
            f"{path}: key 'general.architecture' is {architecture!r:.60}; only {ARCHITECTURE!r} is supported"
        )
    keys = {key: Value(parts.metadata_types[key], value) for key, value in parts.metadata.items()}
    keys["general.file_type"] = Value("u32", 0)
    keys["general.quantization_version"] = Value("u32", QUANTIZATION_VERSION)
    with parts.opened() as found:
        for info, _ in found:
            _check_shape(path, info)
        tensors = [SourceTensor(str(info.name), info.type, tuple(info.shape), read) for info, read in found]
        yield Source(path, parts.paths, tensors, keys, alignment=parts.reader.alignment)


def _check_shape(path: Path, info: _native.TensorInfo) -> None:
    kind, _ = split_name(str(info.name))
    if kind not in FLOAT32_KINDS and len(info.shape) < 2:
        shape = list(info.shape)
        raise ConversionError(f"{path}: tensor {info.name!r} should be a matrix, its shape is {shape}")


def read_config(folder: str | os.PathLike[str]) -> TextConfig:
    """Read the text config of a checkpoint folder or repo. Raises ConversionError."""
    path = find_checkpoint(folder, weights=False).path
    if not (path / "config.json").is_file():
        raise ConversionError(f"{path}: has no config.json; give a checkpoint folder")
    return read_text_config(path, [])
