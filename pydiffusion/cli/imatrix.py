"""``pydiffusion imatrix``: activation statistics for quantizing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._common import Threads, read_text, say


def command(
    model: Annotated[Path, typer.Argument(help="GGUF of many bits, such as bf16.", show_default=False)],
    text: Annotated[Path, typer.Argument(help="Text like what it will write.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write.", show_default=False)],
    lines: Annotated[bool, typer.Option("--lines", help="Every line is a text of its own.")] = False,
    chunk: Annotated[int, typer.Option("--chunk", help="Tokens encoded before a canvas, at most.")] = 512,
    max_chunks: Annotated[
        int | None, typer.Option("--max-chunks", help="Stop after so many. [default: the whole text]")
    ] = None,
    threads: Threads = None,
) -> None:
    """Gather activation statistics over reading and denoising a text, for convert --imatrix."""
    from pydiffusion import convert

    from ._display import progress

    if chunk < 1 or (max_chunks is not None and max_chunks < 1):
        raise typer.BadParameter("--chunk and --max-chunks take numbers of at least 1")
    content = read_text(text)
    with progress(f"observing {model.name}") as update:
        report = convert.collect_imatrix(
            model,
            [line for line in content.splitlines() if line.strip()] if lines else content,
            output,
            chunk=chunk,
            max_chunks=max_chunks,
            datasets=[text.name],
            n_threads=threads,
            progress=lambda state: update(state.done_bytes, state.total_bytes),
        )
    say(
        f"{output}: {report.n_entries} tensors, from {report.n_tokens} tokens encoded and {report.n_denoised}"
        f" denoised in {report.n_chunks} chunks"
    )
    if report.n_left_out:
        say(f"{report.n_left_out} texts of fewer than two tokens were left out")
    for name, experts in report.unreached.items():
        say(f"{name}: no token reached {len(experts)} experts; they will get the average of the others")
