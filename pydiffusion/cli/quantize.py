"""``pydiffusion quantize``: requantize a GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import _options
from ._conversion import (
    AllowNonfinite,
    ImatrixFile,
    Keep,
    Pad,
    Report,
    Resume,
    SourceFile,
    SplitMaxSize,
    TensorTypes,
    ThreadsForRows,
    Type,
    check_type,
    parse_overrides,
    parse_split_size,
    run_conversion,
)


def command(
    source: SourceFile,
    target: Annotated[
        Path, typer.Argument(metavar="OUT", help="Path of the GGUF file to write.", show_default=False)
    ],
    type: Type = "q4_k_m",
    pad: Pad = None,
    tensor_type: TensorTypes = None,
    imatrix: ImatrixFile = None,
    split_max_size: SplitMaxSize = None,
    resume: Resume = False,
    allow_nonfinite: AllowNonfinite = False,
    chat_template: _options.ChatTemplate = None,
    threads: ThreadsForRows = None,
    no_overwrite: Keep = False,
    as_json: Report = False,
) -> None:
    """Requantize a GGUF file. Verifies every tensor written."""
    check_type(type)
    overrides = parse_overrides(tensor_type)
    from pydiffusion import convert

    run_conversion(
        convert.quantize,
        source,
        target,
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
    )
