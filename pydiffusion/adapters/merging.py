"""Merge adapters into a model's float weights, matrix by matrix, while these are read."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from pydiffusion.adapters.adapter import Adapter, Factors
from pydiffusion.adapters.loading import load_adapter
from pydiffusion.convert.architectures.architecture import ModelShape
from pydiffusion.convert.architectures.source import Source
from pydiffusion.convert.checkpoint.tensor_map import split_name
from pydiffusion.convert.checkpoint.weights import RowsAsBytes
from pydiffusion.convert.gguf import rows
from pydiffusion.convert.gguf.header import Value
from pydiffusion.convert.gguf.tensor_reads import SourceTensor
from pydiffusion.errors import ConversionError
from pydiffusion.options import Lora, lora_option

# Keys of a file that adapters are merged into: one entry for each, in order.
_NAMES, _SCALES, _FINGERPRINTS = (
    f"pydiffusion.merged_lora.{what}" for what in ("names", "scales", "fingerprints")
)

_FLOATS = ("F32", "F16", "BF16")
_GATE_UP, _GATE, _UP, _DOWN = "ffn_gate_up_exps", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"
# Of these a file may have more rows, or longer ones, than the model: zeros, up to whole blocks of a type.
_PADDED_ROWS = ("ffn_gate", "ffn_up", "self_cond_gate", "self_cond_up", _GATE_UP, _GATE, _UP)
_PADDED_INPUTS = ("ffn_down", "self_cond_down", _DOWN)
# Only the decoder has these: its set is all there is.
_DECODER_ONLY = ("self_cond_gate", "self_cond_up", "self_cond_down")
# Their scale is the router's, not that of quantized weights.
_ROUTERS_SCALES = (_DOWN, "ffn_gate_inp")
# Rows, inputs and ranks of one matmul: so few that BLAS computes it on one thread; the writer has its own.
_BLOCK = 64
_MAX_HELD = 4  # matrices whose factors are in memory


def merge_into(source: Source, lora: Lora) -> None:
    """Load adapters and merge them into an open source: its tensors, notes and metadata change, and its files
    get the adapters' too.

    Raises: as :func:`merge`; AdapterError for an adapter that can't be loaded, OptionError for a scale that
    isn't finite.
    """
    adapters = _loaded(source.metadata, lora)
    if not adapters:
        return
    merged = merge(source.tensors, adapters)
    source.tensors, source.notes = merged.tensors, [*source.notes, *merged.notes]
    for adapter, _ in adapters:
        path = adapter.path
        source.files = [*source.files, *(sorted(path.iterdir()) if path.is_dir() else [path])]
    used = [MergedAdapter(a.name, scale, a.fingerprint.hex()) for a, scale in adapters if scale]
    if not used:
        return
    used = [*merged_adapters(source), *used]
    source.metadata |= {
        _NAMES: Value("array[str]", [one.name for one in used]),
        _SCALES: Value("array[f32]", [one.scale for one in used]),
        _FINGERPRINTS: Value("array[str]", [one.fingerprint for one in used]),
    }


def check_merge(shape: ModelShape, lora: Lora) -> list[str]:
    """Check that adapters can be merged into a model of this shape; returns notes. Raises as
    :func:`merge_into`.
    """
    tensors = [SourceTensor(name, "F32", sizes, _unread) for name, sizes in shape.tensors.items()]
    return merge(tensors, _loaded(shape.metadata, lora)).notes


def _unread(start: int, n_bytes: int) -> np.ndarray:
    raise NotImplementedError("a tensor of which only the shape is known")


def _loaded(metadata: Mapping[str, Value], lora: Lora) -> list[tuple[Adapter, float]]:
    keys = {key: value.value for key, value in metadata.items()}
    return [
        (given if isinstance(given, Adapter) else load_adapter(given, keys), scale)
        for given, scale in lora_option(lora)
    ]


@dataclass(frozen=True)
class MergedAdapter:
    """An adapter that was merged into a file, as its metadata tells. fingerprint: in hexadecimal digits."""

    name: str
    scale: float
    fingerprint: str

    def __str__(self) -> str:
        return f"{self.name}:{self.scale:g}"

    @property
    def what_it_does(self) -> tuple[str, float]:
        """Equal for adapters that change the same, whatever their names; the scale as a file holds it."""
        return self.fingerprint, float(np.float32(self.scale))


def merged_adapters(source: Source) -> list[MergedAdapter]:
    """The adapters that were merged into a source, in order, as far as its keys tell."""
    found = [source.metadata.get(key) for key in (_NAMES, _SCALES, _FINGERPRINTS)]
    types = [value.type if value else "" for value in found]
    if types != ["array[str]", "array[f32]", "array[str]"]:
        return []
    names, scales, fingerprints = (value.value for value in found if value)
    return [MergedAdapter(*one) for one in zip(names, scales, fingerprints, strict=False)]


@dataclass(frozen=True)
class Merged:
    """Tensors with adapters merged into them, and notes for the report."""

    tensors: list[SourceTensor]
    notes: list[str]


def merge(tensors: Sequence[SourceTensor], adapters: Sequence[tuple[Adapter, float]]) -> Merged:
    """Add the adapters' changes, times their scales, to the matrices of a model; these are then F32.

    A file has one matrix for both modes, so a change must be the same for both: one set ("both"), or the
    encoder's and the decoder's equal; of self-conditioning, which only the decoder has, any. Sets whose B is
    all zeros change nothing and count as absent. Factors are read when the tensors are, a matrix at a time.

    Raises ConversionError, naming the adapter and the tensor: a change that differs between the modes, a
    matrix that the model hasn't, another shape, weights that are quantized.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    changes: dict[str, list[_Change]] = {}
    notes = []
    for adapter, scale in adapters:
        try:
            sets = _one_set(adapter) if scale else {}
        except _TwoSets as error:
            raise ConversionError(
                f"{adapter.path}: can't be merged: it {error}, and a file has one matrix for both: convert "
                "without --lora, and give the adapter to the commands that run the model"
            ) from None
        for tensor, factors in sets.items():
            for name, change in _places(adapter, scale, tensor, factors, by_name):
                changes.setdefault(name, []).append(change)
        what = f"merged, {len(sets)} matrices changed" if sets else "left out, since it changes nothing"
        notes.append(f"adapter {adapter.name}, scale {scale:g}: {what}")
    held = _Held()
    merged = [_merged(t, changes[t.name], held) if t.name in changes else t for t in tensors]
    return Merged(merged, notes)


def why_not_mergeable(adapter: Adapter) -> str:
    """The reason why an adapter can't be merged into any model: "changes blk.0.attn_q for the decoder only";
    empty if nothing does.
    """
    try:
        _one_set(adapter)
    except _TwoSets as error:
        return str(error)
    return ""


class _TwoSets(Exception):
    """A change that isn't the same for both modes, as a phrase about the adapter."""


def _one_set(adapter: Adapter) -> dict[str, Factors]:
    """Tensor -> the set that serves both modes; tensors that aren't changed are left out. Raises _TwoSets."""
    by_tensor: dict[str, dict[str, Factors]] = {}
    for target, factors in adapter.factors.items():
        if _changes(factors):
            by_tensor.setdefault(target.tensor, {})[target.side] = factors
    found = {}
    for tensor, of_side in by_tensor.items():
        served = "both" in of_side or (tensor in _DECODER_ONLY and "decoder" in of_side)
        if not served and len(of_side) == 1:
            raise _TwoSets(f"changes {tensor} for the {next(iter(of_side))} only")
        if not served and not _equal(of_side["encoder"], of_side["decoder"]):
            raise _TwoSets(f"changes {tensor} differently for encoder and decoder")
        found[tensor] = of_side["both" if "both" in of_side else "decoder"]
    return found


def _changes(factors: Factors) -> bool:
    """Whether the change is not zero."""
    a, b = factors.read()
    return factors.scale != 0 and bool(a.any() and b.any())


def _equal(one: Factors, other: Factors) -> bool:
    if (one.shape_a, one.shape_b, one.scale) != (other.shape_a, other.shape_b, other.scale):
        return False
    return all(map(np.array_equal, one.read(), other.read()))


@dataclass(frozen=True)
class _Change:
    """A part of a matrix's change. places: (row of B, row of the matrix, number of rows) of each range."""

    adapter: Adapter
    factors: Factors
    scale: float
    places: tuple[tuple[int, int, int], ...]


def _places(
    adapter: Adapter, scale: float, tensor: str, factors: Factors, model: Mapping[str, SourceTensor]
) -> list[tuple[str, _Change]]:
    """The model's matrices that a change is of, by name, and which rows go where.

    Gate and up of experts may be one matrix in the adapter and two in the file, or the other way round.
    """
    kind, _ = split_name(tensor)
    n_rows = factors.shape_b[-2]

    def named(other: str) -> str:
        return f"{tensor.removesuffix(kind)}{other}.weight"

    def one(name: str, *places: tuple[int, int, int]) -> tuple[str, _Change]:
        _check(adapter, tensor, factors, model, model[name])
        return name, _Change(adapter, factors, scale, places)

    name, half = f"{tensor}.weight", n_rows // 2
    if name in model and kind == _GATE_UP:
        return [one(name, (0, 0, half), (half, model[name].shape[-2] // 2, half))]
    if name in model:
        return [one(name, (0, 0, n_rows))]
    if kind == _GATE_UP and named(_GATE) in model and named(_UP) in model:
        return [one(named(_GATE), (0, 0, half)), one(named(_UP), (half, 0, half))]
    if kind in (_GATE, _UP) and named(_GATE_UP) in model:
        of_gate_up = model[named(_GATE_UP)].shape[-2] // 2
        return [one(named(_GATE_UP), (0, 0 if kind == _GATE else of_gate_up, n_rows))]
    raise ConversionError(
        f"{adapter.path}: changes {tensor}, and the model has no {name}: is the adapter for another model?"
    )


def _check(
    adapter: Adapter, tensor: str, factors: Factors, model: Mapping[str, SourceTensor], base: SourceTensor
) -> None:
    """Refuse a base that is quantized or has a scale of its own, and factors of another shape."""
    if base.type not in _FLOATS:
        raise ConversionError(
            f"{adapter.path}: can't be merged into {base.name}, which is {base.type} here: merge it into "
            "float weights (F32, F16, BF16), or give the adapter to the commands that run the model"
        )
    kind, base_kind = split_name(tensor)[0], split_name(base.name)[0]
    layer = base.name.removesuffix(f"{base_kind}.weight")
    scaled = [base_kind] if base_kind not in _ROUTERS_SCALES else []
    scaled += [_GATE_UP, _GATE, _UP] if base_kind == _DOWN else []  # then the router's takes in the experts'
    with_scale = next((f"{layer}{of}.scale" for of in scaled if f"{layer}{of}.scale" in model), None)
    if with_scale is not None:
        raise ConversionError(
            f"{adapter.path}: can't be merged into {base.name}: the file has {with_scale}, as files made "
            "from NVFP4 have: merge it into the checkpoint that this file was made from"
        )
    n_rows, n_in = base.shape[-2:]
    of_b, of_a = factors.shape_b[-2], factors.shape_a[-1]
    n_rows *= (1 + (kind == _GATE_UP)) if base_kind in (_GATE, _UP) else 1
    n_rows //= 2 if base_kind == _GATE_UP and kind in (_GATE, _UP) else 1
    fits = base.shape[:-2] == factors.shape_a[:-2] == factors.shape_b[:-2]
    fits = fits and (of_b == n_rows or (of_b < n_rows and kind in _PADDED_ROWS))
    fits = fits and (of_a == n_in or (of_a < n_in and kind in _PADDED_INPUTS))
    if not fits or (kind == _GATE_UP and of_b % 2):
        raise ConversionError(
            f"{adapter.path}: changes {tensor} with A {list(factors.shape_a)} and B {list(factors.shape_b)}, "
            f"which don't fit {base.name} {list(base.shape)}: is the adapter for another model?"
        )


@dataclass
class _Held:
    """Factors of the matrices that were read last, for all threads."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    factors: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def get(self, base: SourceTensor, changes: Sequence[_Change]) -> tuple[np.ndarray, np.ndarray]:
        with self.lock:
            found = self.factors.pop(base.name, None)
            if found is None:
                found = _joined(base, changes)
                while len(self.factors) >= _MAX_HELD:
                    del self.factors[next(iter(self.factors))]
            self.factors[base.name] = found  # as the newest
            return found


def _joined(base: SourceTensor, changes: Sequence[_Change]) -> tuple[np.ndarray, np.ndarray]:
    """A and B of all changes side by side, float32: (n_matrices, r, n_in) and (n_matrices, n_rows, r), scales
    in B; n_rows and n_in filled up to whole blocks.
    """
    n_rows, n_in = base.shape[-2:]
    n_matrices = math.prod(base.shape[:-2])
    rank = sum(change.factors.rank for change in changes)
    a = np.zeros((n_matrices, rank, -(-n_in // _BLOCK) * _BLOCK), np.float32)
    b = np.zeros((n_matrices, -(-n_rows // _BLOCK) * _BLOCK, rank), np.float32)
    done = 0
    for change in changes:
        one_a, one_b = change.factors.read()
        end = done + change.factors.rank
        a[:, done:end, : one_a.shape[-1]] = one_a.reshape(n_matrices, *change.factors.shape_a[-2:])
        with np.errstate(all="ignore"):
            one_b = one_b * np.float32(change.factors.scale * change.scale)
        one_b = one_b.reshape(n_matrices, *change.factors.shape_b[-2:])
        for first, at, count in change.places:
            b[:, at : at + count, done:end] = one_b[:, first : first + count]
        done = end
    return a, b


def _merged(base: SourceTensor, changes: Sequence[_Change], held: _Held) -> SourceTensor:
    n_rows, n_in = base.shape[-2:]
    size = rows.row_bytes(base.type, n_in)

    def read(first: int, count: int) -> np.ndarray:
        data = base.read(first * size, count * size).reshape(count, size)
        result = np.array(rows.to_float32(data, base.type, n_in))
        a, b = held.get(base, changes)
        done = 0
        while done < count:  # the rows of one expert at a time
            matrix, row = divmod(first + done, n_rows)
            n = min(count - done, n_rows - row)
            change = _product(a[matrix], b[matrix], row, n)[:, :n_in]
            if not np.isfinite(change).all():
                raise ConversionError(
                    f"{', '.join(str(one.adapter.path) for one in changes)}: the change of {base.name} holds "
                    "NaN or infinite numbers: is the scale too large?"
                )
            result[done : done + n] += change
            done += n
        return result

    return replace(base, type="F32", read=RowsAsBytes(read, 4 * n_in))


def _product(a: np.ndarray, b: np.ndarray, first: int, count: int) -> np.ndarray:
    """Rows of ``b @ a``, float32 (count, n_in), in blocks of :data:`_BLOCK`.

    The blocks begin at the same rows whatever is asked for: what a row is must not depend on the rows that
    are read with it, since a file is compared with its source in other pieces than it was written in, and
    resumed in others again.
    """
    begin, end = first // _BLOCK, -(-(first + count) // _BLOCK)
    n_rows, n_in = end - begin, a.shape[1] // _BLOCK  # in blocks
    result = np.empty((n_rows * _BLOCK, a.shape[1]), np.float32)
    tiles = result.reshape(n_rows, _BLOCK, n_in, _BLOCK).transpose(0, 2, 1, 3)
    with np.errstate(all="ignore"):
        for k in range(0, len(a), _BLOCK):
            left = b[begin * _BLOCK : end * _BLOCK, k : k + _BLOCK].reshape(n_rows, 1, _BLOCK, -1)
            right = a[k : k + _BLOCK].reshape(-1, n_in, _BLOCK).transpose(1, 0, 2)
            if k == 0:
                np.matmul(left, right, out=tiles)
            else:
                tiles += np.matmul(left, right)
    return result[first - begin * _BLOCK :][:count]
