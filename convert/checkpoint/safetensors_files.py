"""Read the tensors of a checkpoint folder, one or several safetensors files, in chunks.

Headers are fully validated before use. Data is read with plain reads, not mmap: a file that shrinks meanwhile
gives an error instead of a SIGBUS, and cached pages don't count as resident memory.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeGuard

import numpy as np

from pydiffusion._util.file_kinds import recognise_file
from pydiffusion.convert.checkpoint.strict_json import parse_json_object
from pydiffusion.convert.checkpoint.weight_files import WeightFiles, find_weights, unread_weights
from pydiffusion.convert.gguf.tensor_reads import read_exactly
from pydiffusion.errors import ConversionError

_MAX_HEADER = 100_000_000  # the format's own limit
_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2,
    "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """A stored tensor; ``offset`` is from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    n_bytes: int


class Checkpoint:
    """All tensors of a folder by name; a context manager that closes the files.

    ``files``: the weights, then their index if there is one. ``notes``: what was left out, for the report.
    ``found``: its files, where they are not those of a model.
    """

    def __init__(self, folder: Path, found: WeightFiles | None = None):
        self.files: list[Path] = []
        self.tensors: dict[str, StoredTensor] = {}
        self.notes: list[str] = []
        self._open: dict[Path, io.FileIO] = {}
        try:
            found = find_weights(folder) if found is None else found
            for path in found.paths:
                self._add(path, found)
            _require_listed(found, self.tensors)
        except BaseException:
            self.close()
            raise
        self.notes += [
            f"{name}: not read, since there are safetensors files too" for name in unread_weights(folder)
        ]
        if found.index is not None:
            self.files.append(found.index)

    def _add(self, path: Path, found: WeightFiles) -> None:
        for name, tensor in self._open_file(path).items():
            if found.index is not None and found.shard_of.get(name) != path.name:
                raise ConversionError(
                    f"{path.name}: contains {name!r}, which {found.index.name} does not list there"
                )
            if name in self.tensors:
                raise ConversionError(
                    f"{path}: contains {name!r}, which {self.tensors[name].file.name} contains too"
                )
            self.tensors[name] = tensor

    def _open_file(self, path: Path) -> dict[str, StoredTensor]:
        try:
            file = io.FileIO(path)
            self._open[path] = file
            self.files.append(path)
            size = file.seek(0, io.SEEK_END)
        except OSError as error:
            raise ConversionError(f"{path}: can't be opened: {error.strerror or error}") from error
        found = recognise_file(path, "safetensors")
        if found is not None:
            raise ConversionError(f"{path}: not a safetensors file; it is {found}")
        length = int.from_bytes(self._read(path, 0, 8, size).tobytes(), "little")
        if length > min(_MAX_HEADER, size - 8):
            raise ConversionError(
                f"{path}: not a safetensors file, or truncated: its header claims {length} bytes"
            )
        header = parse_json_object(self._read(path, 8, length, size).tobytes(), f"{path}: header")
        header.pop("__metadata__", None)
        tensors = {name: _parse_entry(name, entry, path, 8 + length, size) for name, entry in header.items()}
        end = 8 + length
        for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.n_bytes)):
            if tensor.offset != end:
                problem = "overlaps the one before" if tensor.offset < end else "leaves a hole before it"
                raise ConversionError(f"{path}: tensor {tensor.name!r} {problem}: the file is damaged")
            end += tensor.n_bytes
        if end != size:
            raise ConversionError(f"{path}: {size - end} bytes belong to no tensor: the file is damaged")
        return tensors

    def read(self, tensor: StoredTensor, start: int, n_bytes: int) -> np.ndarray:
        """Read ``n_bytes`` bytes of the tensor from byte ``start``: (n_bytes,) uint8."""
        return self._read(tensor.file, tensor.offset + start, n_bytes, None)

    def _read(self, path: Path, offset: int, n_bytes: int, size: int | None) -> np.ndarray:
        if size is not None and offset + n_bytes > size:
            raise ConversionError(f"{path}: truncated: {size} bytes are too few for a safetensors file")
        return read_exactly(self._open[path], path, offset, n_bytes)

    def close(self) -> None:
        """Close all files."""
        for file in self._open.values():
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _require_listed(found: WeightFiles, tensors: dict[str, StoredTensor]) -> None:
    """Raise ConversionError if the index lists a tensor that its file does not contain."""
    missing = sorted(set(found.shard_of) - set(tensors))
    if found.index is not None and missing:
        shard = found.shard_of[missing[0]]
        raise ConversionError(
            f"{found.index.name}: lists {missing[0]!r} in {shard}, which does not contain it"
        )


def _parse_entry(name: str, entry: object, path: Path, start: int, size: int) -> StoredTensor:
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict):
        raise ConversionError(f"{where}: its header entry is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise ConversionError(f"{where}: unknown dtype {dtype!r:.60}")
    if not _are_counts(shape) or len(shape) > 8:
        raise ConversionError(f"{where}: bad shape {shape!r:.60}")
    if not _are_counts(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= size - start:
        raise ConversionError(
            f"{where}: its data_offsets {offsets!r:.60} are not within the file: it is truncated; "
            "download it again"
        )
    n_bytes = offsets[1] - offsets[0]
    if n_bytes != math.prod(shape) * _SIZES[dtype]:
        raise ConversionError(f"{where}: {n_bytes} bytes don't match a shape of {shape} in {dtype}")
    return StoredTensor(name, dtype, tuple(shape), path, start + offsets[0], n_bytes)


def _are_counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)
