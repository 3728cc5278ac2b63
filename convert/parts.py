"""A GGUF on the disk that may be split: all parts of it seen as one file."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pydiffusion import _native
from pydiffusion.convert.atomic import explaining
from pydiffusion.convert.layout import SPLIT_COUNT, SPLIT_KEYS, SPLIT_NO, SPLIT_TENSORS, sibling_paths
from pydiffusion.convert.padding import ReadBytes
from pydiffusion.convert.safetensors_files import read_exactly
from pydiffusion.errors import ConversionError


@dataclass(frozen=True)
class Parts:
    """The readers of all parts, the first one first; ``metadata`` and ``metadata_types`` are the first's, and
    what others add, without the keys of the split.
    """

    readers: list[_native.GgufFile]
    metadata: dict[str, Any]
    metadata_types: dict[str, str]

    @property
    def tensors(self) -> list[_native.TensorInfo]:
        """Of all parts in their order; offsets count in the file of each."""
        return [tensor for reader in self.readers for tensor in reader.tensors]

    @property
    def n_bytes(self) -> int:
        """Of all files."""
        return sum(reader.n_bytes for reader in self.readers)

    @property
    def paths(self) -> list[Path]:
        """Of all parts."""
        return [Path(reader.path) for reader in self.readers]

    @contextlib.contextmanager
    def opened(self) -> Iterator[list[tuple[_native.TensorInfo, ReadBytes]]]:
        """All tensors, and how to read them without the mapping."""
        with contextlib.ExitStack() as stack:
            result = []
            for reader in self.readers:
                path = Path(reader.path)
                with explaining(path, "can't be opened"):
                    file = stack.enter_context(io.FileIO(path))
                for info in reader.tensors:
                    result.append((info, partial(_read, file, path, info.offset)))
            yield result


def _read(file: io.FileIO, path: Path, offset: int, start: int, n_bytes: int) -> np.ndarray:
    return read_exactly(file, path, offset + start, n_bytes)


def open_parts(path: Path) -> Parts:
    """A GGUF, or all of a split one of which ``path`` is any part.

    ModelFormatError when one is damaged; ConversionError when one is missing, or they don't belong together.
    """
    with explaining(path, "can't be read"):
        if not path.is_file():
            raise ConversionError(f"{path}: no such file; give a GGUF")
    reader = _native.GgufFile(str(path))
    count = reader.metadata.get(SPLIT_COUNT, 1)
    if type(count) is not int or not 0 <= count <= 65535:
        raise ConversionError(f"{path}: key {SPLIT_COUNT!r} is {count!r:.60}; it should be a number of parts")
    readers = [reader] if count < 2 else _open_siblings(path, reader, count)
    metadata, types = dict(readers[0].metadata), dict(readers[0].metadata_types)
    for later in readers[1:]:
        found, found_types = later.metadata, later.metadata_types
        for key, value in found.items():
            if key not in metadata:
                metadata[key], types[key] = value, found_types[key]
            elif key not in SPLIT_KEYS and (metadata[key] != value or types[key] != found_types[key]):
                raise ConversionError(f"{later.path}: key {key!r} differs from that of {readers[0].path}")
    for key in SPLIT_KEYS if count >= 2 else ():
        metadata.pop(key, None)
        types.pop(key, None)
    return Parts(readers, metadata, types)


def _open_siblings(path: Path, given: _native.GgufFile, count: int) -> list[_native.GgufFile]:
    paths = sibling_paths(path, count)
    missing = [sibling for sibling in paths if not sibling.is_file()]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ConversionError(
            f"{missing[0]}{more}: this part of {count} is missing; all must lie in one folder"
        )
    readers = [given if sibling == path else _native.GgufFile(str(sibling)) for sibling in paths]
    for index, reader in enumerate(readers):
        found = tuple(reader.metadata.get(key) for key in (SPLIT_NO, SPLIT_COUNT))
        if found != (index, count):
            raise ConversionError(
                f"{reader.path}: says that it is part {found[0]!r} of {found[1]!r} (counted from 0; keys "
                f"{SPLIT_NO!r}, {SPLIT_COUNT!r}), its name says {index} of {count}"
            )
    names = [tensor.name for reader in readers for tensor in reader.tensors]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConversionError(f"{path}: two parts hold the tensor {twice!r}")
    total = given.metadata.get(SPLIT_TENSORS, len(names))
    if total != len(names):
        raise ConversionError(
            f"{path}: key {SPLIT_TENSORS!r} is {total!r:.60}, the parts hold {len(names)}: a part is not of "
            "this model"
        )
    return readers
