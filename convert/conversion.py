"""``convert`` and ``quantize``: from a checkpoint folder, or another GGUF, to a GGUF of a recipe."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydiffusion.convert.architectures.diffusion_gemma.tensor_names import FLOAT32_KINDS, split_name
from pydiffusion.convert.architectures.source import Source, SourceTensor, open_folder, open_gguf
from pydiffusion.convert.checkpoint.hub import find_checkpoint
from pydiffusion.convert.gguf import writer as pipeline
from pydiffusion.convert.gguf.header import Value
from pydiffusion.convert.gguf.report import ConversionReport, ProgressCallback
from pydiffusion.convert.gguf.split import check_split_size
from pydiffusion.convert.gguf.tensor_reads import SharedRead
from pydiffusion.convert.gguf.writer import Job, PlannedTensor
from pydiffusion.convert.quantization import imatrix_file as importance
from pydiffusion.convert.quantization import recipes
from pydiffusion.convert.quantization import type_plan as plan
from pydiffusion.convert.quantization.padding import padded_read
from pydiffusion.convert.quantization.type_plan import with_lengths

_EXACT = ("F32", "F16", "BF16")


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    type: str = "q4_k_m",
    *,
    pad: bool | None = None,
    tensor_types: plan.Overrides | Mapping[str, str] = (),
    imatrix: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    split_max_size: int | None = None,
    resume: bool = False,
    allow_nonfinite: bool = False,
    n_threads: int | None = None,
    overwrite: bool = True,
    progress: ProgressCallback | None = None,
) -> ConversionReport:
    """Convert a checkpoint folder (``config.json``, safetensors, ``tokenizer.json``) to GGUF.

    The target appears whole and verified, or not at all. Vision weights are left out
    (:func:`pydiffusion.convert.convert_mmproj` writes them).

    Args:
        source: the folder, or a repo id of the Hugging Face Hub (``OWNER/NAME``).
        target: the file to write; an existing one is replaced, unless ``overwrite`` is False.
        type: one of :data:`TYPES`.
        pad: True pads the feed-forward lengths to multiples of 256 with zeros, which changes nothing in what
            the model computes; False never does; None does where the recipe's types need it and it gives a
            smaller or hardly larger file than other types would.
        tensor_types: regular expressions, searched in the names of tensors, and the ggml types that matching
            ones get instead of the recipe's; the first that matches counts.
        imatrix: a file of activation statistics, as `collect_imatrix` or llama.cpp make it.
        revision: of a repo: branch, tag or commit.
        split_max_size: bytes beyond which the file is split into parts ``NAME-00001-of-0000N.gguf``.
        resume: what is written stays as ``TARGET.part`` when the conversion fails or is interrupted, and the
            next call with ``resume`` goes on from there. The finished file is the same.
        allow_nonfinite: tensors that hold NaN or infinities are kept in the source's type instead of refused;
            looking for them reads the source once more.
        n_threads: threads for quantizing; None takes one per core.
        progress: called after every chunk; what it raises stops the conversion.

    Raises:
        ConversionError: the folder can't be converted as asked, or the target not be written; the message
            names the file, key or tensor.
        ModelFormatError: the imatrix is damaged.
        ValueError: ``type`` is none of :data:`TYPES`, a pattern or type in ``tensor_types`` is not valid, or
            ``n_threads`` is negative.
    """
    started = time.perf_counter()
    variant = Variant(target, type, pad, tensor_types, imatrix, split_max_size)
    choices = _Choices(variant, resume, allow_nonfinite, n_threads, overwrite, progress)
    found = find_checkpoint(source, revision)
    with open_folder(found.path, found.name) as opened:
        return pipeline.run(choices.job(opened), started)


@dataclass(frozen=True)
class Variant:
    """One file of a family: what :func:`convert` takes for it."""

    target: str | os.PathLike[str]
    type: str = "q4_k_m"
    pad: bool | None = None
    tensor_types: plan.Overrides | Mapping[str, str] = ()
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
    progress: ProgressCallback | None = None,
) -> list[ConversionReport]:
    """Convert a checkpoint folder, or a GGUF, to several files at once; the source is read once for writing
    them all and once for verifying them all.

    Each file is the one that :func:`convert` or :func:`quantize` gives. They appear when all are verified, or
    none does.

    Raises: as ``convert``; ValueError too for no variants, or two of the same target.
    """
    started = time.perf_counter()
    targets = [os.path.realpath(variant.target) for variant in variants]
    if not variants or len(set(targets)) != len(targets):
        raise ValueError("a family needs at least one variant, and a target of its own for each")
    members = [_Choices(v, False, allow_nonfinite, n_threads, overwrite, progress) for v in variants]
    found = find_checkpoint(source, revision)
    opener = open_gguf(found.path) if found.path.is_file() else open_folder(found.path, found.name)
    with opener as opened:
        reads = [SharedRead(tensor.read) for tensor in opened.tensors]
        opened.tensors = [replace(t, read=read) for t, read in zip(opened.tensors, reads, strict=True)]
        jobs = []
        for choices in members:
            jobs.append(choices.job(opened))
            for read in reads:
                read.drop()
        return pipeline.run_together(jobs, reads, started)


def quantize(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    type: str,
    *,
    pad: bool | None = None,
    tensor_types: plan.Overrides | Mapping[str, str] = (),
    imatrix: str | os.PathLike[str] | None = None,
    split_max_size: int | None = None,
    resume: bool = False,
    allow_nonfinite: bool = False,
    n_threads: int | None = None,
    overwrite: bool = True,
    progress: ProgressCallback | None = None,
) -> ConversionReport:
    """Write a GGUF with the weights of another in the types of a recipe.

    All metadata is kept but for ``general.file_type``, ``general.quantization_version`` and, with padding,
    the feed-forward lengths. A tensor that has its type already is copied; one that is quantized and changes
    its type loses twice, which the report's notes tell.

    Args: as :func:`pydiffusion.convert.convert`, with a GGUF as ``source``; any part stands for a split one.

    Raises:
        ModelFormatError: the source or the imatrix is damaged.
        ConversionError: it can't be converted as asked, or the target not be written.
        ValueError: as for ``convert``.
    """
    started = time.perf_counter()
    variant = Variant(target, type, pad, tensor_types, imatrix, split_max_size)
    choices = _Choices(variant, resume, allow_nonfinite, n_threads, overwrite, progress)
    with open_gguf(Path(source)) as opened:
        return pipeline.run(choices.job(opened), started)


class _Choices:
    """The arguments that all conversions have, checked."""

    def __init__(
        self,
        variant: Variant,
        resume: bool,
        allow_nonfinite: bool,
        n_threads: int | None,
        overwrite: bool,
        progress: ProgressCallback | None,
    ):
        if variant.type not in recipes.RECIPES:
            raise ValueError(f"type is {variant.type!r}; known are {', '.join(recipes.TYPES)}")
        if n_threads is not None and (not isinstance(n_threads, int) or n_threads < 0):
            raise ValueError(f"n_threads is {n_threads!r}; give a positive number, or None for one per core")
        check_split_size(variant.split_max_size)
        self.variant, self.n_threads = variant, n_threads or 0
        self.type, self.target = variant.type, Path(variant.target)
        self.overrides = plan.as_pairs(variant.tensor_types)
        self.imatrix = None if variant.imatrix is None else importance.read_imatrix(variant.imatrix)
        self.resume, self.allow_nonfinite = resume, allow_nonfinite
        self.overwrite, self.progress = overwrite, progress

    def job(self, source: Source) -> Job:
        """What the pipeline is to do. Raises as ``convert`` does."""
        types = plan.plan_types(
            ((tensor.name, tensor.shape) for tensor in source.tensors),
            self.type,
            pad=self.variant.pad,
            overrides=self.overrides,
            has_imatrix=self.imatrix is not None,
        )
        tensors = [planned_tensor(tensor, types) for tensor in source.tensors]
        notes = source.notes + types.notes
        covered: set[str] = set()
        if self.imatrix is not None:
            tensors, more = self._with_importance(tensors)
            notes += more
            covered = {tensor.name for tensor in tensors if tensor.importance is not None}
        plan.require_imatrix(types, covered)
        if self.allow_nonfinite:
            tensors, more = _keep_nonfinite(tensors)
            notes += more
        twice = [t for t in tensors if t.source_type not in _EXACT and t.source_type != t.target_type]
        notes += [f"{t.name}: quantized a second time, {t.source_type} -> {t.target_type}" for t in twice]
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

    def _with_importance(self, tensors: list[PlannedTensor]) -> tuple[list[PlannedTensor], list[str]]:
        result, notes = [], []
        for tensor in tensors:
            found = self.imatrix.importance(tensor.name, tensor.source_shape, tensor.n_per_row, notes)
            result.append(tensor if found is None else replace(tensor, importance=found))
        if all(tensor.importance is None for tensor in result):
            notes.append(f"{self.imatrix.path}: has no entry for any tensor of this model")
        return result, notes


def _keep_nonfinite(tensors: list[PlannedTensor]) -> tuple[list[PlannedTensor], list[str]]:
    """Tensors that hold NaN or infinities in a type that can hold them; a note for each."""
    result, notes = [], []
    for tensor in tensors:
        if tensor.has_nonfinite():
            kind, _ = split_name(tensor.name)
            kept = "F32" if kind in FLOAT32_KINDS else tensor.source_type
            tensor = replace(tensor, target_type=kept, importance=None, keeps_nonfinite=True)
            notes.append(f"{tensor.name}: holds NaN or infinite weights, kept as {kept}")
        result.append(tensor)
    return result, notes


def planned_tensor(tensor: SourceTensor, types: plan.TypePlan) -> PlannedTensor:
    """What becomes of a tensor of the source."""
    planned = types.tensors[tensor.name]
    read = padded_read(
        tensor.read,
        tensor.type,
        tensor.shape,
        planned.shape,
        2 if split_name(tensor.name)[0] == plan.FUSED_KIND else 1,
        tensor.name,
    )
    return PlannedTensor(tensor.name, planned.shape, tensor.type, planned.type, read, tensor.shape)
