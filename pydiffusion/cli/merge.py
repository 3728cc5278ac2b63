"""``pydiffusion merge``: merge the parts of a split GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import _open, _options
from ._conversion import Keep, Report, Resume, run_conversion


def command(
    source: Annotated[
        Path,
        typer.Argument(metavar="IN", help="Path of any part, NAME-00001-of-0000N.gguf.", show_default=False),
    ],
    target: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            parser=_options.output_file,
            help="Path of the GGUF file to write.",
            show_default=False,
        ),
    ],
    resume: Resume = False,
    no_overwrite: Keep = False,
    as_json: Report = False,
) -> None:
    """Merge a split GGUF file of any architecture. Verifies every tensor written."""
    from pydiffusion import convert

    run_conversion(
        convert.repack, _open.model_file(source), target, as_json, resume=resume, overwrite=not no_overwrite
    )
