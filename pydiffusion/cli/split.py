"""``pydiffusion split``: split a GGUF into parts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import _open, _options
from ._conversion import Keep, Report, Resume, SourceFile, parse_split_size, run_conversion


def command(
    source: SourceFile,
    target: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            parser=_options.output_file,
            help="Path NAME.gguf, for parts NAME-00001-of-0000N.gguf.",
            show_default=False,
        ),
    ],
    split_max_size: Annotated[
        str,
        typer.Option(
            "--split-max-size", metavar="SIZE", help="Maximum size of a part (5G; 4GiB).", show_default=False
        ),
    ],
    resume: Resume = False,
    no_overwrite: Keep = False,
    as_json: Report = False,
) -> None:
    """Split a GGUF file of any architecture. Verifies every tensor written."""
    from pydiffusion import convert

    run_conversion(
        convert.repack,
        _open.model_file(source),
        target,
        as_json,
        split_max_size=parse_split_size(split_max_size),
        resume=resume,
        overwrite=not no_overwrite,
    )
