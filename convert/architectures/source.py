"""Sources of a conversion: a checkpoint folder or a GGUF, as tensors to read and metadata to write."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydiffusion._util.atomic import explaining
from pydiffusion._util.file_kinds import recognise_file
from pydiffusion.chat.template_source import TEMPLATE_KEY
from pydiffusion.convert.architectures import registry
from pydiffusion.convert.architectures.architecture import Architecture, ModelShape
from pydiffusion.convert.checkpoint import tokenizer_files
from pydiffusion.convert.checkpoint.chat_templates import (
    given_template,
    note_if_outdated,
    settle_chat_template,
)
from pydiffusion.convert.checkpoint.hub import find_checkpoint
from pydiffusion.convert.checkpoint.image_processor import IMAGE_PROCESSOR, PROCESSOR
from pydiffusion.convert.checkpoint.quantized import settings
from pydiffusion.convert.checkpoint.quantized.reader import open_weights
from pydiffusion.convert.checkpoint.quantized.settings import Quantization, read_quantization
from pydiffusion.convert.checkpoint.safetensors_files import Checkpoint
from pydiffusion.convert.checkpoint.strict_json import Fields, read_json_object
from pydiffusion.convert.checkpoint.weight_files import explain_without_config
from pydiffusion.convert.checkpoint.weights import Weights
from pydiffusion.convert.gguf.header import DEFAULT_ALIGNMENT, Value
from pydiffusion.convert.gguf.model_keys import QUANTIZATION_VERSION
from pydiffusion.convert.gguf.reader import Parts, open_parts
from pydiffusion.convert.gguf.tensor_reads import SourceTensor
from pydiffusion.convert.gguf.writer import PlannedTensor
from pydiffusion.errors import ConversionError, PyDiffusionError

if TYPE_CHECKING:
    from pydiffusion import _native

_CONFIG = "config.json"
_SMALL_FILES = (_CONFIG, "generation_config.json", *tokenizer_files.FILES, *settings.FILES)
_MAX_CONFIG = 64 << 20  # bytes


@dataclass
class Source:
    """An open source. ``metadata`` is complete except for what the recipe decides."""

    architecture: Architecture[Any]
    path: Path
    files: list[Path]
    tensors: list[SourceTensor]
    metadata: dict[str, Value]
    notes: list[str] = field(default_factory=list)
    alignment: int = DEFAULT_ALIGNMENT


@contextlib.contextmanager
def open_source(
    source: str | os.PathLike[str],
    revision: str | None = None,
    *,
    keep: str = "",
    chat_template: str | os.PathLike[str] | None = None,
) -> Iterator[Source]:
    """Open a checkpoint folder, a Hugging Face repo id, or a GGUF. ``keep``, ``chat_template``: as of
    :func:`open_folder`.
    """
    found = find_checkpoint(source, revision)
    path = found.path
    is_gguf = path.is_file() or (path.suffix == ".gguf" and not path.is_dir())  # also a missing one
    if is_gguf:
        opener = open_gguf(path, chat_template)
    else:
        opener = open_folder(path, found.name, keep=keep, chat_template=chat_template)
    with opener as opened:
        yield opened


@contextlib.contextmanager
def open_checkpoint(
    source: str | os.PathLike[str],
    revision: str | None = None,
    *,
    keep: str = "",
    chat_template: str | os.PathLike[str] | None = None,
) -> Iterator[Source]:
    """Open a checkpoint folder or a Hugging Face repo id. ``keep``, ``chat_template``: as of
    :func:`open_folder`.
    """
    found = find_checkpoint(source, revision)
    with open_folder(found.path, found.name, keep=keep, chat_template=chat_template) as opened:
        yield opened


@contextlib.contextmanager
def open_folder(
    folder: Path,
    name: str = "",
    *,
    keep: str = "",
    chat_template: str | os.PathLike[str] | None = None,
) -> Iterator[Source]:
    """Open and validate a checkpoint folder. Raises ConversionError naming the file, key or tensor.

    Args:
        name: the model's name if it differs from the folder's.
        keep: a ggml type; tensors that a quantized checkpoint has in the same codes are given in its blocks,
            all others dequantized.
        chat_template: a file, or a built-in one's name, instead of the folder's.
    """
    notes: list[str] = []
    with contextlib.ExitStack() as stack:
        with explaining(folder, "can't be read"):
            _require_folder(folder)
            architecture, config, quantization = _read_config(folder, notes)
            checkpoint = stack.enter_context(Checkpoint(folder))
            metadata = architecture.metadata(folder, name or folder.resolve().name or "model", config, notes)
            settle_chat_template(folder, metadata, chat_template, notes)
            weights = open_weights(checkpoint, quantization, notes, keep)
            tensors = architecture.tensors(weights, config, notes)
        yield Source(
            architecture=architecture,
            path=folder,
            files=[*checkpoint.files, *(folder / small for small in _SMALL_FILES)],
            tensors=tensors,
            metadata=metadata,
            notes=[*checkpoint.notes, *notes],
        )


@contextlib.contextmanager
def open_tensors(folder: Path) -> Iterator[Weights]:
    """The tensors of a checkpoint folder under its own names, dequantized. Raises as :func:`open_folder`."""
    with contextlib.ExitStack() as stack:
        with explaining(folder, "can't be read"):
            _require_folder(folder)
            quantization = _read_config(folder, [])[2]
            weights = open_weights(stack.enter_context(Checkpoint(folder)), quantization, [])
        yield weights


def _require_folder(folder: Path) -> None:
    """Raise ConversionError if there is no such folder, or no ``config.json`` in it."""
    if folder.is_file():
        raise ConversionError(_explain_file(folder))
    if not folder.is_dir():
        raise ConversionError(f"{folder}: no such folder; give a checkpoint folder with config.json in it")
    if not (folder / _CONFIG).exists():
        raise ConversionError(explain_without_config(folder))


def _explain_file(path: Path) -> str:
    if path.suffix in (".safetensors", ".json") and (path.parent / _CONFIG).is_file():
        return f"{path}: is one file of a checkpoint: give its folder, {path.parent}"
    with contextlib.suppress(PyDiffusionError):  # no GGUF, or a damaged one
        if other_kind := open_parts(path).reader.other_kind:
            return f"{path}: is {other_kind}"
    found = recognise_file(path, "text")
    more = f"; it is {found}" if found else ": give a checkpoint folder with config.json in it"
    return f"{path}: is a file, not a folder{more}"


def read_config(folder: Path, notes: list[str]) -> tuple[Architecture[Any], Any]:
    """Read ``config.json``: the architecture, and the config as its functions take it."""
    architecture, config, _ = _read_config(folder, notes)
    return architecture, config


def _read_config(folder: Path, notes: list[str]) -> tuple[Architecture[Any], Any, Quantization]:
    """As :func:`read_config`, and how the weights are quantized."""
    fields = Fields(read_json_object(folder / _CONFIG, _MAX_CONFIG), _CONFIG, notes)
    architecture = registry.of_config(fields)
    quantization = read_quantization(folder, fields, notes)
    return architecture, architecture.read_config(fields), quantization


@dataclass(frozen=True)
class MmprojSource:
    """An open vision part. ``metadata`` is complete except for ``general.file_type``; ``implied``: values
    that readers take for keys that a file lacks.
    """

    path: Path
    files: list[Path]
    tensors: list[PlannedTensor]
    metadata: dict[str, Value]
    notes: list[str]
    implied: Mapping[str, Any]


@contextlib.contextmanager
def open_mmproj(
    source: str | os.PathLike[str], type: str, revision: str | None = None
) -> Iterator[MmprojSource]:
    """Open the vision part of a checkpoint folder or a Hugging Face repo id, to be written as ``type``.

    Raises ConversionError naming the file, key or tensor; also if there is no vision part.
    """
    found = find_checkpoint(source, revision)
    folder = found.path
    notes: list[str] = []
    with contextlib.ExitStack() as stack:
        with explaining(folder, "can't be read"):
            _require_folder(folder)
            architecture, config, quantization = _read_config(folder, [])
            if architecture.mmproj is None:
                raise ConversionError(
                    f"{folder}: models of architecture {architecture.name!r} have no vision part"
                )
            checkpoint = stack.enter_context(Checkpoint(folder))
            name = found.name or folder.resolve().name or "model"
            weights = open_weights(checkpoint, quantization, notes)
            plan = architecture.mmproj(folder, weights, config, name, type, notes)
        files = [*checkpoint.files, *(folder / small for small in (_CONFIG, PROCESSOR, IMAGE_PROCESSOR))]
        yield MmprojSource(folder, files, plan.tensors, plan.metadata, notes, plan.implied)


@contextlib.contextmanager
def open_gguf(
    path: Path, chat_template: str | os.PathLike[str] | None = None, *, parts: Parts | None = None
) -> Iterator[Source]:
    """Open a GGUF, or any part of a split one; ``chat_template``: as of :func:`open_folder`. ``parts``: of
    this file, if they are open already.

    Raises ModelFormatError if it is damaged or a part is missing, ConversionError if it has another
    architecture.
    """
    if parts is None:
        parts = open_parts(path)
    if parts.reader.other_kind:
        raise ConversionError(f"{path}: is {parts.reader.other_kind}")
    architecture = registry.of_gguf(path, parts.metadata.get("general.architecture"))
    keys = {key: Value(parts.metadata_types[key], value) for key, value in parts.metadata.items()}
    keys["general.file_type"] = Value("u32", 0)
    keys["general.quantization_version"] = Value("u32", QUANTIZATION_VERSION)
    with parts.opened() as found:
        for info, _ in found:
            _check_shape(path, info, architecture)
        tensors = [SourceTensor(str(info.name), info.type, tuple(info.shape), read) for info, read in found]
        notes: list[str] = []
        if chat_template is not None:
            keys[TEMPLATE_KEY] = given_template(chat_template)
        note_if_outdated(keys, notes)
        yield Source(architecture, path, parts.paths, tensors, keys, notes, parts.reader.alignment)


def _check_shape(path: Path, info: _native.TensorInfo, architecture: Architecture[Any]) -> None:
    kind = architecture.kinds.kind(str(info.name))
    if kind not in architecture.kinds.float32 and len(info.shape) < 2:
        shape = list(info.shape)
        raise ConversionError(f"{path}: tensor {info.name!r} should be a matrix, its shape is {shape}")


def read_shape(folder: str | os.PathLike[str]) -> ModelShape:
    """The size of the model in a checkpoint folder or repo, from ``config.json``. Raises ConversionError."""
    path = find_checkpoint(folder, weights=False).path
    with explaining(path, "can't be read"):
        _require_folder(path)
    architecture, config = read_config(path, [])
    return architecture.shape(config)
