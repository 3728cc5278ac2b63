"""Read a GGUF file, or all parts of a split one as a single file."""

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
from pydiffusion._util.atomic import explaining
from pydiffusion._util.files import check_is_gguf
from pydiffusion.convert.gguf.split import SPLIT_COUNT, SPLIT_NO, part_path
from pydiffusion.convert.gguf.tensor_reads import ReadBytes, read_exactly
from pydiffusion.errors import ConversionError


@dataclass(frozen=True)
class Parts:
    """The native reader with a cached copy of its metadata, which the reader rebuilds at each access."""

    reader: _native.GgufFile
    metadata: dict[str, Any]
    metadata_types: dict[str, str]
    tensors: list[_native.TensorInfo]

    @property
    def paths(self) -> list[Path]:
        """Paths of all parts, in order."""
        return [Path(path) for path in self.reader.paths]

    @property
    def is_mmproj(self) -> bool:
        """Whether it is the vision part of a model."""
        keys = self.metadata
        return keys.get("general.type") == "mmproj" or keys.get("general.architecture") == "clip"

    @contextlib.contextmanager
    def opened(self) -> Iterator[list[tuple[_native.TensorInfo, ReadBytes]]]:
        """All tensors, each with a function that reads it without mmap."""
        paths = self.paths
        with contextlib.ExitStack() as stack:
            files = []
            for path in paths:
                with explaining(path, "can't be opened"):
                    files.append(stack.enter_context(io.FileIO(path)))
            yield [
                (info, partial(_read, files[info.part], paths[info.part], info.offset))
                for info in self.tensors
            ]


def _read(file: io.FileIO, path: Path, offset: int, start: int, n_bytes: int) -> np.ndarray:
    return read_exactly(file, path, offset + start, n_bytes)


def open_parts(path: Path) -> Parts:
    """Open a GGUF, or all parts of a split one, given any of them.

    Raises ModelFormatError if a part is damaged or missing, or the parts don't belong together.
    """
    with explaining(path, "can't be read"):
        if path.is_dir():
            raise ConversionError(f"{path}: is a folder; give a GGUF, or make one with `pydiffusion convert`")
        if not path.is_file():
            raise ConversionError(f"{path}: no such file; give a GGUF")
        check_is_gguf(path)
    keys = _native.GgufFile(str(path)).metadata
    count, number = keys.get(SPLIT_COUNT), keys.get(SPLIT_NO)
    if type(count) is int and type(number) is int and 0 < number < count:
        first = part_path(path, 0, count)
        path = first if first.is_file() else path
    whole = _native.GgufFile.open_all_parts(str(path))
    return Parts(whole, whole.metadata, whole.metadata_types, whole.tensors)
