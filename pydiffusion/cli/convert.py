"""``pydiffusion convert``: convert a Hugging Face checkpoint to GGUF."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from pydiffusion._util.sizes import count, format_size, parse_size

from . import _open, _options
from ._conversion import (
    AllowNonfinite,
    ImatrixFile,
    Keep,
    MergedLora,
    Pad,
    Report,
    Resume,
    SplitMaxSize,
    TensorTypes,
    ThreadsForRows,
    Type,
    given,
    parse_overrides,
    parse_split_size,
    parse_type,
    run_conversion,
)
from ._progress import quiet_hub_in_a_pipe
from ._text import say


def command(
    context: typer.Context,
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder with config.json and *.safetensors, or a repo id on the Hugging Face Hub "
            "(OWNER/NAME[@REVISION]).",
            show_default=False,
        ),
    ],
    target: Annotated[
        Path | None,
        typer.Argument(metavar="OUT", parser=_options.output_file, help="As --output.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            "--outfile",
            parser=_options.output_file,
            metavar="FILE",
            help="Path of the GGUF file to write. [default: FOLDER-TYPE.gguf here]",
        ),
    ] = None,
    type: Type = "q4_k_m",
    fit: Annotated[
        str | None,
        typer.Option(
            "--fit",
            metavar="SIZE",
            help="Choose the best type that fits this memory (16GiB) with cache and buffers, "
            "instead of --type.",
            show_default=False,
        ),
    ] = None,
    ctx: Annotated[
        int, typer.Option("--ctx", help="Context size in tokens that --fit and --dry-run count with.")
    ] = 4096,
    pad: Pad = None,
    tensor_type: TensorTypes = None,
    imatrix: ImatrixFile = None,
    lora: MergedLora = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Only print types, bytes and bits per weight; needs only config.json."
        ),
    ] = False,
    mmproj: Annotated[
        bool,
        typer.Option(
            "--mmproj",
            help="Convert the vision tower and projector instead, for llama.cpp's multimodal library; "
            "--type is bf16 (default), f32, f16 or q8_0.",
        ),
    ] = False,
    split_max_size: SplitMaxSize = None,
    resume: Resume = False,
    allow_nonfinite: AllowNonfinite = False,
    chat_template: _options.ChatTemplate = None,
    threads: ThreadsForRows = None,
    no_overwrite: Keep = False,
    as_json: Report = False,
) -> None:
    """Convert a Hugging Face folder or repo to GGUF. Verifies every tensor written."""
    if target is not None and output is not None:
        raise typer.BadParameter(f"the file to write is given twice: {target} and --output {output}")
    output = output or target
    type = parse_type(type)
    quiet_hub_in_a_pipe()
    if mmproj:
        others = [pad is not None, tensor_type, imatrix, split_max_size, allow_nonfinite, fit, dry_run]
        if any([*others, chat_template, lora]):
            raise typer.BadParameter("--mmproj goes with --type, --resume and --threads only")
        if not given(context, "type"):
            type = "bf16"
        choices = {"type": type, "resume": resume, "n_threads": threads, "overwrite": not no_overwrite}
        convert_vision(source, output, as_json, choices)
        return
    overrides, adapters = parse_overrides(tensor_type), _open.adapters_of(lora)
    if fit is not None:
        if given(context, "type"):
            raise typer.BadParameter("--fit chooses the type: leave out --type, or --fit")
        type, overrides = choose_fitting(source, fit, ctx, pad, overrides, imatrix is not None)
    if dry_run:
        for note in check_adapters(source, adapters):
            say(f"note: {note}")
        print_sizes(source, type, pad, overrides, imatrix is not None, ctx, as_json)
        return
    from pydiffusion import convert

    run_conversion(
        convert.convert,
        source,
        output or Path(f"{model_name(source)}-{type}.gguf"),
        as_json,
        type=type,
        pad=pad,
        tensor_types=overrides,
        imatrix=imatrix,
        split_max_size=parse_split_size(split_max_size),
        resume=resume,
        allow_nonfinite=allow_nonfinite,
        n_threads=threads,
        overwrite=not no_overwrite,
        chat_template=chat_template,
        lora=adapters,
    )


def check_adapters(source: Path, adapters: list[tuple[str, float]]) -> list[str]:
    """Notes on what merging adapters would change, for a dry run."""
    if not adapters:
        return []
    from pydiffusion import convert
    from pydiffusion.adapters.merging import check_merge

    return check_merge(convert.read_shape(source), adapters)


def convert_vision(source: Path, output: Path | None, as_json: bool, choices: dict[str, Any]) -> None:
    """Convert the vision part of a checkpoint; a usage error for an unsupported type."""
    from pydiffusion import convert

    if choices["type"] not in convert.MMPROJ_TYPES:
        raise typer.BadParameter(f"--mmproj: --type is one of {', '.join(convert.MMPROJ_TYPES)}")
    target = output or Path(f"mmproj-{model_name(source)}-{choices['type']}.gguf")
    run_conversion(convert.convert_mmproj, source, target, as_json, **choices)


def model_name(source: Path) -> str:
    """Name of a folder or repo, for the default target."""
    from pydiffusion.convert import repo_id

    repo = repo_id(source)
    return source.resolve().name if repo is None else repo[0].partition("/")[2]


def choose_fitting(
    source: Path, size: str, ctx: int, pad: bool | None, overrides: list[tuple[str, str]], has_imatrix: bool
) -> tuple[str, list[tuple[str, str]]]:
    """Choose type and overrides of the best recipe that fits, and print them."""
    from pydiffusion import convert

    try:
        n_bytes = parse_size(size)
    except ValueError as error:
        raise typer.BadParameter(f"--fit: {error}") from None
    plan, memory = convert.fit(
        source, n_bytes, n_ctx=ctx, pad=pad, tensor_types=overrides, has_imatrix=has_imatrix
    )
    extras = " ".join(f"--tensor-type {shlex.quote(f'{pattern}={name}')}" for pattern, name in plan.overrides)
    say(
        f"--fit {size}: --type {plan.type} {extras}: {format_size(plan.n_bytes)} of weights,"
        f" {plan.bits_per_weight:.2f} bits per weight, {format_size(memory.total)} in all"
    )
    return plan.type, list(plan.overrides)


def print_sizes(
    source: Path,
    type: str,
    pad: bool | None,
    overrides: list[tuple[str, str]],
    has_imatrix: bool,
    ctx: int,
    as_json: bool,
) -> None:
    """Print the table of a dry run."""
    from pydiffusion import convert

    plan = convert.plan_sizes(source, type, pad=pad, tensor_types=overrides, has_imatrix=has_imatrix)
    memory = convert.estimate_memory(convert.read_shape(source), plan, ctx)
    if as_json:
        extra = {"n_ctx": ctx, "total": memory.total, **dataclasses.asdict(memory)}
        print(json.dumps(plan.to_dict() | {"memory": extra}))
        return
    print(f"{'tensors':24} {'type':8} {'number':>6} {'weights':>9} {'bytes':>9} {'bits per weight':>15}")
    for kind, type_name, number, n_weights, n_bytes in plan.by_kind():
        bits = 8 * n_bytes / n_weights
        print(
            f"{kind:24} {type_name:8} {number:6} {count(n_weights):>9} {format_size(n_bytes):>9} {bits:15.2f}"
        )
    total = f"{count(plan.n_weights):>9} {format_size(plan.n_bytes):>9} {plan.bits_per_weight:15.2f}"
    print(f"{'all':24} {plan.type:8} {len(plan.tensors):6} {total}")
    print(
        f"memory with a context of {ctx}: {format_size(memory.weights)} weights, {format_size(memory.cache)}"
        f" cache, about {format_size(memory.buffers)} buffers, {format_size(memory.reserve)} kept free:"
        f" {format_size(memory.total)}"
    )
    for line in plan.fallbacks:
        print(f"instead of the type asked for: {line}")
    for note in plan.notes:
        print(f"note: {note}")
