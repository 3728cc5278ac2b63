"""``pydiffusion verify``: compare a GGUF with its source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from . import _open
from ._progress import conversion_progress, quiet_hub_in_a_pipe
from ._text import one_line, say


def command(
    file: Annotated[
        Path, typer.Argument(help="Path of the GGUF file; of a split one, any part.", show_default=False)
    ],
    against: Annotated[
        Path | None,
        typer.Option(
            "--against",
            help="Folder, repo id or GGUF file that it was made from.",
            show_default=False,
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            "--lora",
            metavar="PATH[:SCALE]",
            help="An adapter that was merged into the file (by convert --lora); may be repeated.",
        ),
    ] = None,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="List every tensor, not only the ten worst.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Compare every tensor of a GGUF file with its source. Exit code 1 on a mismatch."""
    from pydiffusion.convert import verify

    adapters = _open.adapters_of(lora)
    if adapters and against is None:
        raise typer.BadParameter("--lora goes with --against, the file without the adapter")
    quiet_hub_in_a_pipe()
    file = _open.model_file(file)
    with conversion_progress(file) as update:
        report = verify(file, against, lora=adapters, progress=update)
    if as_json:
        print(json.dumps(report.to_dict()))
    else:
        ordered = sorted(report.tensors, key=lambda check: -check.relative_error)
        print(f"{'tensor':40} {'type':8} {'RMSE':>9} {'relative':>9} {'cosine':>9}")
        for check in ordered if tensors else ordered[:10]:
            print(
                f"{one_line(check.name):40} {check.type:8} {check.rmse:9.2e} {check.relative_error:9.5f}"
                f" {check.cosine:9.6f}"
            )
    for problem in report.problems:
        say(problem)
    state = f"{len(report.problems)} problems" if report.problems else "no problem"
    say(f"{file.name}: {len(report.tensors)} tensors, {state}")
    if report.problems:
        raise typer.Exit(1)
