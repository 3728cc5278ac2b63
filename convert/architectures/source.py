"""What is converted: a folder or a GGUF, as a list of tensors to read and the metadata to write."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pydiffusion import _native
from pydiffusion._util.atomic import explaining
from pydiffusion.convert.architectures.diffusion_gemma import metadata, vocabulary
from pydiffusion.convert.architectures.diffusion_gemma.config import read_sampler_config, read_text_config
from pydiffusion.convert.architectures.diffusion_gemma.inventory import Inventory
from pydiffusion.convert.architectures.diffusion_gemma.metadata import ARCHITECTURE, QUANTIZATION_VERSION
from pydiffusion.convert.architectures.diffusion_gemma.tensor_names import FLOAT32_KINDS, split_name
from pydiffusion.convert.checkpoint.safetensors_files import INDEX, Checkpoint
from pydiffusion.convert.gguf.header import DEFAULT_ALIGNMENT, Value
from pydiffusion.convert.gguf.reader import open_parts
from pydiffusion.convert.gguf.tensor_reads import ReadBytes
from pydiffusion.errors import ConversionError

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
    """A tensor under its name in a GGUF, its type and shape in the source, and how to read it."""

    name: str
    type: str
    shape: tuple[int, ...]
    read: ReadBytes


@dataclass
class Source:
    """An open source. ``metadata`` is complete but for what the recipe decides."""

    path: Path
    files: list[Path]
    tensors: list[SourceTensor]
    metadata: dict[str, Value]
    notes: list[str] = field(default_factory=list)
    alignment: int = DEFAULT_ALIGNMENT


@contextlib.contextmanager
def open_source(path: Path) -> Iterator[Source]:
    """A folder or a GGUF, whichever ``path`` is."""
    with open_folder(path) if path.is_dir() else open_gguf(path) as source:
        yield source


@contextlib.contextmanager
def open_folder(folder: Path, name: str = "") -> Iterator[Source]:
    """A checkpoint folder, all of it checked. ConversionError names the file, key or tensor.

    ``name``: of the model, where it is not the folder's.
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
    """A GGUF, any part of a split one standing for all. ModelFormatError when it is damaged or a part is
    missing, ConversionError when it is of another architecture.
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
        tensors = [SourceTensor(info.name, info.type, tuple(info.shape), read) for info, read in found]
        yield Source(path, parts.paths, tensors, keys, alignment=parts.reader.alignment)


def _check_shape(path: Path, info: _native.TensorInfo) -> None:
    kind, _ = split_name(info.name)
    if kind not in FLOAT32_KINDS and len(info.shape) < 2:
        shape = list(info.shape)
        raise ConversionError(f"{path}: tensor {info.name!r} should be a matrix, its shape is {shape}")
