"""Repack GGUF files of any architecture: merge, split, edit metadata; weights are copied unchanged."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydiffusion._util.sampler_options import SAMPLER_OPTIONS
from pydiffusion.chat.template import ChatTemplate
from pydiffusion.chat.template_source import TEMPLATE_KEY
from pydiffusion.convert.gguf import writer
from pydiffusion.convert.gguf.header import Value
from pydiffusion.convert.gguf.reader import Parts, open_parts
from pydiffusion.convert.gguf.report import ConversionReport, ProgressCallback
from pydiffusion.convert.gguf.split import check_split_size
from pydiffusion.convert.gguf.writer import Job, PlannedTensor
from pydiffusion.errors import ConversionError, ModelFormatError, PyDiffusionError
from pydiffusion.options import GenerationOptions

_SAMPLER_KEYS = {option.key: option.gguf_type for options in SAMPLER_OPTIONS.values() for option in options}
# Types of known keys that a file may lack.
_NEW_KEYS = {
    TEMPLATE_KEY: "str",
    "general.name": "str",
    "general.description": "str",
    "general.author": "str",
    "general.license": "str",
    **_SAMPLER_KEYS,
}
# These define how the file is read and can't be edited.
_FIXED = ("general.architecture", "general.alignment", "general.quantization_version", "split.")


def repack(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    split_max_size: int | None = None,
    resume: bool = False,
    overwrite: bool = True,
    progress: ProgressCallback | None = None,
) -> ConversionReport:
    """Merge the parts of a split GGUF, or split a GGUF; weights and metadata are unchanged.

    Works for any architecture.

    Args:
        source: a GGUF, or any part of a split one.
        split_max_size: maximum bytes per part; None writes one file.

    Raises: as :func:`quantize`.
    """
    started = time.perf_counter()
    check_split_size(split_max_size)
    parts = open_parts(Path(source))
    choices = {"resume": resume, "overwrite": overwrite, "split_max_size": split_max_size}
    return _copy(parts, Path(target), _values(parts), parts.paths, progress, started, **choices)


def edit_metadata(
    file: str | os.PathLike[str],
    changes: Mapping[str, Any],
    target: str | os.PathLike[str] | None = None,
    *,
    progress: ProgressCallback | None = None,
) -> ConversionReport:
    """Set or remove metadata keys of a GGUF: chat template, sampler defaults, names.

    The new file is written beside the old one, verified, and replaces it atomically. This temporarily needs
    disk space for both.

    Args:
        file: a GGUF in one file.
        changes: keys and their new values, None to remove a key. Existing keys keep their type; a new key
            must be a chat template, a sampler default or a name, or its value a
            :class:`~pydiffusion.convert.gguf.header.Value` that gives the type.
        target: write to this file instead of replacing ``file``.

    Raises:
        ConversionError: a key that can't be changed, does not exist, or has no known type; a value that does
            not fit its type, an invalid template, sampler defaults out of range.
        Others as :func:`repack`.
    """
    started = time.perf_counter()
    path = Path(file)
    parts = open_parts(path)
    if len(parts.paths) > 1:
        raise ConversionError(f"{path}: is a split file; merge it first: pydiffusion merge {path} model.gguf")
    metadata = _values(parts)
    for key, value in changes.items():
        _change(metadata, key, value, path)
    _check_sampler(metadata, changes, path)
    replaced = path if target is None else Path(target)
    # The source may be replaced here: it stays open, so its data remains readable.
    sources = [] if target is None else parts.paths
    return _copy(parts, Path(os.path.realpath(replaced)), metadata, sources, progress, started)


def _change(metadata: dict[str, Value], key: str, value: Any, path: Path) -> None:
    if key.startswith(_FIXED):
        raise ConversionError(f"{path}: key {key!r} defines how the file is read and can't be changed")
    if value is None:
        if metadata.pop(key, None) is None:
            raise ConversionError(f"{path}: has no key {key!r} to remove")
        return
    if not isinstance(value, Value):
        type_name = metadata[key].type if key in metadata else _NEW_KEYS.get(key)
        if type_name is None:
            raise ConversionError(
                f"{path}: key {key!r} is new and of no known type; give its value as Value(type, value)"
            )
        value = Value(type_name, value)
    if value.type == "str" and not isinstance(value.value, str):
        raise ConversionError(f"{path}: key {key!r} should be a text, is {value.value!r:.60}")
    if key == TEMPLATE_KEY:
        try:
            ChatTemplate(value.value)
        except PyDiffusionError as error:
            raise ConversionError(f"{path}: {error}") from error
    metadata[key] = value


def _check_sampler(metadata: Mapping[str, Value], changes: Mapping[str, Any], path: Path) -> None:
    """Reject sampler defaults that the runtime would reject later."""
    if not any(key in _SAMPLER_KEYS for key in changes):
        return
    try:
        values = {key: value.value for key, value in metadata.items()}
        GenerationOptions().resolve(values, len(values.get("tokenizer.ggml.tokens", ())) or 1)
    except (ModelFormatError, ValueError) as error:
        raise ConversionError(f"{path}: {error}") from error


def _values(parts: Parts) -> dict[str, Value]:
    return {key: Value(parts.metadata_types[key], value) for key, value in parts.metadata.items()}


def _copy(
    parts: Parts,
    target: Path,
    metadata: dict[str, Value],
    source_files: list[Path],
    progress: ProgressCallback | None,
    started: float,
    **choices: Any,
) -> ConversionReport:
    with parts.opened() as found:
        tensors = [
            PlannedTensor(str(info.name), shape, info.type, info.type, read, shape, keeps_nonfinite=True)
            for info, read in found
            for shape in (tuple(info.shape),)
        ]
        job = Job(
            source=parts.paths[0],
            source_files=source_files,
            target=target,
            type="unchanged",
            metadata=metadata,
            tensors=tensors,
            fallbacks=[],
            notes=[],
            n_threads=1,
            overwrite=choices.pop("overwrite", True),
            progress=progress,
            alignment=parts.reader.alignment,
            **choices,
        )
        return writer.run(job, started)
