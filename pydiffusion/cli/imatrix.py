"""``pydiffusion imatrix``: collect an importance matrix for quantizing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import _open
from ._input import read_text
from ._options import Lora, Threads, output_file
from ._text import say


def command(
    model: Annotated[
        Path,
        typer.Argument(
            help="Path of a GGUF file with many bits per weight, such as bf16.", show_default=False
        ),
    ],
    text: Annotated[
        Path, typer.Argument(help="Path of a text similar to the model's output.", show_default=False)
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            parser=output_file,
            metavar="FILE",
            help="Path of the imatrix to write.",
            show_default=False,
        ),
    ],
    lines: Annotated[bool, typer.Option("--lines", help="Treat each line as a text of its own.")] = False,
    chunk: Annotated[
        int, typer.Option("--chunk", help="Maximum number of tokens encoded before a canvas.")
    ] = 512,
    max_chunks: Annotated[
        int | None, typer.Option("--max-chunks", help="Maximum number of chunks. [default: the whole text]")
    ] = None,
    threads: Threads = None,
    lora: Lora = None,
) -> None:
    """Collect an importance matrix (imatrix) from a text. Covers both encoding and denoising."""
    from pydiffusion import convert

    from ._progress import progress

    if chunk < 1 or (max_chunks is not None and max_chunks < 1):
        raise typer.BadParameter("--chunk and --max-chunks must be at least 1")
    adapters = _open.adapters_of(lora)
    content = read_text(text)
    model = _open.model_file(model)
    with progress(f"observing {model.name}") as update:
        report = convert.collect_imatrix(
            model,
            [line for line in content.splitlines() if line.strip()] if lines else content,
            output,
            chunk=chunk,
            max_chunks=max_chunks,
            datasets=[text.name],
            n_threads=threads,
            lora=adapters,
            progress=lambda state: update(state.done_bytes, state.total_bytes),
        )
    say(
        f"{output}: {report.n_entries} tensors, from {report.n_tokens} tokens encoded and {report.n_denoised}"
        f" denoised in {report.n_chunks} chunks"
    )
    if report.n_left_out:
        say(f"{report.n_left_out} texts of fewer than two tokens were left out")
    for name, experts in report.unreached.items():
        say(f"{name}: no token was routed to {len(experts)} experts; they get the average of the others")
