"""``pydiffusion doctor``: check a model on this machine, and write a page about it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from . import _open, _options
from ._text import say


@_options.takes(runtime=_options.CHAT_RUNTIME)
def command(
    model: Annotated[
        Path, typer.Argument(help="Path of the GGUF file; of a split one, any part.", show_default=False)
    ],
    reference: Annotated[
        Path | None,
        typer.Option(
            "--reference",
            help="Folder of the checkpoint that it was made from, to compare with; layers need torch and"
            " transformers.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            parser=_options.output_file,
            metavar="FILE",
            help="Also write the page to this file.",
            show_default=False,
        ),
    ] = None,
    *,
    runtime: dict[str, Any],
) -> None:
    """Check a model on this machine and print a page to post: tokens, template, stops, shapes, speed, memory.

    Exit code 1 if a check failed. The page has no folders, names of users and machines, or access tokens.
    """
    from pydiffusion._util import atomic
    from pydiffusion._util.files import check_is_gguf
    from pydiffusion.quality.doctor.examination import examine, page_of

    from ._progress import progress

    model = _open.model_file(model)
    check_is_gguf(model)
    if reference is not None and not reference.is_dir():
        raise typer.BadParameter(f"--reference: {reference} is not a folder")
    arguments = _open.runtime_arguments(runtime)
    target = None if output is None else atomic.resolve_target(output, [model], overwrite=True)
    with ExitStack() as stack:
        seen: dict[str, Any] = {}

        def show(what: str, share: float) -> None:
            if seen.get("what") != what:
                stack.close()
                seen.update(what=what, update=stack.enter_context(progress(what)))
            seen["update"](share, 1.0)

        report = examine(model, reference, runtime=arguments, progress=show)
    page = page_of(report, model, reference)
    print(page, end="")
    if target is not None:
        with atomic.replacing(target) as new:
            new.write(page.encode())
        say(f"{target.name}: written")
    if report.failed:
        raise typer.Exit(1)
