"""Tensors of adapter files, read when they are needed, and the adapter that is made of them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pydiffusion._util.log import logger
from pydiffusion.adapters.adapter import Adapter, Factors, Target
from pydiffusion.convert.architectures.architecture import Matrices
from pydiffusion.convert.gguf import rows
from pydiffusion.convert.gguf.tensor_reads import read_exactly
from pydiffusion.errors import (
    AdapterError,
    ConversionError,
    InsufficientMemoryError,
    ModelFormatError,
    UnsupportedModelError,
)

#: Types that factors may be stored in, of safetensors.
FLOATS = ("F32", "F16", "BF16")
_MAX_RANK = 1 << 16
_MAX_SCALE = 1e30
_PIECE = 16 << 20  # bytes
# Words of a float type, and their bits but for the sign.
_BITS: dict[str, tuple[np.dtype[Any], int]] = {
    "F32": (np.dtype("<u4"), 0x7FFFFFFF),
    "F16": (np.dtype("<u2"), 0x7FFF),
    "BF16": (np.dtype("<u2"), 0x7FFF),
}


@contextlib.contextmanager
def adapter_errors(path: Path) -> Iterator[None]:
    """Turn errors of readers that models' files share into AdapterError."""
    try:
        yield
    except (ConversionError, ModelFormatError, UnsupportedModelError) as error:
        raise AdapterError(str(error)) from error
    except OSError as error:
        raise AdapterError(f"{path}: can't be read: {error.strerror or error}") from error


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, in C order. key: its name there. stamp: what :func:`stamp` said of the file."""

    key: str
    path: Path
    offset: int
    n_bytes: int
    dtype: str
    shape: tuple[int, ...]
    stamp: tuple[int, ...]

    def read(self) -> np.ndarray:
        """Its values, float32. Raises AdapterError if the file has changed since it was opened."""
        try:
            data = self._bytes(0, self.n_bytes)
            n_rows = math.prod(self.shape[:-1])
            return rows.to_float32(data.reshape(n_rows, -1), self.dtype, self.shape[-1]).reshape(self.shape)
        except MemoryError as error:
            raise InsufficientMemoryError(
                f"{self.path}: out of memory: failed to allocate {self.n_bytes / 1e6:.1f} MB for tensor "
                f"{self.key!r:.300}"
            ) from error

    def is_zero(self) -> bool:
        """Whether all of its values are zero, of either sign; read in pieces."""
        pieces = range(0, self.n_bytes, _PIECE)
        dtype, without_sign = _BITS.get(self.dtype.upper(), (np.dtype("u1"), 0xFF))
        return not any(
            (self._bytes(start, min(_PIECE, self.n_bytes - start)).view(dtype) & without_sign).any()
            for start in pieces
        )

    def _bytes(self, start: int, n_bytes: int) -> np.ndarray:
        with adapter_errors(self.path), io.FileIO(self.path) as file:
            if stamp(self.path) != self.stamp:
                raise AdapterError(
                    f"{self.path}: has changed since the adapter was loaded: load the adapter again"
                )
            return read_exactly(file, self.path, self.offset + start, n_bytes)


def stamp(path: Path) -> tuple[int, ...]:
    """Size, time of the last change and number of a file, by which a replaced one is told."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


@dataclass(frozen=True)
class Change:
    """One matrix that an adapter changes. keys: of A and B in the file ``path``, for messages."""

    target: Target
    factors: Factors
    keys: tuple[str, str]
    path: Path

    def error(self, what: str, i_key: int = 0) -> AdapterError:
        """An error that names the file and a tensor."""
        return tensor_error(self.path, self.keys[i_key], what)


def tensor_error(path: Path, key: str, what: str) -> AdapterError:
    """An error that names the file and the tensor."""
    return AdapterError(f"{path}: tensor {key!r:.300}: {what}")


@dataclass(frozen=True)
class PairRead:
    """Reads A and B, and gives them the shapes that :class:`Factors` says.

    turn_a, turn_b: from the stored arrays to (r, n_in) and (n_out, r), of experts with a dimension before.
    """

    a: Stored
    b: Stored
    turn_a: Callable[[np.ndarray], np.ndarray] = np.asarray
    turn_b: Callable[[np.ndarray], np.ndarray] = np.asarray

    def __call__(self) -> tuple[np.ndarray, np.ndarray]:
        a, b = self.turn_a(self.a.read()), self.turn_b(self.b.read())
        return np.ascontiguousarray(a), np.ascontiguousarray(b)


def has_no_effect(a: Stored, b: Stored) -> bool:
    """Whether one of a pair is all zero, as one that was never trained."""
    return b.is_zero() or a.is_zero()


def check_fits(change: Change, matrices: Matrices) -> None:
    """Raise AdapterError unless the factors fit each other and the model's matrix."""
    target, (a, b) = change.target, (change.factors.shape_a, change.factors.shape_b)
    matrix = matrices.matrix(target.tensor)
    if matrix is None:
        why = matrices.missing(target.tensor) or "the model has no such matrix that an adapter can change"
        raise change.error(f"{why}: is the adapter for another model?")
    if not matrices.is_used(target.tensor, target.side):
        raise change.error(f"{target.tensor} is not used in the {target.side}: only the decoder has it")
    n_dims = 3 if matrix.of_experts else 2
    if len(a) != n_dims or len(b) != n_dims:
        raise change.error(f"has {len(a)} dimensions, its partner {len(b)}; both should have {n_dims}")
    if 0 in a or 0 in b:
        raise change.error(f"is empty ({_text(a)}, its partner {_text(b)}); save the adapter again")
    if a[-2] != b[-1] or a[:-2] != b[:-2]:
        raise change.error(f"is {_text(a)} and its partner {_text(b)}: their ranks differ")
    if a[-2] > _MAX_RANK:
        raise change.error(f"is of rank {a[-2]}; at most {_MAX_RANK} is supported: train with a lower one")
    found = (*a[:-2], b[-2], a[-1])
    if not matrix.fits(found):
        raise change.error(
            f"changes a matrix of {_text(found)}, where {target.tensor} of the model is "
            f"{_text(matrix.shape or ())}: the adapter is for a model of another size"
        )


def _text(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def make_adapter(
    name: str,
    path: Path,
    changes: Iterable[Change],
    matrices: Matrices,
    metadata: Mapping[str, Any],
    notes: Sequence[str],
) -> Adapter:
    """Check all changes, read each once, and make an adapter of them. Sets of both modes that are the same
    become one for both.

    Raises AdapterError, naming the tensor: factors that don't fit, that are not finite, or that change a
    matrix twice.
    """
    by_target: dict[Target, Change] = {}
    for change in changes:
        check_fits(change, matrices)
        other = by_target.setdefault(change.target, change)
        if other is not change:
            raise change.error(f"changes {change.target}, which {other.keys[0]!r:.300} changes too")
    if not by_target:
        raise AdapterError(f"{path}: changes nothing of the model{_because(notes)}")
    _require_sides(by_target)
    read = {target: _read(by_target[target]) for target in sorted(by_target, key=_order)}
    one = {target: _one_for_both(target, read) for target in read}
    factors = {one[target]: by_target[target].factors for target in read}
    digests = {one[target]: digest for target, digest in read.items()}
    fingerprint = hashlib.sha256()
    for target, digest in digests.items():
        fingerprint.update(f"{target.tensor} {target.side} ".encode() + digest)
    notes = [*notes, *([] if any(read.values()) else ["all of its changes are zero: it was not trained"])]
    for note in notes:
        logger.warning("adapter %s: %s", name, note)
    return Adapter(name, path, factors, fingerprint.digest(), {**metadata, "notes": tuple(notes)})


def _because(notes: Sequence[str]) -> str:
    return f": {'; '.join(notes)}"[:500] if notes else ": save it again after training"


def _require_sides(by_target: Mapping[Target, Change]) -> None:
    """Raise AdapterError for a tensor with a set for both modes beside one for a single mode."""
    for target, change in by_target.items():
        for side in ("encoder", "decoder"):
            other = by_target.get(Target(target.tensor, side)) if target.side == "both" else None
            if other is not None:
                raise change.error(
                    f"is one set for both modes, but {other.keys[0]!r:.300} is the {side}'s own: keep one"
                )


def _order(target: Target) -> tuple[int, str, str]:
    layer = re.match(r"blk\.(\d+)\.", target.tensor)
    return (int(layer[1]) if layer else -1), target.tensor, target.side


def _one_for_both(target: Target, read: Mapping[Target, bytes]) -> Target:
    """The target itself, or that of one set for both modes where the modes' own sets are the same."""
    sides = [read.get(Target(target.tensor, side)) for side in ("encoder", "decoder")]
    return Target(target.tensor, "both") if sides[0] == sides[1] is not None else target


def _read(change: Change) -> bytes:
    """Read and check a change; returns the digest of what the runtime takes, (A, scale * B), or nothing if it
    is zero.
    """
    factors = change.factors
    if not math.isfinite(factors.scale) or abs(factors.scale) > _MAX_SCALE:
        raise change.error(f"is scaled by {factors.scale:g}, of which nothing can be computed")
    a, b = factors.read()
    for i_key, values in enumerate((a, b)):
        if not np.isfinite(values).all():
            raise change.error("has values that are not finite (NaN or infinity): the training failed", i_key)
    with np.errstate(over="ignore"):
        b = b * np.float32(factors.scale)
    if not np.isfinite(b).all():
        raise change.error(f"scaled by {factors.scale:g} is more than a float32 holds", 1)
    if not (a.any() and b.any()):
        return b""
    digest = hashlib.sha256(f"{a.shape} {b.shape} ".encode())
    for values in (a, b):
        digest.update(values.astype("<f4", copy=False).data)
    return digest.digest()
