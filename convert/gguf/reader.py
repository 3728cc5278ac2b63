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
from pydiffusion._util.atomic import explaining
from pydiffusion.convert.gguf.split import SPLIT_COUNT, SPLIT_NO, part_path
from pydiffusion.convert.gguf.tensor_reads import ReadBytes, read_exactly
from pydiffusion.errors import ConversionError


@dataclass(frozen=True)
class Parts:
    """The native reader, and of its metadata one copy: the reader makes it anew at each access."""

    reader: _native.GgufFile
    metadata: dict[str, Any]
    metadata_types: dict[str, str]
    tensors: list[_native.TensorInfo]

    @property
    def paths(self) -> list[Path]:
        """Of all parts, in their order."""
        return [Path(path) for path in self.reader.paths]

    @contextlib.contextmanager
    def opened(self) -> Iterator[list[tuple[_native.TensorInfo, ReadBytes]]]:
        """All tensors, and how to read them without the mapping."""
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
    """A GGUF, or all of a split one of which ``path`` is any part.

    ModelFormatError when one is damaged or missing, or they don't belong together.
    """
    with explaining(path, "can't be read"):
        if not path.is_file():
            raise ConversionError(f"{path}: no such file; give a GGUF")
    keys = _native.GgufFile(str(path)).metadata
    count, number = keys.get(SPLIT_COUNT), keys.get(SPLIT_NO)
    if type(count) is int and type(number) is int and 0 < number < count:
        first = part_path(path, 0, count)
        path = first if first.is_file() else path
    whole = _native.GgufFile.open_all_parts(str(path))
    return Parts(whole, whole.metadata, whole.metadata_types, whole.tensors)
