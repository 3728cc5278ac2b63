"""Write planned tensors to GGUF files chunk by chunk, then reopen and verify them.

Used by all conversions. Several files can be written from one source: each chunk is read once and converted
for every file.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from pydiffusion import _native
from pydiffusion._util import atomic
from pydiffusion._util.cpus import available_cpus
from pydiffusion._util.version import __version__
from pydiffusion.convert.gguf import rows
from pydiffusion.convert.gguf.header import DEFAULT_ALIGNMENT, Value
from pydiffusion.convert.gguf.report import ConversionProgress, ConversionReport, ProgressCallback
from pydiffusion.convert.gguf.resume import Journal, digest_of, identity
from pydiffusion.convert.gguf.split import Part, plan_parts
from pydiffusion.convert.gguf.tensor_reads import ReadBytes, SharedRead, read_exactly
from pydiffusion.errors import ConversionError, PyDiffusionError

# Weights per chunk: 4 MiB as float32, and a few copies of that per thread.
CHUNK_WEIGHTS = 1 << 20
_MAX_WORKERS = 16


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to write: its source and target types, and a function to read it.

    ``shape`` is the target's; ``source_shape`` is smaller if ``read`` adds zero padding. ``importance``:
    importance of the columns for quantizing, (n_matrices, n_per_row) float32.
    """

    name: str
    shape: tuple[int, ...]
    source_type: str
    target_type: str
    read: ReadBytes
    source_shape: tuple[int, ...]
    importance: np.ndarray | None = None
    keeps_nonfinite: bool = False

    @property
    def n_per_row(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def n_rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Bytes per row in the target."""
        return rows.row_bytes(self.target_type, self.n_per_row)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """(first row, number of rows) of each chunk."""
        return _spans(self.n_rows, CHUNK_WEIGHTS // max(1, self.n_per_row))

    def read_rows(self, start: int, count: int) -> np.ndarray:
        """Read rows of the source: (count, bytes_per_row) uint8."""
        size = rows.row_bytes(self.source_type, self.n_per_row)
        return self.read(start * size, count * size).reshape(count, size)

    def has_nonfinite(self) -> bool:
        """Whether the source holds NaN or infinite weights; reads all of it."""
        chunks = (self.read_rows(start, count) for start, count in self.chunks())
        return any(rows.has_nonfinite(chunk, self.source_type, self.n_per_row) for chunk in chunks)


@dataclass
class Job:
    """A conversion. ``resume``: keep partial output on failure, and resume from an earlier run's.
    ``split_max_size``: maximum bytes per file.
    """

    source: Path
    source_files: list[Path]
    target: Path
    type: str
    metadata: dict[str, Value]
    tensors: list[PlannedTensor]
    fallbacks: list[str]
    notes: list[str]
    n_threads: int
    overwrite: bool
    progress: ProgressCallback | None
    alignment: int = DEFAULT_ALIGNMENT
    resume: bool = False
    split_max_size: int | None = None


@dataclass
class _Output:
    """A job and its output files."""

    job: Job
    parts: list[Part]
    files: list[atomic.NewFile]
    journal: Journal | None
    digests: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.places = [
            (part, new, placed)
            for part, new in zip(self.parts, self.files, strict=True)
            for placed in part.tensors
        ]

    def write(self, index: int, start: int, data: np.ndarray, digest: bytes) -> None:
        """Write rows of a tensor, from row ``start``."""
        part, new, placed = self.places[index]
        offset = len(part.header) + placed.offset + start * self.job.tensors[index].row_bytes
        new.write(data.data, offset)
        self.digests.append(digest)
        if self.journal is not None:
            self.journal.add(digest, self.files)


class _Clock:
    """Reports the progress of a stage."""

    def __init__(self, jobs: Sequence[Job], stage: Literal["write", "verify"]):
        self.callback, self.stage = jobs[0].progress, stage
        self.total = sum(tensor.n_rows * tensor.row_bytes for job in jobs for tensor in job.tensors)
        self.done = self.resumed = 0
        self.started = time.perf_counter()

    def add(self, tensor: str, n_bytes: int) -> None:
        self.done += n_bytes
        if self.callback is not None:
            seconds = time.perf_counter() - self.started
            self.callback(
                ConversionProgress(self.stage, tensor, self.done, self.total, seconds, self.resumed)
            )


def run(job: Job, started: float) -> ConversionReport:
    """Write ``job.target`` and verify it before renaming it into place. ``started``: time.perf_counter() at
    the start.
    """
    return run_together([job], [], started)[0]


def run_together(jobs: Sequence[Job], reads: Sequence[SharedRead], started: float) -> list[ConversionReport]:
    """As :func:`run` for several jobs of the same source, which read it through ``reads``; all or none."""
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(_output(job)) for job in jobs]
        space: Counter[Path] = Counter()
        for output in outputs:
            space[output.files[0].target.parent] += _missing_bytes(output)
        for folder, n_bytes in space.items():
            atomic.require_free_space(folder, n_bytes)
        for output in outputs:
            _begin(output)
        _write(outputs, reads)
        _verify(outputs, reads)
    return [_report(output, started) for output in outputs]


@contextlib.contextmanager
def _output(job: Job) -> Iterator[_Output]:
    """Open the files of a job, renamed into place when the block ends."""
    planned = [
        (tensor.name, tensor.target_type, tensor.shape, tensor.n_rows * tensor.row_bytes)
        for tensor in job.tensors
    ]
    parts = plan_parts(job.target, job.metadata, planned, job.alignment, job.split_max_size)
    targets = [atomic.resolve_target(part.path, job.source_files, job.overwrite) for part in parts]
    with contextlib.ExitStack() as stack:
        journal = None
        if job.resume:
            journal = stack.enter_context(Journal(job.target, _identity(job, parts)))
        with atomic.replacing_all(targets, kept=job.resume) as files:
            output = _Output(job, parts, files, journal)
            try:
                yield output
            except BaseException:
                if journal is not None:
                    with contextlib.suppress(ConversionError):  # disk full: what was listed before is kept
                        journal.flush(files)
                raise
        if journal is not None:
            journal.remove()


def _identity(job: Job, parts: list[Part]) -> str:
    what: list[bytes | str] = [__version__, _native.version()["ggml"], str(CHUNK_WEIGHTS)]
    what += [part.header for part in parts]
    for tensor in job.tensors:
        what.append(f"{tensor.source_type} {tensor.source_shape}")
        if tensor.importance is not None:
            what.append(digest_of(tensor.importance.tobytes()))
    return identity(what, job.source_files)


def _missing_bytes(output: _Output) -> int:
    """Disk space that the files still need; of a sparse file, allocated blocks count."""
    total = sum(part.n_bytes for part in output.parts)
    with contextlib.suppress(OSError, AttributeError):  # not available on Windows
        total -= sum(512 * new.temporary.stat().st_blocks for new in output.files)
    return max(0, total)


def _begin(output: _Output) -> None:
    """Write the headers, or resume and return the finished chunks."""
    sizes = [part.n_bytes for part in output.parts]
    if output.journal is None:
        for new, size in zip(output.files, sizes, strict=True):
            new.empty(size)
    else:
        n_steps = sum(1 for tensor in output.job.tensors for _ in shared_steps([tensor]))
        output.journal.begin(output.files, sizes, n_steps)
        output.digests = list(output.journal.digests)
        output.job.notes += [output.journal.note] if output.journal.note else []
    for part, new in zip(output.parts, output.files, strict=True):
        new.write(part.header, 0)


def shared_steps(tensors: Sequence[PlannedTensor]) -> Iterator[list[tuple[int, int]]]:
    """Steps that convert one source tensor to all of ``tensors``: (first row, number of rows) of each.

    If they are padded differently, a step covers whole matrices, so that all need the same source rows.
    """
    first = tensors[0]
    widest = max(1, *(tensor.n_per_row for tensor in tensors))
    if len({tensor.n_rows for tensor in tensors}) == 1:
        yield from ([chunk] * len(tensors) for chunk in _spans(first.n_rows, CHUNK_WEIGHTS // widest))
        return
    heights = [tensor.shape[-2] for tensor in tensors]
    for start, count in _spans(math.prod(first.shape[:-2]), CHUNK_WEIGHTS // (widest * max(heights))):
        yield [(start * height, count * height) for height in heights]


def _spans(total: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, total, max(1, step)):
        yield start, min(max(1, step), total - start)


class _Step(NamedTuple):
    """A chunk of the source, converted for every output."""

    number: int
    i_tensor: int
    spans: list[tuple[int, int]]  # rows of each output
    n_weights: int  # of the largest output


def _steps(outputs: Sequence[_Output]) -> Iterator[_Step]:
    number = 0
    for index, tensors in enumerate(zip(*(output.job.tensors for output in outputs), strict=True)):
        for spans in shared_steps(tensors):
            pairs = zip(tensors, spans, strict=True)
            n_weights = max(count * tensor.n_per_row for tensor, (_, count) in pairs)
            yield _Step(number, index, spans, n_weights)
            number += 1


def _in_order(
    work: Callable[[_Step], Any], steps: Iterator[_Step], n_threads: int
) -> Generator[tuple[_Step, Any], None, None]:
    """Yield (step, result of ``work``) in order, while threads work ahead by the weights of a few chunks: by
    many steps if tensors are small, so that threads don't wait for a large one before them.
    """
    n_workers = min(n_threads or available_cpus(), _MAX_WORKERS)
    if n_workers < 2:
        yield from ((step, work(step)) for step in steps)
        return
    pending: deque[tuple[_Step, Future[Any]]] = deque()
    n_weights = 0
    with ThreadPoolExecutor(n_workers) as pool:
        try:
            for step in steps:
                pending.append((step, pool.submit(work, step)))
                n_weights += step.n_weights
                while len(pending) > n_workers and n_weights > (n_workers + 2) * CHUNK_WEIGHTS:
                    done, future = pending.popleft()
                    n_weights -= done.n_weights
                    yield done, future.result()
            for done, future in pending:
                yield done, future.result()
        finally:
            for _, future in pending:
                future.cancel()


@contextlib.contextmanager
def _held(outputs: Sequence[_Output], reads: Sequence[SharedRead], step: _Step) -> Iterator[None]:
    """Cache the source rows of a step within the block, for all outputs."""
    index, spans = step.i_tensor, step.spans
    if not reads:
        yield
        return
    tensors = [output.job.tensors[index] for output in outputs]
    if (
        len({tensor.n_rows for tensor in tensors}) > 1
    ):  # whole matrices, from which each output needs different rows
        first, (start, count), old = tensors[0], spans[0], tensors[0].source_shape
        size = old[-2] * rows.row_bytes(first.source_type, old[-1])
        reads[index].hold(start // first.shape[-2] * size, count // first.shape[-2] * size)
    try:
        yield
    finally:
        reads[index].drop()


def _write(outputs: Sequence[_Output], reads: Sequence[SharedRead]) -> None:
    clock = _Clock([output.job for output in outputs], "write")
    n_there = [len(output.digests) for output in outputs]

    def compute(step: _Step) -> list[tuple[np.ndarray, bytes] | None]:
        number, index, spans, _ = step
        if number < min(n_there):
            return [None] * len(outputs)
        with _held(outputs, reads, step):
            result: list[tuple[np.ndarray, bytes] | None] = []
            for output, (start, count) in zip(outputs, spans, strict=True):
                tensor = output.job.tensors[index]
                data = _convert(tensor, tensor.read_rows(start, count), start)
                result.append((data, digest_of(data.data)))
            return result

    with contextlib.closing(_in_order(compute, _steps(outputs), outputs[0].job.n_threads)) as done:
        for (_, index, spans, _), results in done:
            for output, (start, count), result in zip(outputs, spans, results, strict=True):
                tensor = output.job.tensors[index]
                if result is None:
                    clock.resumed += count * tensor.row_bytes
                else:
                    output.write(index, start, *result)
                clock.add(tensor.name, count * tensor.row_bytes)
    for output in outputs:
        if output.journal is not None:
            output.journal.flush(output.files)
        for new in output.files:
            new.sync()


def _convert(tensor: PlannedTensor, data: np.ndarray, start: int) -> np.ndarray:
    """Convert rows of the source, from row ``start``, to the target's type."""
    types = (tensor.source_type, tensor.target_type, tensor.n_per_row, tensor.name)
    if tensor.importance is None:
        return rows.convert_rows(data, *types, keeps_nonfinite=tensor.keeps_nonfinite)
    per_matrix = tensor.n_rows // len(tensor.importance)
    pieces, done = [], 0
    while done < len(data):  # each expert has its own importance
        matrix, row = divmod(start + done, per_matrix)
        count = min(len(data) - done, per_matrix - row)
        piece = data[done : done + count]
        pieces.append(rows.convert_rows(piece, *types, importance=tensor.importance[matrix]))
        done += count
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _verify(outputs: Sequence[_Output], reads: Sequence[SharedRead]) -> None:
    """Reopen the files with the runtime's reader, and compare metadata and every tensor.

    The digests prove that the disk has the bytes that were computed; the comparison with the source, read
    once more, proves that they are the right tensor, rows and type. Together they cost a fraction of
    quantizing again and detect
    more: a repeated bug would repeat its bytes.
    """
    try:
        for output in outputs:
            for part, new in zip(output.parts, output.files, strict=True):
                _verify_header(part, new)
        clock = _Clock([output.job for output in outputs], "verify")

        def compare(step: _Step) -> None:
            number, index, spans, _ = step
            with _held(outputs, reads, step):
                for output, span in zip(outputs, spans, strict=True):
                    _verify_chunk(output, number, index, *span)

        with contextlib.closing(_in_order(compare, _steps(outputs), outputs[0].job.n_threads)) as done:
            for (_, index, spans, _), _ in done:
                for output, (_, count) in zip(outputs, spans, strict=True):
                    tensor = output.job.tensors[index]
                    clock.add(tensor.name, count * tensor.row_bytes)
    except ConversionError:
        for output in outputs:
            if output.journal is not None:  # never resume from wrong bytes
                output.journal.remove()
                for new in output.files:
                    new.temporary.unlink(missing_ok=True)
        raise


def _verify_header(part: Part, new: atomic.NewFile) -> None:
    try:
        reopened = _native.GgufFile(str(new.temporary))
    except PyDiffusionError as error:
        raise ConversionError(f"{part.path}: the file just written does not open: {error}") from error
    _verify_metadata(part.metadata, reopened)
    start, found = len(part.header), reopened.tensors
    if [(info.name, info.type, tuple(info.shape), info.offset, info.n_bytes) for info in found] != [
        (place.name, place.type, place.shape, start + place.offset, place.n_bytes) for place in part.tensors
    ]:
        raise ConversionError(f"{part.path}: the file just written lists different tensors than planned")


def _verify_chunk(output: _Output, number: int, index: int, start: int, count: int) -> None:
    part, new, placed = output.places[index]
    tensor = output.job.tensors[index]
    size = tensor.row_bytes
    position = len(part.header) + placed.offset + start * size
    # Plain read, not mmap: mapped pages would count as resident memory.
    written = read_exactly(new.file, new.temporary, position, count * size)
    rows.check_rows(
        written.reshape(count, size),
        tensor.read_rows(start, count),
        tensor.source_type,
        tensor.target_type,
        tensor.n_per_row,
        tensor.name,
        weighted=tensor.importance is not None,
    )
    if digest_of(written.data) != output.digests[number]:
        raise ConversionError(
            f"{tensor.name}: the disk returns different bytes than were written; is it faulty?"
        )


def _report(output: _Output, started: float) -> ConversionReport:
    job = output.job
    n_weights = sum(math.prod(tensor.source_shape) for tensor in job.tensors)  # padding does not count
    n_bytes = sum(tensor.n_rows * tensor.row_bytes for tensor in job.tensors)
    return ConversionReport(
        source=job.source,
        target=job.target,
        type=job.type,
        n_tensors=len(job.tensors),
        n_weights=n_weights,
        n_bytes=sum(part.n_bytes for part in output.parts),
        bits_per_weight=8 * n_bytes / max(1, n_weights),
        types=dict(Counter(tensor.target_type for tensor in job.tensors)),
        seconds=time.perf_counter() - started,
        fallbacks=job.fallbacks,
        notes=job.notes,
        files=[part.path for part in output.parts],
    )


def _verify_metadata(metadata: Mapping[str, Value], reopened: _native.GgufFile) -> None:
    found, types = reopened.metadata, reopened.metadata_types
    for key, value in metadata.items():
        if types.get(key) != value.type or not same_value(found[key], value):
            raise ConversionError(
                f"metadata key {key!r} reads back as {types.get(key)} {found.get(key)!r:.60}"
            )
    if len(found) != len(metadata):
        raise ConversionError("the file just written has metadata keys that were not planned")


def same_value(found: Any, value: Value) -> bool:
    if value.type.endswith(("f32", "f32]")):
        return np.array_equal(np.float32(found), np.float32(value.value), equal_nan=True)
    if value.type.startswith("array"):
        return list(found) == list(value.value)
    return found == value.value
