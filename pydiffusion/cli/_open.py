"""Open a model and build its options from the command line."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from pydiffusion._util.sizes import count, format_size

from ._input import read_schema, read_text_or_stdin
from ._text import say

if TYPE_CHECKING:
    from pydiffusion import DiffusionModel, GenerationOptions

_ALL_LAYERS = 999  # more than any model has


def runtime_arguments(runtime: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``DiffusionModel`` from the RUNTIME options; a usage error for a value out of range."""
    from pydiffusion import _native
    from pydiffusion._util.cpus import too_many_threads
    from pydiffusion.convert import parse_size
    from pydiffusion.device_plan import DEFAULT_N_CTX, KV_TYPES, device_request

    threads, ctx = runtime.get("threads"), runtime.get("ctx")
    if threads is not None and threads < 1:
        raise typer.BadParameter(f"--threads is {threads}; permitted is an integer of at least 1")
    if threads is not None and (warning := too_many_threads(threads)):
        say(f"pydiffusion: warning: --threads: {warning}")
    if ctx is not None and ctx < 1:
        raise typer.BadParameter(
            f"--ctx is {ctx}; permitted is an integer of at least 1 (the default is 8192)"
        )
    cache_type = runtime.get("cache_type") or "auto"
    if cache_type not in KV_TYPES:
        raise typer.BadParameter(f"--cache-type is {cache_type}; permitted are f32, f16 and q8_0")
    kernels = runtime.get("kernels") or "auto"
    if kernels not in ("auto", "cuda", *_native.kernels()) or (kernels == "cuda" and not _native.devices()):
        there = ", ".join(_native.kernels())
        raise typer.BadParameter(f"--kernels is {kernels}; this CPU has {there}, a GPU ggml and cuda")
    request: dict[str, Any] = {
        "n_gpu_layers": _gpu_layers(runtime.get("gpu_layers"), runtime.get("device")),
        "n_cpu_moe": runtime.get("n_cpu_moe"),
        "device": runtime.get("device") or "auto",
        "dense_type": runtime.get("dense_type") or "auto",
    }
    template = runtime.get("chat_template")
    try:
        memory = runtime.get("gpu_memory")
        sizes = [] if memory is None else [parse_size(size) for size in memory.split(",")]
        request["gpu_memory"] = sizes if len(sizes) > 1 else sizes[0] if sizes else None
        device_request(**request)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return {
        "n_ctx": DEFAULT_N_CTX if ctx is None else ctx,
        "n_threads": threads,
        "kv_type": cache_type,
        "kernels": kernels,
        **request,
        **({} if template is None else {"chat_template": template}),
        **_mmproj(runtime.get("mmproj")),
        **({"lora": adapters_of(runtime["lora"])} if "lora" in runtime else {}),
    }


def adapters_of(given: Sequence[str] | None) -> list[tuple[str, float]]:
    """(source, scale) of each ``--lora``; a usage error for an unusable scale or an empty path."""
    from pydiffusion import OptionError
    from pydiffusion.adapters.loading import parse_lora

    try:
        return [parse_lora(text) for text in given or ()]
    except OptionError as error:
        raise typer.BadParameter(f"--{error}") from None


def _mmproj(given: Path | None) -> dict[str, Any]:
    """The argument of ``DiffusionModel`` for the vision file; by default it looks for one."""
    if given is None:
        return {}
    return {"mmproj": None if str(given) == "none" else given}


def _gpu_layers(given: str | None, device: str | None) -> int | str:
    """Where no GPU is, a warning and none: commands with ``-ngl 99`` are passed on and run anywhere."""
    from pydiffusion import _native

    if given is None or given == "auto":
        return "auto"
    if given != "all" and not given.isdecimal():
        raise typer.BadParameter(
            f"--gpu-layers is {given}; permitted is auto, all or an integer of at least 0"
        )
    n_layers = _ALL_LAYERS if given == "all" else int(given)
    if n_layers == 0 or device is not None or _native.devices():
        return n_layers
    say(
        f"pydiffusion: warning: --gpu-layers {given}: no GPU that this build supports was found"
        " (docs/gpu.md); all layers run on the CPU"
    )
    return 0


def model_file(given: Path, *, refresh: bool = False) -> Path:
    """The GGUF file that ``-m`` or an argument names: a path, or a model on the Hugging Face Hub, from the
    cache if it is there, else downloaded. refresh: ask the hub for a newer one.

    Raises PyDiffusionError if there is none, with what to do about it.
    """
    from pydiffusion._util import hub

    from ._progress import quiet_hub_in_a_pipe

    reference = hub.model_reference(given)
    if reference is None:
        return given
    quiet_hub_in_a_pipe()
    return hub.fetch_model(reference, refresh=refresh, announce=say)


def model_and_rest(
    model: Path | None, words: Sequence[str], *, first: bool = False
) -> tuple[Path, list[str]]:
    """The model of ``-m``, or the first word if it names one, and the other words; a usage error without.

    first: the first word is the model, whatever it looks like.
    """
    from pydiffusion._util.hub import model_reference

    if model is not None:
        return model, list(words)
    if words:
        text = words[0].strip()
        if first or text.endswith(".gguf") or Path(text).is_file() or model_reference(text) is not None:
            return Path(words[0]), list(words[1:])
    raise typer.BadParameter("give a model: -m FILE, or -m OWNER/NAME of the Hugging Face Hub")


def constraint_of(constraint: Mapping[str, Any]) -> dict[str, Any]:
    """The generation options of the CONSTRAINT options, files read."""
    grammar, grammar_file = constraint["grammar"], constraint["grammar_file"]
    if grammar is not None and grammar_file is not None:
        raise typer.BadParameter("give --grammar or --grammar-file, not both")
    schema = constraint["json_schema"]
    return {
        "json_schema": None if schema is None else read_schema(schema),
        "regex": constraint["regex"],
        "grammar": grammar if grammar_file is None else read_text_or_stdin(grammar_file),
    }


def check_options(choices: Mapping[str, Any]) -> None:
    """A usage error for options that no model could take: out of range, or a constraint that is invalid."""
    from pydiffusion.generation.constraints import check_constraint

    check_constraint(make_options(**choices))


def make_options(
    model: DiffusionModel | None = None, *, metadata: Mapping[str, Any] | None = None, **choices: Any
) -> GenerationOptions:
    """GenerationOptions from the command line; ``temperature`` gives those that it means, unless given. A
    usage error (exit code 2) for a value out of range.

    model: gives max_tokens, unless given, and the metadata, which else are given by themselves.
    """
    from pydiffusion import GenerationOptions
    from pydiffusion.options import at_temperature

    temperature = choices.pop("temperature", None)
    if model is not None and choices.get("max_tokens", 0) is None:  # of a command that has the option
        choices["max_tokens"] = model.n_ctx
    try:
        if temperature is not None:
            meant = at_temperature(temperature, metadata if model is None else model.metadata)
            choices = meant | {name: value for name, value in choices.items() if value is not None}
        return GenerationOptions(**choices)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def open_model(
    path: Path, runtime: Mapping[str, Any], n_sessions: int = 1, *, quiet: bool = False
) -> DiffusionModel:
    """Load a model, as ``model_file`` finds it, with a progress bar unless quiet. runtime: the given RUNTIME
    options.
    """
    from pydiffusion import DiffusionModel

    from ._progress import progress

    arguments = runtime_arguments(runtime) | {"n_sessions": n_sessions}
    path = model_file(path)
    started = time.perf_counter()
    with progress(f"loading {path.name}", quiet) as update:
        model = DiffusionModel(path, progress=lambda share: update(share, 1.0), **arguments)
    if quiet:
        return model
    weights = count(model.description["n_weights"])
    size = format_size(model.description["n_bytes"])
    say(
        f"{path.name}: {weights} weights, {size}, context {model.n_ctx}, {_where(model)},"
        + ("" if model.vision is None else f" images by {model.vision.path.name},")
        + "".join(f" adapter {adapter.name}:{scale:g}," for adapter, scale in model.lora)
        + f" loaded in {time.perf_counter() - started:.1f} s"
    )
    return model


def _where(model: DiffusionModel) -> str:
    d = model.description
    if d["n_gpu_layers"] == 0:
        return f"{model.n_threads} threads"
    wide = ", BF16 but for experts" if d["dense_type"] == "bf16" else ""
    left = f", experts of {d['n_cpu_moe']} on {model.n_threads} threads" if d["n_cpu_moe"] else ""
    shares = [f"{n} on {name}" for n, name in zip(d["device_layers"], d["backend"].split(","), strict=True)]
    if len(shares) == 1:
        return f"{d['n_gpu_layers']} of {model.hparams['n_layer']} layers on {d['backend']}{wide}{left}"
    return f"{d['n_gpu_layers']} of {model.hparams['n_layer']} layers, {', '.join(shares)}{wide}{left}"
