"""``convert``, ``quantize``, ``convert_mmproj``: write a GGUF from a checkpoint folder or another GGUF."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydiffusion.adapters.merging import merge_into
from pydiffusion.convert.architectures.source import (
    Source,
    open_checkpoint,
    open_gguf,
    open_mmproj,
    open_source,
)
from pydiffusion.convert.checkpoint.tensor_map import TensorKinds, split_name
from pydiffusion.convert.gguf import writer
from pydiffusion.convert.gguf.header import Value
from pydiffusion.convert.gguf.report import ConversionReport, ProgressCallback
from pydiffusion.convert.gguf.split import check_split_size
from pydiffusion.convert.gguf.tensor_reads import SharedRead, SourceTensor
from pydiffusion.convert.gguf.writer import Job, PlannedTensor
from pydiffusion.convert.quantization import imatrix_file, recipes, type_plan
from pydiffusion.convert.quantization.padding import padded_read
from pydiffusion.convert.quantization.type_plan import with_lengths
from pydiffusion.options import Lora

_EXACT = ("F32", "F16", "BF16")
# Types of quantized checkpoints: tensors that a source has in this type are copied, whatever the recipe says.
KEPT = ("nvfp4", "mxfp4")
MMPROJ_TYPES = ("f32", "f16", "bf16", "q8_0")


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    type: str = "q4_k_m",
    *,
    pad: bool | None = None,
    tensor_types: type_plan.Overrides | Mapping[str, str] = (),
    imatrix: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    split_max_size: int | None = None,
    resume: bool = False,
    allow_nonfinite: bool = False,
    n_threads: int | None = None,
    overwrite: bool = True,
    chat_template: str | os.PathLike[str] | None = None,
    lora: Lora = (),
    progress: ProgressCallback | None = None,
) -> ConversionReport:
    """Convert a checkpoint folder (``config.json``, safetensors, ``tokenizer.json``) to GGUF.

    The target appears complete and verified, or not at all. Vision weights are skipped
    (:func:`pydiffusion.convert.convert_mmproj` writes them).

    Args:
        source: the folder, or a Hugging Face repo id (``OWNER/NAME``).
        target: the file to write; an existing one is replaced, unless ``overwrite`` is False.
        type: one of :data:`TYPES`, in any case, or another name of it that is in use (``Q4_K``).
        pad: True zero-pads the feed-forward lengths to multiples of 256, which does not change the model's
            output; False never pads; None pads if the recipe's types need it and the file gets smaller or
            hardly larger than with fallback types.
        tensor_types: regular expressions, searched in tensor names, and the ggml types for matching tensors
            instead of the recipe's; the first match counts.
        imatrix: an importance matrix file, as written by `collect_imatrix` or llama.cpp.
        revision: branch, tag or commit of a repo.
        split_max_size: maximum bytes per file; a larger one is split into ``NAME-00001-of-0000N.gguf``.
        resume: on failure or interruption, keep partial output as ``TARGET.part``, and resume from it if
            called again with ``resume``. The finished file is the same.
        allow_nonfinite: keep tensors with NaN or infinity in the source's type instead of failing; this reads
            the source once more.
        n_threads: threads for quantizing, at most 16; None uses one per CPU that this process may use.
        chat_template: a file, or the name of a built-in template ("diffusion-gemma"), to write instead of the
            folder's.
        lora: adapters to merge into the weights before they get their types: (source, scale) of each, or a
            source alone for a scale of 1; a source is a PEFT folder, a GGUF, a repo id of the hub or an
            ``Adapter``. Only what changes a matrix alike for encoder and decoder can be merged.
        progress: called after every chunk; an exception from it stops the conversion.

    Raises:
        ConversionError: the folder can't be converted as requested, or the target can't be written; the
            message names the file, key or tensor.
        AdapterError: an adapter can't be read, or is not for this model.
        ModelFormatError: the imatrix is damaged.
        ValueError: ``type`` is not one of :data:`TYPES`, a pattern or type in ``tensor_types`` is invalid, or
            ``n_threads`` is negative.
    """
    started = time.perf_counter()
    variant = Variant(target, type, pad, tensor_types, imatrix, split_max_size)
    choices = _Choices(variant, resume, allow_nonfinite, n_threads, overwrite, progress)
    keep = choices.type.upper() if choices.type in KEPT else ""
    with open_checkpoint(source, revision, keep=keep, chat_template=chat_template) as opened:
        merge_into(opened, lora)
        return writer.run(choices.job(opened), started)


@dataclass(frozen=True)
class Variant:
    """One file of a family, with its arguments of :func:`convert`."""

    target: str | os.PathLike[str]
    type: str = "q4_k_m"
    pad: bool | None = None
    tensor_types: type_plan.Overrides | Mapping[str, str] = ()
    imatrix: str | os.PathLike[str] | None = None
    split_max_size: int | None = None


def convert_family(
    source: str | os.PathLike[str],
    variants: Sequence[Variant],
    *,
    revision: str | None = None,
    allow_nonfinite: bool = False,
    n_threads: int | None = None,
    overwrite: bool = True,
    chat_template: str | os.PathLike[str] | None = None,
    lora: Lora = (),
    progress: ProgressCallback | None = None,
) -> list[ConversionReport]:
    """Convert a checkpoint folder, or a GGUF, to several files at once; the source is read once for writing
    all of them and once for verifying them.

    Each file equals the output of :func:`convert` or :func:`quantize`, but for blocks of a quantized
    checkpoint (NVFP4, MXFP4): they are kept only if all files are of their type. All appear once all are
    verified, or none does.

    Args: as :func:`convert`; ``chat_template`` and ``lora`` are those of all files.

    Raises: as ``convert``; ValueError also for no variants, or two with the same target.
    """
    started = time.perf_counter()
    targets = [os.path.realpath(variant.target) for variant in variants]
    if not variants or len(set(targets)) != len(targets):
        raise ValueError("a family needs at least one variant, and a target of its own for each")
    members = [_Choices(v, False, allow_nonfinite, n_threads, overwrite, progress) for v in variants]
    types = {choices.type for choices in members}
    keep = members[0].type.upper() if len(types) == 1 and members[0].type in KEPT else ""
    with open_source(source, revision, keep=keep, chat_template=chat_template) as opened:
        merge_into(opened, lora)
        reads = [SharedRead(tensor.read) for tensor in opened.tensors]
        opened.tensors = [replace(t, read=read) for t, read in zip(opened.tensors, reads, strict=True)]
        jobs = []
        for choices in members:
            jobs.append(choices.job(opened))
            for read in reads:
                read.drop()
        return writer.run_together(jobs, reads, started)


def quantize(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    type: str,
    *,
    pad: bool | None = None,
    tensor_types: type_plan.Overrides | Mapping[str, str] = (),
    imatrix: str | os.PathLike[str] | None = None,
    split_max_size: int | None = None,
    resume: bool = False,
    allow_nonfinite: bool = False,
    n_threads: int | None = None,
    overwrite: bool = True,
    chat_template: str | os.PathLike[str] | None = None,
    lora: Lora = (),
    progress: ProgressCallback | None = None,
) -> ConversionReport:
    """Requantize a GGUF to the types of a recipe.

    All metadata is kept except ``general.file_type``, ``general.quantization_version`` and, with padding, the
    feed-forward lengths. Tensors that have the target type already are copied; quantized tensors that change
    type lose precision twice, which the report notes.

    Args: as :func:`pydiffusion.convert.convert`, with a GGUF as ``source``; of a split one, any part.
    Adapters (``lora``) are merged into float weights only (F32, F16, BF16).

    Raises:
        ModelFormatError: the source or the imatrix is damaged.
        ConversionError: it can't be converted as requested, or the target can't be written.
        AdapterError: as for ``convert``.
        ValueError: as for ``convert``.
    """
    started = time.perf_counter()
    variant = Variant(target, type, pad, tensor_types, imatrix, split_max_size)
    choices = _Choices(variant, resume, allow_nonfinite, n_threads, overwrite, progress)
    with open_gguf(Path(source), chat_template) as opened:
        merge_into(opened, lora)
        return writer.run(choices.job(opened), started)


def convert_mmproj(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    type: str = "bf16",
    *,
    revision: str | None = None,
    resume: bool = False,
    n_threads: int | None = None,
    overwrite: bool = True,
    progress: ProgressCallback | None = None,
) -> ConversionReport:
    """Write the vision part of a checkpoint folder or repo as an ``mmproj`` GGUF.

    Norms, clipping bounds, position and patch embeddings are F32, all other matrices of ``type``
    (:data:`MMPROJ_TYPES`; ``bf16`` keeps a bf16 checkpoint exactly).

    Raises:
        ConversionError: the checkpoint has no vision part, or not Gemma 4's; else as
            :func:`pydiffusion.convert.convert`.
        ValueError: another type.
    """
    started = time.perf_counter()
    type = recipes.recipe_name(type, MMPROJ_TYPES)
    with open_mmproj(source, type, revision) as opened:
        tensors = opened.tensors
        job = Job(
            source=opened.path,
            source_files=opened.files,
            target=Path(target),
            type=type,
            metadata=opened.metadata | {"general.file_type": Value("u32", recipes.RECIPES[type].file_type)},
            tensors=tensors,
            fallbacks=[
                f"{t.name}: {type.upper()} -> {t.target_type} (rows of {t.n_per_row})"
                for t in tensors
                if t.target_type not in ("F32", type.upper())
            ],
            notes=opened.notes,
            n_threads=n_threads or 0,
            overwrite=overwrite,
            progress=progress,
            resume=resume,
        )
        return writer.run(job, started)


class _Choices:
    """Validated arguments common to all conversions."""

    def __init__(
        self,
        variant: Variant,
        resume: bool,
        allow_nonfinite: bool,
        n_threads: int | None,
        overwrite: bool,
        progress: ProgressCallback | None,
    ):
        if n_threads is not None and (not isinstance(n_threads, int) or n_threads < 0):
            raise ValueError(f"n_threads is {n_threads!r}; give a positive number, or None for one per CPU")
        check_split_size(variant.split_max_size)
        self.variant, self.n_threads = variant, n_threads or 0
        self.type, self.target = recipes.recipe_name(variant.type), Path(variant.target)
        self.overrides = type_plan.as_pairs(variant.tensor_types)
        self.imatrix = None if variant.imatrix is None else imatrix_file.read_imatrix(variant.imatrix)
        self.resume, self.allow_nonfinite = resume, allow_nonfinite
        self.overwrite, self.progress = overwrite, progress

    def job(self, source: Source) -> Job:
        """The job for the writer. Raises as ``convert``."""
        types = type_plan.plan_types(
            ((tensor.name, tensor.shape) for tensor in source.tensors),
            self.type,
            source.architecture.kinds,
            pad=self.variant.pad,
            overrides=self.overrides,
            kept=[tensor.name for tensor in source.tensors if tensor.type == self.type.upper()]
            if self.type in KEPT
            else [],
            has_imatrix=self.imatrix is not None,
        )
        tensors = [planned_tensor(tensor, types) for tensor in source.tensors]
        notes = source.notes + types.notes
        covered: set[str] = set()
        if self.imatrix is not None:
            tensors, more = _with_importance(self.imatrix, tensors)
            notes += more
            covered = {tensor.name for tensor in tensors if tensor.importance is not None}
        type_plan.require_imatrix(types, self.type, self.imatrix is not None, covered)
        if self.allow_nonfinite:
            tensors, more = _keep_nonfinite(tensors, source.architecture.kinds)
            notes += more
        notes += _notes_on_twice(tensors)
        metadata = with_lengths(source.metadata, types.lengths)
        metadata["general.file_type"] = Value("u32", recipes.RECIPES[self.type].file_type)
        return Job(
            source=source.path,
            source_files=[*source.files, *([self.imatrix.path] if self.imatrix else [])],
            target=self.target,
            type=self.type,
            metadata=metadata,
            tensors=tensors,
            fallbacks=types.fallbacks,
            notes=notes,
            n_threads=self.n_threads,
            overwrite=self.overwrite,
            progress=self.progress,
            alignment=source.alignment,
            resume=self.resume,
            split_max_size=self.variant.split_max_size,
        )


def _notes_on_twice(tensors: list[PlannedTensor]) -> list[str]:
    """A note for each pair of types of tensors that are quantized a second time."""
    names: dict[tuple[str, str], list[str]] = {}
    for tensor in tensors:
        if tensor.source_type not in _EXACT and tensor.source_type != tensor.target_type:
            names.setdefault((tensor.source_type, tensor.target_type), []).append(tensor.name)
    notes = []
    for (old, new), some in names.items():
        more = f" and {len(some) - 1} more" if len(some) > 1 else ""
        notes.append(f"{some[0]}{more}: quantized a second time, {old} -> {new}")
    return notes


def _with_importance(
    imatrix: imatrix_file.Imatrix, tensors: list[PlannedTensor]
) -> tuple[list[PlannedTensor], list[str]]:
    result: list[PlannedTensor] = []
    notes: list[str] = []
    for tensor in tensors:
        found = imatrix.importance(tensor.name, tensor.source_shape, tensor.n_per_row, notes)
        result.append(tensor if found is None else replace(tensor, importance=found))
    if all(tensor.importance is None for tensor in result):
        notes.append(f"{imatrix.path}: has no entry for any tensor of this model")
    return result, notes


def _keep_nonfinite(
    tensors: list[PlannedTensor], kinds: TensorKinds
) -> tuple[list[PlannedTensor], list[str]]:
    """Keep tensors with NaN or infinity in a type that can represent them, with a note for each."""
    result, notes = [], []
    for tensor in tensors:
        if tensor.has_nonfinite():
            kept = "F32" if kinds.kind(tensor.name) in kinds.float32 else tensor.source_type
            tensor = replace(tensor, target_type=kept, importance=None, keeps_nonfinite=True)
            notes.append(f"{tensor.name}: holds NaN or infinite weights, kept as {kept}")
        result.append(tensor)
    return result, notes


def planned_tensor(tensor: SourceTensor, types: type_plan.TypePlan) -> PlannedTensor:
    """Plan the conversion of one tensor."""
    planned = types.tensors[tensor.name]
    read = padded_read(
        tensor.read,
        tensor.type,
        tensor.shape,
        planned.shape,
        2 if split_name(tensor.name)[0] == type_plan.FUSED_KIND else 1,
        tensor.name,
    )
    return PlannedTensor(tensor.name, planned.shape, tensor.type, planned.type, read, tensor.shape)
