"""Importance matrix (imatrix) files: llama.cpp's GGUF format, and its older one (``.dat``), read only.

For a matrix ``NAME`` a GGUF has ``NAME.in_sum2``, the sum of squared activations per column, and
``NAME.counts``, the number of activation rows; expert tensors have one row of each per expert. The older
format has one count for all experts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pydiffusion import _native
from pydiffusion._util import atomic
from pydiffusion._util.atomic import explaining
from pydiffusion._util.files import check_is_gguf
from pydiffusion.convert.gguf.header import DEFAULT_ALIGNMENT, Placed, Value, align, pack_header
from pydiffusion.convert.quantization.legacy_imatrix import is_legacy, read_legacy
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

    def per_matrix(self, n_matrices: int, n_columns: int) -> Entry:
        """This entry with a row for each of ``n_matrices`` experts of at least ``n_columns`` columns, if it
        has those of all experts in one row, with one count: as in the older format, and in GGUFs converted
        from it. There a row of ones, after division by the count, stands for an expert that nothing reached.
        """
        n_values = self.in_sum2.shape[1]
        is_joined = len(self.counts) == 1 < n_matrices and n_values % n_matrices == 0
        if not is_joined or n_values // n_matrices < n_columns:
            return self
        rows = self.in_sum2.reshape(n_matrices, -1).copy()
        counts = np.repeat(self.counts, n_matrices)
        unreached = (rows == self.counts).all(axis=1)
        rows[unreached] = counts[unreached] = 0
        return Entry(rows, counts)


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
        n_columns, n_matrices = shape[-1], int(np.prod(shape[:-2]))
        entry = entry.per_matrix(n_matrices, n_columns)
        sums, counts = entry.in_sum2.astype(np.float64), entry.counts.astype(np.float64)
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
    """Read an imatrix, a GGUF or of the older format (``.dat``).

    Raises ModelFormatError if it is damaged or not an imatrix, ConversionError if it can't be read.
    """
    path = Path(path)
    if not path.is_file():
        raise ConversionError(f"{path}: no such file; make an imatrix with `pydiffusion imatrix`")
    with explaining(path, "can't be read"):
        if is_legacy(path):
            return _from_legacy(path)
        check_is_gguf(path)
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


def _from_legacy(path: Path) -> Imatrix:
    """An imatrix of the older format: the entries as in a GGUF converted from it, for any chunk size."""
    legacy = read_legacy(path)
    entries = {
        # Nothing was counted: what it has counts as it is, as in llama.cpp.
        name: Entry(values.reshape(1, -1), np.array([max(n_calls, 1)], np.float32))
        for name, (n_calls, values) in legacy.entries.items()
    }
    return Imatrix(path, entries, legacy.datasets, legacy.chunk_count, 0)


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
