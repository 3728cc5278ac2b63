"""``pydiffusion quantize``: requantize a GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import _open, _options
from ._conversion import (
    AllowNonfinite,
    ImatrixFile,
    Keep,
    MergedLora,
    Pad,
    Report,
    Resume,
    SourceFile,
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


def command(
    context: typer.Context,
    source: SourceFile,
    target: Annotated[
        Path | None,
        typer.Argument(
            metavar="OUT",
            parser=_options.output_file,
            help="Path of the GGUF file to write. [default: IN-TYPE.gguf beside IN]",
            show_default=False,
        ),
    ] = None,
    type_argument: Annotated[
        str | None, typer.Argument(metavar="TYPE", help="As --type.", show_default=False)
    ] = None,
    threads_argument: Annotated[
        int | None, typer.Argument(metavar="THREADS", help="As --threads.", show_default=False)
    ] = None,
    type: Type = "q4_k_m",
    pad: Pad = None,
    tensor_type: TensorTypes = None,
    imatrix: ImatrixFile = None,
    lora: MergedLora = None,
    split_max_size: SplitMaxSize = None,
    resume: Resume = False,
    allow_nonfinite: AllowNonfinite = False,
    chat_template: _options.ChatTemplate = None,
    threads: ThreadsForRows = None,
    no_overwrite: Keep = False,
    as_json: Report = False,
) -> None:
    """Requantize a GGUF file. Verifies every tensor written."""
    if target is not None and _is_type(target):  # OUT is left out
        if type_argument is not None:
            threads_argument = _number_of_threads(type_argument)
        target, type_argument = None, str(target)
    if target is None and type_argument is None and not given(context, "type"):
        raise typer.BadParameter("give OUT, the file to write, or TYPE")
    if type_argument is not None and given(context, "type"):
        raise typer.BadParameter(f"the type is given twice: {type_argument} and --type {type}")
    if threads_argument is not None and threads is not None:
        raise typer.BadParameter(f"the threads are given twice: {threads_argument} and --threads {threads}")
    type = parse_type(type_argument or type)
    local = _open.model_file(source)
    if target is None:  # beside the source, but for a repo's here
        target = (local if local == source else Path(local.name)).with_name(f"{local.stem}-{type}.gguf")
    overrides, adapters = parse_overrides(tensor_type), _open.adapters_of(lora)
    from pydiffusion import convert

    run_conversion(
        convert.quantize,
        local,
        target,
        as_json,
        type=type,
        pad=pad,
        tensor_types=overrides,
        imatrix=imatrix,
        split_max_size=parse_split_size(split_max_size),
        resume=resume,
        allow_nonfinite=allow_nonfinite,
        n_threads=threads_argument if threads is None else threads,
        overwrite=not no_overwrite,
        chat_template=chat_template,
        lora=adapters,
    )


def _number_of_threads(text: str) -> int:
    if not text.isdecimal():
        raise typer.BadParameter(f"{text} is neither the number of threads nor, after a type, an argument")
    return int(text)


def _is_type(target: Path) -> bool:
    """Whether the second argument is a type, as for llama-quantize, whose OUT may be left out."""
    from pydiffusion.convert import recipe_name

    try:
        recipe_name(str(target))
    except ValueError:
        return False
    return True
