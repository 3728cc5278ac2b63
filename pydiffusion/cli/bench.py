"""``pydiffusion bench``: benchmark a model on this machine."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from . import _open, _options
from ._text import say

_Context = Annotated[
    int | None, typer.Option("--ctx", help="Context size in tokens. [default: what the run needs]")
]
_RUNTIME = {**_options.RUNTIME, "ctx": _Context}


@_options.takes(runtime=_RUNTIME)
def command(
    model: Annotated[Path | None, typer.Option("-m", "--model", help="Path of the GGUF file.")] = None,
    synthetic: Annotated[
        str | None,
        typer.Option(help="Benchmark random weights of this shape instead: 26b-a4b, mid or tiny."),
    ] = None,
    type: Annotated[str, typer.Option(help="Type of the synthetic weights.")] = "q4_k_m",
    prompt: Annotated[int, typer.Option(help="Number of prompt tokens.", min=1)] = 512,
    steps: Annotated[int, typer.Option(help="Number of denoising steps to time.", min=2)] = 8,
    *,
    runtime: dict[str, Any],
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    against: Annotated[
        Path | None,
        typer.Option("--compare", help="Path of the report of an earlier run (--json) to compare with."),
    ] = None,
) -> None:
    """Benchmark loading, prefill and denoising steps. Times each part, beside the machine's limits."""
    from pydiffusion._util.cpus import step_threads
    from pydiffusion._util.files import check_is_file
    from pydiffusion.testing.bench import compare, format_result, run_bench

    if (model is None) == (synthetic is None):
        raise typer.BadParameter("give either --model or --synthetic")
    arguments = _open.runtime_arguments(runtime)
    n_threads = arguments.pop("n_threads") or step_threads().n
    n_ctx = arguments.pop("n_ctx") and runtime["ctx"]  # default: as much as the run needs
    before = None if against is None else _read_figures(against)
    with tempfile.TemporaryDirectory(prefix="pydiffusion-bench-") as folder:
        path = model if model is not None else _make(synthetic, type, Path(folder))
        check_is_file(path)
        result = run_bench(path, n_threads, n_prompt=prompt, n_steps=steps, n_ctx=n_ctx, **arguments)
    if as_json:
        print(json.dumps(result.to_dict()))
    else:
        print(format_result(result))
    if before is not None:
        say("")
        print(compare(result, before))


def _make(shape: str | None, type_name: str, folder: Path) -> Path:
    from pydiffusion.testing.synthetic import SHAPES, write_synthetic

    from ._progress import progress

    if shape is None or shape not in SHAPES:
        raise typer.BadParameter(f"--synthetic is {shape!r}; known are {', '.join(SHAPES)}")
    with progress(f"writing {shape} {type_name}") as update:
        target = folder / f"{shape}-{type_name}.gguf"
        return write_synthetic(shape, target, type_name, progress=lambda share: update(share, 1.0))


def _read_figures(path: Path) -> dict:
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))
        for key in ("model", "load_seconds", "prefill_tokens_per_second", "step_seconds", "parts"):
            figures[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise typer.BadParameter(
            f"--compare {path}: not the result of an earlier --json run ({error})"
        ) from None
    return figures
