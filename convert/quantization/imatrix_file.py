"""Importance matrix (imatrix) files in llama.cpp's GGUF format.

For a matrix ``NAME`` the file has ``NAME.in_sum2``, the sum of squared activations per column, and
``NAME.counts``, the number of activation rows; expert tensors have one row of each per expert.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pydiffusion import _native
from pydiffusion._util import atomic
from pydiffusion.convert.gguf.header import DEFAULT_ALIGNMENT, Placed, Value, align, pack_header
from pydiffusion.errors import ConversionError, ModelFormatError

_SUMS, _COUNTS = ".in_sum2", ".counts"
# Minimum importance relative to the mean, for unreached columns and padding: quantizers divide by sums of
# importances.
_FLOOR = 1e-6
# Gate and up have the same input, fused in one matrix or not.
_SAME_INPUT = {
    "ffn_gate_up_exps": ("ffn_gate_exps", "ffn_up_exps"),
    "ffn_gate_exps": ("ffn_gate_up_exps",),
    "ffn_up_exps": ("ffn_gate_up_exps",),
}


@dataclass(frozen=True)
class Entry:
    """``in_sum2``: (n_matrices, n_columns) float32; ``counts``: (n_matrices,) float32."""

    in_sum2: np.ndarray
    counts: np.ndarray

    @property
    def unreached(self) -> list[int]:
        """Matrices (experts) without activations."""
        return np.flatnonzero(self.counts == 0).tolist()


@dataclass(frozen=True)
class Imatrix:
    """Importance matrix of a model. ``datasets``: names of the texts it was collected from."""

    path: Path
    entries: Mapping[str, Entry]
    datasets: tuple[str, ...]
    chunk_count: int
    chunk_size: int

    def importance(
        self, name: str, shape: tuple[int, ...], n_per_row: int, notes: list[str]
    ) -> np.ndarray | None:
        """Importance of the columns of a tensor: (n_matrices, n_per_row) float32, or None without an entry.

        ``shape``: the tensor's shape in the source; ``n_per_row``: its padded row length. Experts without
        activations get the average of the others, with a note. Raises ConversionError if the entry's shape
        does not match.
        """
        entry = self._find(name)
        if entry is None or len(shape) < 2:
            return None
        sums, counts = entry.in_sum2.astype(np.float64), entry.counts.astype(np.float64)
        n_columns, n_matrices = shape[-1], int(np.prod(shape[:-2]))
        if len(sums) not in (1, n_matrices) or sums.shape[1] < n_columns or sums[:, n_columns:].any():
            raise ConversionError(
                f"{self.path}: the entry for {name} is {len(sums)} x {sums.shape[1]}, the tensor "
                f"{n_matrices} x {n_columns}; was it collected for another model?"
            )
        total = counts.sum()
        if total == 0:
            notes.append(f"{name}: the imatrix entry has no activations; quantized without it")
            return None
        means = sums[:, :n_columns] / np.maximum(counts, 1)[:, None]
        if entry.unreached:
            means[entry.unreached] = sums[:, :n_columns].sum(axis=0) / total
            notes.append(
                f"{name}: the imatrix has no activations for {len(entry.unreached)} of {len(counts)} experts;"
                " they get the average of the others"
            )
        floor = _FLOOR * means.mean(axis=1, keepdims=True)
        result = np.repeat(np.where(floor > 0, floor, 1.0), n_per_row, axis=1)
        result[:, :n_columns] = np.maximum(means, result[:, :n_columns])
        return np.ascontiguousarray(np.broadcast_to(result, (n_matrices, n_per_row)), np.float32)

    def _find(self, name: str) -> Entry | None:
        front, _, rest = name.rpartition(".weight")[0].rpartition(".")
        for kind in (rest, *_SAME_INPUT.get(rest, ())):
            entry = self.entries.get(f"{front}.{kind}.weight" if front else f"{kind}.weight")
            if entry is not None:
                return entry
        return None


def read_imatrix(path: str | os.PathLike[str]) -> Imatrix:
    """Read an imatrix GGUF. Raises ModelFormatError if it is damaged or not an imatrix."""
    path = Path(path)
    if not path.is_file():
        raise ConversionError(f"{path}: no such file; make an imatrix with `pydiffusion imatrix`")
    reader = _native.GgufFile(str(path))
    metadata = reader.metadata
    kind = metadata.get("general.type")
    if kind != "imatrix":
        raise ModelFormatError(f"{path}: key 'general.type' is {kind!r:.60}; an imatrix has 'imatrix'")
    tensors = {}
    for info in reader.tensors:
        if info.type != "F32":
            raise ModelFormatError(f"{path}: tensor {info.name!r} is {info.type}; an imatrix has F32 only")
        values = reader.tensor_bytes(info.name).view(np.float32).copy()
        if not (np.isfinite(values).all() and (values >= 0).all()):
            raise ModelFormatError(f"{path}: tensor {info.name!r} has negative or non-finite values")
        tensors[info.name] = values
    entries = {}
    for name, sums in tensors.items():
        if not name.endswith(_SUMS):
            continue
        base = name.removesuffix(_SUMS)
        counts = tensors.get(base + _COUNTS)
        if counts is None or not len(counts) or len(sums) % len(counts):
            raise ModelFormatError(f"{path}: {base + _COUNTS!r} is missing or does not suit {name!r}")
        entries[base] = Entry(sums.reshape(len(counts), -1), counts)
    datasets = metadata.get("imatrix.datasets", [])
    return Imatrix(
        path,
        entries,
        tuple(datasets) if isinstance(datasets, list) else (),
        _count(path, metadata, "imatrix.chunk_count"),
        _count(path, metadata, "imatrix.chunk_size"),
    )


def _count(path: Path, metadata: Mapping[str, object], key: str) -> int:
    value = metadata.get(key, 0)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ModelFormatError(f"{path}: key {key!r} is {value!r:.60}; it must be a count")
    return value


def write_imatrix(
    target: str | os.PathLike[str],
    entries: Mapping[str, Entry],
    datasets: Sequence[str],
    chunk_count: int,
    chunk_size: int,
) -> None:
    """Write an imatrix GGUF atomically. Raises ConversionError if that fails."""
    resolved = atomic.resolve_target(Path(target), [], overwrite=True)
    arrays: dict[str, np.ndarray] = {}
    for name, entry in sorted(entries.items()):
        arrays[name + _SUMS] = entry.in_sum2
        arrays[name + _COUNTS] = entry.counts.reshape(-1, 1)
    placed, offset = [], 0
    for name, values in arrays.items():
        placed.append(Placed(name, "F32", values.shape, offset, values.nbytes))
        offset = align(offset + values.nbytes, DEFAULT_ALIGNMENT)
    metadata = {
        "general.type": Value("str", "imatrix"),
        "imatrix.datasets": Value("array[str]", list(datasets)),
        "imatrix.chunk_count": Value("u32", chunk_count),
        "imatrix.chunk_size": Value("u32", chunk_size),
    }
    with atomic.replacing(resolved) as new:
        new.write(pack_header(metadata, placed, DEFAULT_ALIGNMENT))
        for place, values in zip(placed, arrays.values(), strict=True):
            new.write(np.ascontiguousarray(values, np.float32).tobytes())
            new.write(bytes(align(place.n_bytes, DEFAULT_ALIGNMENT) - place.n_bytes))
