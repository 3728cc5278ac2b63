"""What several commands share: option types, opening a model, asking for options in range."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .text import count, one_line

if TYPE_CHECKING:
    from pydiffusion import DiffusionModel, GenerationOptions

ModelPath = Annotated[Path, typer.Option("-m", "--model", help="The model, a GGUF file.", show_default=False)]
Context = Annotated[
    int | None, typer.Option("--ctx", help="Tokens of context. [default: 8192 or the model's]")
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", help="Threads that compute. [default: the CPUs this process may use]"),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        "-n", "--max-tokens", help="Tokens to generate at most. [default: up to the end of the context]"
    ),
]
Steps = Annotated[
    int | None, typer.Option("--steps", help="Denoising steps per canvas at most. [default: the file's]")
]
Seed = Annotated[
    int | None, typer.Option("--seed", help="Repeats a generation. [default: drawn, and reported]")
]
TMin = Annotated[
    float | None, typer.Option("--t-min", help="Temperature of the last step. [default: the file's]")
]
TMax = Annotated[
    float | None, typer.Option("--t-max", help="Temperature of the first step. [default: the file's]")
]
EntropyBound = Annotated[
    float | None,
    typer.Option("--entropy-bound", help="Accept tokens within this sum of entropies. [default: the file's]"),
]
StabilityThreshold = Annotated[
    int | None,
    typer.Option(
        "--stability-threshold", help="Stop a canvas after so many equal drafts. [default: the file's]"
    ),
]
ConfidenceThreshold = Annotated[
    float | None,
    typer.Option(
        "--confidence-threshold", help="And when the mean entropy is below this. [default: the file's]"
    ),
]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", help="Cut the text at this string; may be given several times.")
]

JsonSchema = Annotated[
    Path | None,
    typer.Option("--json-schema", help="A file with a JSON schema that the text has to satisfy."),
]
Regex = Annotated[
    str | None, typer.Option("--regex", help="A regular expression that the whole text has to match.")
]


def say(message: str) -> None:
    """A line for the person, on stderr."""
    print(one_line(message), file=sys.stderr, flush=True)


def quiet_hub_in_a_pipe() -> None:
    """No progress bars of huggingface_hub where they would be lines upon lines; to be called before its
    import.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def make_options(model: DiffusionModel | None = None, **choices: Any) -> GenerationOptions:
    """GenerationOptions from the command line; a value out of range is wrong use of it (exit code 2)."""
    from pydiffusion import GenerationOptions

    if model is not None and choices.get("max_tokens") is None:
        choices["max_tokens"] = model.n_ctx
    try:
        return GenerationOptions(**choices)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def open_model(path: Path, ctx: int | None, threads: int | None) -> DiffusionModel:
    """Load a model with its progress shown."""
    from pydiffusion.model import DEFAULT_N_CTX, DiffusionModel

    from .display import progress

    if threads is not None and threads < 1:
        raise typer.BadParameter(f"--threads is {threads}; permitted is an integer of at least 1")
    if ctx is not None and ctx < 1:
        raise typer.BadParameter(f"--ctx is {ctx}; permitted is an integer of at least 1")
    started = time.perf_counter()
    with progress(f"loading {path.name}") as update:
        model = DiffusionModel(
            path,
            n_ctx=DEFAULT_N_CTX if ctx is None else ctx,
            n_threads=threads,
            progress=lambda share: update(share, 1.0),
        )
    weights = count(model.description["n_weights"])
    size = count(model.description["n_bytes"], "B")
    say(
        f"{path.name}: {weights} weights, {size}, context {model.n_ctx}, {model.n_threads} threads,"
        f" loaded in {time.perf_counter() - started:.1f} s"
    )
    return model
