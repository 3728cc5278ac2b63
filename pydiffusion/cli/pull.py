"""``pydiffusion pull``: download a model from the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import _open
from ._text import say


def command(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help="OWNER/NAME[@REVISION][:FILE or TYPE]; TYPE as in Q8_0.", show_default=False
        ),
    ],
) -> None:
    """Download a GGUF from the Hugging Face Hub to its cache, or update it there, and print its path."""
    from pydiffusion._util import hub

    if hub.model_reference(model) is None:
        if model.exists():
            say(f"{model} is a file here; nothing is downloaded")
            print(model)
            return
        raise typer.BadParameter(
            f"{model} is no repo; give OWNER/NAME[:FILE or TYPE] of the Hugging Face Hub"
        )
    print(_open.model_file(model, refresh=True))
