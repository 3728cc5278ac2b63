"""``verify``: compare a GGUF with its source, tensor by tensor."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pydiffusion.adapters.merging import merge_into, merged_adapters
from pydiffusion.convert.architectures.source import Source, open_gguf, open_mmproj, open_source
from pydiffusion.convert.conversion import KEPT, planned_tensor
from pydiffusion.convert.gguf import rows, writer
from pydiffusion.convert.gguf.header import Value
from pydiffusion.convert.gguf.reader import Parts, open_parts
from pydiffusion.convert.gguf.report import ConversionProgress
from pydiffusion.convert.gguf.tensor_reads import SourceTensor
from pydiffusion.convert.gguf.writer import PlannedTensor
from pydiffusion.convert.quantization import type_plan
from pydiffusion.convert.quantization.stored_scales import as_stored
from pydiffusion.errors import ConversionError
from pydiffusion.options import Lora


@dataclass(frozen=True)
class TensorCheck:
    """Comparison of a tensor. ``rmse`` covers the source's weights only, not padding."""

    name: str
    type: str
    source_type: str
    n_weights: int
    rmse: float
    relative_error: float  # root of the sum of squared differences, relative to that of the weights
    cosine: float
    problem: str = ""


@dataclass(frozen=True)
class VerifyReport:
    """Comparison of all tensors and the metadata. Empty ``problems``: the file matches its source."""

    file: Path
    against: Path | None
    tensors: list[TensorCheck]
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """All fields, paths as strings: ready for ``json.dumps``."""
        paths = {"file": str(self.file), "against": None if self.against is None else str(self.against)}
        return dataclasses.asdict(self) | paths


def verify(
    file: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    *,
    lora: Lora = (),
    progress: Callable[[ConversionProgress], None] | None = None,
) -> VerifyReport:
    """Read every tensor of a GGUF and compare it with its source: a folder, repo or GGUF; of an ``mmproj``
    file, a folder or repo.

    Of a split file, give any part. Without ``against``, check only that the file is complete and all weights
    are finite. Where only the file has scales beside its matrices, matrices are compared with the source's
    divided by them. Padding is allowed: padding must be zeros if the type can represent zeros. Mismatches are
    listed in the report's ``problems``, not raised.

    Args:
        lora: adapters that were merged into the file, as of :func:`pydiffusion.convert.convert`.

    Raises:
        ModelFormatError: a GGUF is damaged.
        ConversionError: file or source can't be read, or is of another architecture; an adapter can't be
            merged.
        AdapterError: an adapter can't be read, or is not for this model.
    """
    with contextlib.ExitStack() as stack:
        parts = open_parts(Path(file))
        if parts.is_mmproj:
            pair = _open_mmproj(stack, parts, against)
        else:
            pair = _open_model(stack, parts, Path(file), against, lora)
        problems, wanted = pair.problems, pair.wanted
        missing = sorted(set(wanted) - {tensor.name for tensor in pair.tensors})
        problems += [f"{name}: is missing from the file" for name in missing]
        total = sum(_n_bytes(tensor) for tensor in pair.tensors)
        checks, done, started = [], 0, time.perf_counter()
        for tensor in pair.tensors:
            if tensor.name not in wanted:
                problems.append(f"{tensor.name}: the source has no such tensor")
                continue
            check = _compare(tensor, wanted[tensor.name])
            checks.append(check)
            if check.problem:
                problems.append(f"{tensor.name}: {check.problem}")
            done += _n_bytes(tensor)
            if progress is not None:
                seconds = time.perf_counter() - started
                progress(ConversionProgress("verify", tensor.name, done, total, seconds))
    return VerifyReport(Path(file), None if against is None else Path(against), checks, problems)


@dataclass(frozen=True)
class _Pair:
    """An open file and its source: the file's tensors, the source's by name, and differences of metadata."""

    tensors: list[SourceTensor]
    wanted: dict[str, _Wanted]
    problems: list[str]


@dataclass(frozen=True)
class _Wanted:
    """A tensor of the source. ``plan``: how to write it with the type and shape of a tensor of the file; it
    raises ConversionError for a shape that the source's can't become.
    """

    type: str
    shape: tuple[int, ...]
    plan: Callable[[SourceTensor], PlannedTensor]


def _open_model(
    stack: contextlib.ExitStack,
    parts: Parts,
    file: Path,
    against: str | os.PathLike[str] | None,
    lora: Lora,
) -> _Pair:
    target = stack.enter_context(open_gguf(file, parts=parts))
    source = target if against is None else _open_against(stack, target, against)
    problems = [] if against is None else _compare_model_metadata(target, source)
    if against is not None:
        merge_into(source, lora)
        problems += _compare_merged(target, source)
    sources = as_stored(
        {tensor.name: tensor for tensor in source.tensors},
        {tensor.name: tensor for tensor in target.tensors},
    )

    def wanted(source: SourceTensor) -> _Wanted:
        def plan(tensor: SourceTensor) -> PlannedTensor:
            planned = type_plan.PlannedType(tensor.type, tensor.shape)
            return planned_tensor(source, type_plan.TypePlan(tensors={tensor.name: planned}))

        return _Wanted(source.type, source.shape, plan)

    return _Pair(target.tensors, {name: wanted(tensor) for name, tensor in sources.items()}, problems)


def _compare_merged(target: Source, source: Source) -> list[str]:
    """A problem if other adapters were merged into the file than into the source."""
    found, wanted = merged_adapters(target), merged_adapters(source)
    # By what they do: an adapter may have been renamed, or converted to another format, since.
    if [one.what_it_does for one in found] == [one.what_it_does for one in wanted]:
        return []
    if not wanted:
        return [f"adapters were merged into the file: give them with --lora ({', '.join(map(str, found))})"]
    in_file, given = (
        ", ".join(f"{one} ({one.fingerprint:.12})" for one in side) or "none" for side in (found, wanted)
    )
    return [f"merged adapters are {in_file}, the source with --lora has {given}"]


def _open_mmproj(stack: contextlib.ExitStack, parts: Parts, against: str | os.PathLike[str] | None) -> _Pair:
    tensors = [
        SourceTensor(str(info.name), info.type, tuple(info.shape), read)
        for info, read in stack.enter_context(parts.opened())
    ]
    problems: list[str] = []
    if against is None:
        # Bounds of clipping, the tensors of one weight, may be infinite.
        planned = [
            PlannedTensor(t.name, t.shape, t.type, t.type, t.read, t.shape, keeps_nonfinite=t.shape == (1,))
            for t in tensors
        ]
    else:
        source = stack.enter_context(open_mmproj(against, "f32"))
        planned = source.tensors
        problems = _compare_metadata(parts.metadata, source.metadata, source.implied, ("clip.",))

    def wanted(source: PlannedTensor) -> _Wanted:
        def plan(tensor: SourceTensor) -> PlannedTensor:
            if tensor.shape != source.shape:
                raise ConversionError(f"{tensor.name}: another shape")
            return dataclasses.replace(source, target_type=tensor.type)

        return _Wanted(source.source_type, source.shape, plan)

    return _Pair(tensors, {tensor.name: wanted(tensor) for tensor in planned}, problems)


def _open_against(stack: contextlib.ExitStack, target: Source, against: str | os.PathLike[str]) -> Source:
    """The source, with its tensors as they were when the file was written: dequantized, or kept in blocks."""
    names = {tensor.name for tensor in target.tensors}
    source = stack.enter_context(open_source(against))
    if names - {tensor.name for tensor in source.tensors}:
        for type_name in KEPT:  # also of a file that was quantized again since: it has the scales still
            kept = stack.enter_context(open_source(against, keep=type_name.upper()))
            if names == {tensor.name for tensor in kept.tensors}:
                return kept
    return source


def _n_bytes(tensor: SourceTensor) -> int:
    return type_plan.tensor_bytes(tensor.type, tensor.shape)


def _compare_model_metadata(target: Source, source: Source) -> list[str]:
    """Compare the metadata that affects computation; feed-forward lengths may be padded."""
    own = f"{source.architecture.name}."
    keys = {key: value.value for key, value in target.metadata.items()}
    wanted = dict(source.metadata)
    for part in type_plan.FEED_FORWARDS:
        key = own + part.key
        if key in wanted and key in keys and _first(keys[key]) >= _first(wanted[key].value):
            del wanted[key]
    implied = source.architecture.implied(keys)
    return _compare_metadata(keys, wanted, implied, (own, "diffusion.", "tokenizer.ggml."))


def _compare_metadata(
    keys: Mapping[str, Any],
    wanted: Mapping[str, Value],
    implied: Mapping[str, Any],
    prefixes: tuple[str, ...],
) -> list[str]:
    """A problem for each of the ``wanted`` keys that differs; ``implied``: values of absent ones."""
    problems = []
    for key, value in wanted.items():
        found = keys.get(key, implied.get(key))
        if key.startswith(prefixes) and (found is None or not writer.same_value(found, value)):
            shown = f"{keys[key]!r:.60}" if key in keys else "absent"
            problems.append(f"metadata key {key!r} is {shown}, the source has {value.value!r:.60}")
    return problems


def _first(value: Any) -> int:
    return value[0] if isinstance(value, list) else value


def _compare(tensor: SourceTensor, source: _Wanted) -> TensorCheck:
    """Compare one tensor chunk by chunk, with float64 sums."""

    def result(sums: np.ndarray, problem: str) -> TensorCheck:
        error, of_source, of_file, product = sums
        n_weights = int(np.prod(source.shape))
        scale = (of_source * of_file) ** 0.5
        return TensorCheck(
            tensor.name,
            tensor.type,
            source.type,
            n_weights,
            (error / max(1, n_weights)) ** 0.5,
            (error / of_source) ** 0.5 if of_source else float(error > 0),
            product / scale if scale else float(of_source == of_file),
            problem,
        )

    sums = np.zeros(4)
    try:
        wanted = source.plan(tensor)
    except ConversionError:
        return result(sums, f"has the shape {list(tensor.shape)}, the source {list(source.shape)}")
    size = rows.row_bytes(tensor.type, wanted.n_per_row)
    problem = ""
    for start, count in wanted.chunks():
        data = wanted.read_rows(start, count)
        written = tensor.read(start * size, count * size).reshape(count, size)
        found = rows.to_float32(written, tensor.type, wanted.n_per_row).astype(np.float64)
        expected = rows.to_float32(data, source.type, wanted.n_per_row).astype(np.float64)
        if not wanted.keeps_nonfinite:
            if not np.isfinite(found).all():
                return result(sums, "holds NaN or infinite weights")
            errors = ((found - expected) ** 2).sum()
            sums += [errors, (expected**2).sum(), (found**2).sum(), (found * expected).sum()]
        with contextlib.suppress(KeyError):  # a type that this package only reads
            try:
                rows.check_rows(
                    written, data, source.type, tensor.type, wanted.n_per_row, tensor.name, weighted=True
                )
            except ConversionError:
                problem = f"as {tensor.type} does not agree with the source ({source.type})"
    return result(sums, problem)
