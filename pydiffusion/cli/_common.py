"""What several commands share: option types, opening a model, asking for options in range."""

from __future__ import annotations

import inspect
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from ._text import count, one_line

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
Steps = Annotated[
    int | None, typer.Option("--steps", help="Denoising steps per canvas at most. [default: the file's]")
]
#: Options of a generation by the names of GenerationOptions' fields: those of the sampler, and all.
SAMPLER: dict[str, Any] = {
    "steps": Steps,
    "seed": Annotated[
        int | None, typer.Option("--seed", help="Repeats a generation. [default: drawn, and reported]")
    ],
    "t_min": Annotated[
        float | None, typer.Option("--t-min", help="Temperature of the last step. [default: the file's]")
    ],
    "t_max": Annotated[
        float | None, typer.Option("--t-max", help="Temperature of the first step. [default: the file's]")
    ],
    "entropy_bound": Annotated[
        float | None,
        typer.Option(
            "--entropy-bound", help="Accept tokens within this sum of entropies. [default: the file's]"
        ),
    ],
    "stability_threshold": Annotated[
        int | None,
        typer.Option(
            "--stability-threshold", help="Stop a canvas after so many equal drafts. [default: the file's]"
        ),
    ],
    "confidence_threshold": Annotated[
        float | None,
        typer.Option(
            "--confidence-threshold", help="And when the mean entropy is below this. [default: the file's]"
        ),
    ],
}
TEXT: dict[str, Any] = {
    "max_tokens": Annotated[
        int | None,
        typer.Option(
            "-n", "--max-tokens", help="Tokens to generate at most. [default: up to the end of the context]"
        ),
    ],
    **SAMPLER,
    "stop": Annotated[
        list[str] | None,
        typer.Option("--stop", help="Cut the text at this string; may be given several times."),
    ],
    "thinking_budget": Annotated[
        int | None,
        typer.Option("--thinking-budget", help="Tokens for thinking; then the answer. [default: no limit]"),
    ],
    "stop_on_repetition": Annotated[
        bool | None,
        typer.Option("--stop-on-repetition", help="End a text that only goes round."),
    ],
    "trim_after_eos": Annotated[
        bool | None,
        typer.Option("--trim-after-eos", help="Spare the work behind an eos that has settled."),
    ],
}

JsonSchema = Annotated[
    Path | None,
    typer.Option("--json-schema", help="A file with a JSON schema that the text has to satisfy."),
]
Regex = Annotated[
    str | None, typer.Option("--regex", help="A regular expression that the whole text has to match.")
]


#: Where a model computes, and with how much room.
PLACE: dict[str, Any] = {
    "ctx": Context,
    "threads": Threads,
    "gpu_layers": Annotated[
        str | None,
        typer.Option(
            "--gpu-layers", help="Layers on GPUs, the last ones; 0: none. [default: as many as fit]"
        ),
    ],
    "n_cpu_moe": Annotated[
        int | None,
        typer.Option(
            "--n-cpu-moe",
            help="Layers, the last ones, whose experts stay with the processor. [default: as few as needed]",
        ),
    ],
    "gpu_memory": Annotated[
        str | None,
        typer.Option(
            "--gpu-memory", help="Of each GPU, so much at most (8G; 8G,24G). [default: what is free]"
        ),
    ],
    "device": Annotated[
        str | None,
        typer.Option(help="cpu, or GPUs that `pydiffusion devices` lists (CUDA0,CUDA1). [default: all GPUs]"),
    ],
    "kernels": Annotated[
        str | None,
        typer.Option(
            help="What multiplies on the processor: ggml, avx512-bf16 or amx. [default: the fastest known]"
        ),
    ],
    "cache_type": Annotated[
        str | None,
        typer.Option(
            "--cache-type",
            help="Type of the KV cache: f32 or f16; q8_0 halves it, and hurts Gemma 4. [default: f16]",
        ),
    ],
}


def takes(**groups: Mapping[str, Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command that has these options, too: for each of its function's parameters that is named here, a dict
    of what was given takes their place.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def wrapped(**given: Any) -> None:
            for group, options in groups.items():
                chosen = {name: given.pop(name) for name in options}
                given[group] = {name: None if v == [] else v for name, v in chosen.items()}
            command(**given)

        hints = get_type_hints(command, include_extras=True)
        parameters: list[inspect.Parameter] = []

        def add(name: str, hint: Any, default: Any) -> None:
            kind = inspect.Parameter.KEYWORD_ONLY
            parameters.append(inspect.Parameter(name, kind, default=default, annotation=hint))

        for name, parameter in inspect.signature(command).parameters.items():
            if name not in groups:
                add(name, hints[name], parameter.default)
                continue
            for option, hint in groups[name].items():
                add(option, hint, None)
        wrapped.__doc__ = command.__doc__
        wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return wrapped

    return decorate


def placement(place: Mapping[str, Any]) -> dict[str, Any]:
    """The options of PLACE as arguments of ``DiffusionModel``; what is out of range is wrong use."""
    from pydiffusion import _native
    from pydiffusion.convert.quantization.sizes import parse_size
    from pydiffusion.device_plan import KV_TYPES, native_wish
    from pydiffusion.model import DEFAULT_N_CTX

    threads, ctx, layers = place.get("threads"), place.get("ctx"), place.get("gpu_layers")
    if threads is not None and threads < 1:
        raise typer.BadParameter(f"--threads is {threads}; permitted is an integer of at least 1")
    if ctx is not None and ctx < 1:
        raise typer.BadParameter(f"--ctx is {ctx}; permitted is an integer of at least 1")
    if layers is not None and layers != "auto" and not layers.isdecimal():
        raise typer.BadParameter(f"--gpu-layers is {layers}; permitted is auto or an integer of at least 0")
    cache_type = place.get("cache_type") or "auto"
    if cache_type not in KV_TYPES:
        raise typer.BadParameter(f"--cache-type is {cache_type}; permitted are f32, f16 and q8_0")
    kernels = place.get("kernels") or "auto"
    if kernels not in ("auto", *_native.kernels()):
        there = ", ".join(_native.kernels())
        raise typer.BadParameter(f"--kernels is {kernels}; this processor has {there}")
    wish: dict[str, Any] = {
        "n_gpu_layers": "auto" if layers in (None, "auto") else int(layers),
        "n_cpu_moe": place.get("n_cpu_moe"),
        "device": place.get("device") or "auto",
    }
    try:
        memory = place.get("gpu_memory")
        sizes = [] if memory is None else [parse_size(size) for size in memory.split(",")]
        wish["gpu_memory"] = sizes if len(sizes) > 1 else sizes[0] if sizes else None
        native_wish(**wish)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return {
        "n_ctx": DEFAULT_N_CTX if ctx is None else ctx,
        "n_threads": threads,
        "kv_type": cache_type,
        "kernels": kernels,
        **wish,
    }


def read_text(path: Path) -> str:
    """A file's text. Raises ValueError, with where, for what is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 (byte {error.start}): convert it, as by 'iconv -f LATIN1 -t UTF-8'"
        ) from None


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


def open_model(path: Path, place: Mapping[str, Any], n_sessions: int = 1) -> DiffusionModel:
    """Load a model with its progress shown. place: what was given of PLACE."""
    from pydiffusion.model import DiffusionModel

    from ._display import progress

    arguments = placement(place) | {"n_sessions": n_sessions}
    started = time.perf_counter()
    with progress(f"loading {path.name}") as update:
        model = DiffusionModel(path, progress=lambda share: update(share, 1.0), **arguments)
    weights = count(model.description["n_weights"])
    size = count(model.description["n_bytes"], "B")
    say(
        f"{path.name}: {weights} weights, {size}, context {model.n_ctx}, {_where(model)},"
        f" loaded in {time.perf_counter() - started:.1f} s"
    )
    return model


def _where(model: DiffusionModel) -> str:
    d = model.description
    if d["n_gpu_layers"] == 0:
        return f"{model.n_threads} threads"
    left = f", experts of {d['n_cpu_moe']} on {model.n_threads} threads" if d["n_cpu_moe"] else ""
    shares = [f"{n} on {name}" for n, name in zip(d["device_layers"], d["backend"].split(","), strict=True)]
    if len(shares) == 1:
        return f"{d['n_gpu_layers']} of {model.hparams['n_layer']} layers on {d['backend']}{left}"
    return f"{d['n_gpu_layers']} of {model.hparams['n_layer']} layers, {', '.join(shares)}{left}"
