"""``verify``: compare a GGUF with its source, tensor by tensor."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pydiffusion.convert.architectures.source import Source, open_gguf, open_source
from pydiffusion.convert.conversion import KEPT, planned_tensor
from pydiffusion.convert.gguf import rows, writer
from pydiffusion.convert.gguf.report import ConversionProgress
from pydiffusion.convert.gguf.tensor_reads import SourceTensor
from pydiffusion.convert.quantization import type_plan
from pydiffusion.convert.quantization.stored_scales import as_stored
from pydiffusion.errors import ConversionError


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
    progress: Callable[[ConversionProgress], None] | None = None,
) -> VerifyReport:
    """Read every tensor of a GGUF and compare it with its source: a folder, repo or GGUF.

    Of a split file, give any part. Without ``against``, check only that the file is complete and all weights
    are finite. Where only the file has scales beside its matrices, matrices are compared with the source's
    divided by them. Padding is allowed: padding must be zeros if the type can represent zeros. Mismatches are
    listed in the report's ``problems``, not raised.

    Raises:
        ModelFormatError: a GGUF is damaged.
        ConversionError: file or source can't be read, or is of another architecture.
    """
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(open_gguf(Path(file)))
        source = target if against is None else _open_against(stack, target, against)
        problems = [] if against is None else _compare_metadata(target, source)
        sources = as_stored(
            {tensor.name: tensor for tensor in source.tensors},
            {tensor.name: tensor for tensor in target.tensors},
        )
        missing = sorted(set(sources) - {tensor.name for tensor in target.tensors})
        problems += [f"{name}: is missing from the file" for name in missing]
        total = sum(_n_bytes(tensor) for tensor in target.tensors)
        checks, done, started = [], 0, time.perf_counter()
        for tensor in target.tensors:
            if tensor.name not in sources:
                problems.append(f"{tensor.name}: the source has no such tensor")
                continue
            check = _compare(tensor, sources[tensor.name])
            checks.append(check)
            if check.problem:
                problems.append(f"{tensor.name}: {check.problem}")
            done += _n_bytes(tensor)
            if progress is not None:
                seconds = time.perf_counter() - started
                progress(ConversionProgress("verify", tensor.name, done, total, seconds))
    return VerifyReport(Path(file), None if against is None else Path(against), checks, problems)


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


def _compare_metadata(target: Source, source: Source) -> list[str]:
    """Compare the metadata that affects computation; feed-forward lengths may be padded."""
    own = f"{source.architecture.name}."
    lengths = {own + part.key for part in type_plan.FEED_FORWARDS}
    problems = []
    for key, value in source.metadata.items():
        if not key.startswith((own, "diffusion.", "tokenizer.ggml.")):
            continue
        found = target.metadata.get(key)
        if key in lengths and found is not None and _first(found.value) >= _first(value.value):
            continue
        if found is None or not writer.same_value(found.value, value):
            shown = "absent" if found is None else f"{found.value!r:.60}"
            problems.append(f"metadata key {key!r} is {shown}, the source has {value.value!r:.60}")
    return problems


def _first(value: Any) -> int:
    return value[0] if isinstance(value, list) else value


def _compare(tensor: SourceTensor, source: SourceTensor) -> TensorCheck:
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
    types = type_plan.TypePlan(tensors={tensor.name: type_plan.PlannedType(tensor.type, tensor.shape)})
    try:
        wanted = planned_tensor(source, types)
    except ConversionError:
        return result(sums, f"has the shape {list(tensor.shape)}, the source {list(source.shape)}")
    size = rows.row_bytes(tensor.type, wanted.n_per_row)
    problem = ""
    for start, count in wanted.chunks():
        data = wanted.read_rows(start, count)
        written = tensor.read(start * size, count * size).reshape(count, size)
        found = rows.to_float32(written, tensor.type, wanted.n_per_row).astype(np.float64)
        expected = rows.to_float32(data, source.type, wanted.n_per_row).astype(np.float64)
        if not np.isfinite(found).all():
            return result(sums, "holds NaN or infinite weights")
        sums += [
            ((found - expected) ** 2).sum(), (expected**2).sum(), (found**2).sum(), (found * expected).sum()
        ]  # fmt: skip
        with contextlib.suppress(KeyError):  # a type that this package only reads
            try:
                rows.check_rows(
                    written, data, source.type, tensor.type, wanted.n_per_row, tensor.name, weighted=True
                )
            except ConversionError:
                problem = f"as {tensor.type} does not agree with the source ({source.type})"
    return result(sums, problem)
