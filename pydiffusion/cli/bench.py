"""``pydiffusion bench``: benchmark a model on this machine."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import _open, _options
from ._text import say

if TYPE_CHECKING:
    from pydiffusion.testing.comparison import Setup

_Context = Annotated[
    int | None, typer.Option("--ctx", help="Context size in tokens. [default: what the run needs]")
]
_RUNTIME = {**_options.RUNTIME, "ctx": _Context}


@_options.takes(runtime=_RUNTIME)
def command(
    model: _options.ModelOrFirst = None,
    synthetic: Annotated[
        str | None,
        typer.Option(help="Benchmark random weights of this shape instead: 26b-a4b, mid or tiny."),
    ] = None,
    type: Annotated[str, typer.Option(help="Type of the synthetic weights.")] = "q4_k_m",
    prompt: Annotated[int, typer.Option(help="Number of prompt tokens.", min=1)] = 512,
    steps: Annotated[int, typer.Option(help="Number of denoising steps to time.", min=2)] = 8,
    *,
    runtime: dict[str, Any],
    mmproj: Annotated[
        Path | None,
        typer.Option(
            "-mm",
            "--mmproj",
            metavar="FILE",
            help="Time an image with this vision file too.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    against: Annotated[
        str | None,
        typer.Option(
            "--compare",
            help="What to compare with, in turns: another GGUF, settings of the same one by the names of the "
            "options (threads=1,kernels=ggml), or both (model=other.gguf,threads=1); or the report of an "
            "earlier run (--json), not in turns.",
        ),
    ] = None,
    autoregressive: Annotated[
        bool, typer.Option("--autoregressive", help="Read the same weights token by token too.")
    ] = False,
) -> None:
    """Benchmark loading, prefill and denoising steps. Times each part, beside the machine's limits."""
    from pydiffusion._util.files import check_is_gguf
    from pydiffusion.testing import bench_report
    from pydiffusion.testing.autoregressive import measure_autoregressive
    from pydiffusion.testing.bench import run_bench
    from pydiffusion.testing.comparison import compare_in_turns
    from pydiffusion.testing.image_bench import bench_images

    if (model is None) == (synthetic is None):
        raise typer.BadParameter("give either --model or --synthetic")
    earlier = _read_figures(Path(against)) if against is not None and _is_report(against) else None
    with tempfile.TemporaryDirectory(prefix="pydiffusion-bench-") as folder:
        path = _open.model_file(model) if model is not None else _make(synthetic, type, Path(folder))
        check_is_gguf(path)
        setup = _setup(path.name, path, runtime)
        other = None if against is None or earlier is not None else _other(against, path, runtime)
        result = run_bench(
            path, setup.n_threads, n_prompt=prompt, n_steps=steps, n_ctx=setup.n_ctx, **setup.options
        )
        report, texts = result.to_dict(), [bench_report.format_result(result)]
        if autoregressive:
            reading = measure_autoregressive(setup, prompt, steps)
            report["autoregressive"] = reading.to_dict()
            texts.append(bench_report.format_autoregressive(reading, result.read_limit))
        if mmproj is not None:
            images = bench_images(setup, mmproj)
            report["images"] = images.to_dict()
            texts.append(bench_report.format_images(images))
        if other is not None:
            comparison = compare_in_turns(setup, other, prompt, steps)
            report["comparison"] = comparison.to_dict()
            texts.append(bench_report.format_comparison(comparison))
    print(json.dumps(report) if as_json else "\n\n".join(texts))
    if earlier is not None:
        text = bench_report.compare_with_earlier(result, earlier)
        say(text) if as_json else print(f"\n{text}")


def _setup(name: str, path: Path, runtime: Mapping[str, Any]) -> Setup:
    """A file with these runtime options; on the CPU unless they name devices."""
    from pydiffusion._util.cpus import step_threads
    from pydiffusion.testing.comparison import Setup

    options = _open.runtime_arguments(runtime)
    n_threads = options.pop("n_threads") or step_threads().n
    del options["n_ctx"]  # default: as much as the run needs
    return Setup(name, path, n_threads, runtime["ctx"], options)


def _other(against: str, path: Path, runtime: Mapping[str, Any]) -> Setup:
    """The file, or the settings, that ``--compare`` names; a usage error for what is neither."""
    from pydiffusion._util.files import check_is_gguf

    if "=" not in against and not Path(against).exists():
        raise typer.BadParameter(f"--compare {against}: neither a file nor settings, as in threads=1")
    if Path(against).exists():
        check_is_gguf(Path(against))
        return _setup(Path(against).name, Path(against), runtime)
    chosen = dict(runtime)
    for setting in against.split(","):
        name, equals, value = setting.partition("=")
        key = name.strip().replace("-", "_")
        if name == "model" and value:
            path = Path(value)
            check_is_gguf(path)
        elif key == "lora" and value:
            chosen[key] = None if value == "none" else [value]
        elif key in _RUNTIME and value:
            chosen[key] = _number(name, value) if key in ("ctx", "threads", "n_cpu_moe") else value
        else:
            known = ", ".join(["model", *(key.replace("_", "-") for key in _RUNTIME)])
            what = f"no setting {name!r}" if equals else f"{setting!r} is not NAME=VALUE"
            raise typer.BadParameter(f"--compare {against}: {what}; settings are {known}, as in threads=1")
    return _setup(against, path, chosen)


def _number(name: str, value: str) -> int:
    if not value.isdecimal():
        raise typer.BadParameter(f"--compare: {name} is {value!r}; permitted is an integer")
    return int(value)


def _make(shape: str | None, type_name: str, folder: Path) -> Path:
    from pydiffusion.testing.synthetic import SHAPES, write_synthetic

    from ._progress import progress

    if shape is None or shape not in SHAPES:
        raise typer.BadParameter(f"--synthetic is {shape!r}; known are {', '.join(SHAPES)}")
    with progress(f"writing {shape} {type_name}") as update:
        target = folder / f"{shape}-{type_name}.gguf"
        return write_synthetic(shape, target, type_name, progress=lambda share: update(share, 1.0))


def _is_report(against: str) -> bool:
    """Whether it names a file that is not a GGUF."""
    path = Path(against)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) != b"GGUF"


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
