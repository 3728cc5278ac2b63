"""Options shared by several commands."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer


def output_file(text: str) -> Path:
    """The path of a file to write; a usage error for a folder, which a Path would not show: ``folder/``."""
    if text.endswith(("/", os.sep)) or not text.strip():
        raise typer.BadParameter(f"{text or 'an empty name'} is no file; give the name of the file to write")
    return Path(text)


#: What names a model: a file, or a repo on the hub. _open.model_file gives the file.
MODEL_HELP = "Path of the GGUF file, or OWNER/NAME[:FILE or TYPE] on the Hugging Face Hub."
ModelPath = Annotated[Path, typer.Option("-m", "--model", help=MODEL_HELP, show_default=False)]
#: Likewise, where the model may be the first argument instead.
ModelOrFirst = Annotated[Path | None, typer.Option("-m", "--model", help=MODEL_HELP, show_default=False)]
Context = Annotated[
    int | None,
    typer.Option(
        "-c",
        "--ctx",
        help="Context size in tokens. [default: 8192, or the model's if smaller]",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "-t",
        "--threads",
        callback=lambda value: None if value == -1 else value,
        help="Number of CPU threads. [default: one per core, within a container's quota]",
    ),
]
Steps = Annotated[
    int | None,
    typer.Option("--steps", help="Maximum number of denoising steps per canvas. [default: the file's]"),
]
#: Not a generation option: _open.make_options has those of ours that it means.
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temp",
        "--temperature",
        help="Temperature as in other programs: scales the file's --t-min and --t-max, by at least 0.5;"
        " with 0 the seed is 0 too. [default: 1]",
    ),
]
#: Generation options by field name of GenerationOptions: the sampler's, and all.
SAMPLER: dict[str, Any] = {
    "steps": Steps,
    "seed": Annotated[
        int | None,
        typer.Option(
            "-s",
            "--seed",
            callback=lambda value: None if value == -1 else value,
            help="Random seed; -1 for a random one. [default: random, and reported]",
        ),
    ],
    "t_min": Annotated[
        float | None, typer.Option("--t-min", help="Temperature at the last step. [default: the file's]")
    ],
    "t_max": Annotated[
        float | None, typer.Option("--t-max", help="Temperature at the first step. [default: the file's]")
    ],
    "entropy_bound": Annotated[
        float | None,
        typer.Option(
            "--entropy-bound",
            help="Accept tokens in ascending order of entropy until the sum exceeds this. "
            "[default: the file's]",
        ),
    ],
    "stability_threshold": Annotated[
        int | None,
        typer.Option(
            "--stability-threshold",
            help="Stop a canvas early only if its draft equals this many previous ones. "
            "[default: the file's]",
        ),
    ],
    "confidence_threshold": Annotated[
        float | None,
        typer.Option(
            "--confidence-threshold",
            help="Stop a canvas early only if its mean entropy is below this. [default: the file's]",
        ),
    ],
}
TEXT: dict[str, Any] = {
    "max_tokens": Annotated[
        int | None,
        typer.Option(
            "-n",
            "--max-tokens",
            callback=lambda value: None if value == -1 else value,
            help="Maximum number of tokens to generate; -1 for no limit. [default: up to the end of the "
            "context]",
        ),
    ],
    **SAMPLER,
    "stop": Annotated[
        list[str] | None,
        typer.Option("--stop", help="End the text before this string; may be repeated."),
    ],
    "thinking_budget": Annotated[
        int | None,
        typer.Option("--thinking-budget", help="Maximum number of reasoning tokens. [default: no limit]"),
    ],
    "stop_on_repetition": Annotated[
        bool | None,
        typer.Option("--stop-on-repetition", help="End a text that repeats itself."),
    ],
    "trim_after_eos": Annotated[
        bool | None,
        typer.Option("--trim-after-eos", help="Skip work on positions after an accepted eos."),
    ],
}

#: Constraints of the text; ``_open.constraint_of`` makes options of them.
CONSTRAINT: dict[str, Any] = {
    "json_schema": Annotated[
        str | None,
        typer.Option(
            "-j",
            "--json-schema",
            help="JSON schema that the text must satisfy: a path, - for standard input, or the schema "
            "itself.",
        ),
    ],
    "regex": Annotated[
        str | None, typer.Option("--regex", help="Regular expression that the whole text must match.")
    ],
    "grammar": Annotated[
        str | None,
        typer.Option(
            "--grammar", metavar="GBNF", help="Grammar that the whole text must match, in llama.cpp's GBNF."
        ),
    ],
    "grammar_file": Annotated[
        Path | None,
        typer.Option("--grammar-file", help="Path of a file with such a grammar; - reads standard input."),
    ],
}


#: Options of the runtime that decide where a model goes: context, threads, devices, kernels, cache type.
PLACEMENT: dict[str, Any] = {
    "ctx": Context,
    "threads": Threads,
    "gpu_layers": Annotated[
        str | None,
        typer.Option(
            "-ngl",
            "--gpu-layers",
            help="Number of layers on GPUs, counted from the last; 0 for none, all. "
            "[default: auto, as many as fit]",
        ),
    ],
    "n_cpu_moe": Annotated[
        int | None,
        typer.Option(
            "--n-cpu-moe",
            help="Number of layers, counted from the last, with experts on the CPU. "
            "[default: as few as needed]",
        ),
    ],
    "dense_type": Annotated[
        str | None,
        typer.Option(
            "--dense-type",
            help="Type of matrices other than experts on GPUs: file, or bf16, which takes more memory. "
            "[default: bf16 on A100, H100 and H200, if all fits]",
        ),
    ],
    "gpu_memory": Annotated[
        str | None,
        typer.Option(
            "--gpu-memory", help="Maximum memory per GPU (8GiB; 8GiB,24GiB). [default: what is free]"
        ),
    ],
    "device": Annotated[
        str | None,
        typer.Option(
            help="cpu, or GPUs as `pydiffusion devices` lists them (CUDA0,CUDA1). [default: all GPUs]"
        ),
    ],
    "kernels": Annotated[
        str | None,
        typer.Option(
            help="Matmul kernels: on the CPU ggml, avx512-bf16 or amx; on a GPU ggml or cuda. "
            "[default: the fastest available]"
        ),
    ],
    "cache_type": Annotated[
        str | None,
        typer.Option(
            "--cache-type",
            help="KV cache type: f32, f16, or q8_0 (half of f16, but hurts Gemma 4). "
            "[default: f16; f32 if all weights are F32]",
        ),
    ],
}

#: _open.adapters_of reads it.
Lora = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="PATH[:SCALE]",
        help="Adapter (LoRA) to apply: a PEFT folder, a GGUF, or OWNER/NAME on the Hugging Face Hub; may be"
        " repeated. The scale is 1 unless given.",
        show_default=False,
    ),
]
#: Options of the runtime: those, and adapters.
RUNTIME: dict[str, Any] = {**PLACEMENT, "lora": Lora}

System = Annotated[str | None, typer.Option("-sys", "--system", help="System message.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Print the result only: no progress, no speed.")]
ChatTemplate = Annotated[
    str | None,
    typer.Option(
        "--chat-template",
        metavar="FILE|NAME",
        help="Path of a chat template, or name of a built-in one (diffusion-gemma), to use instead of the "
        "model's.",
        show_default=False,
    ),
]
Mmproj = Annotated[
    Path | None,
    typer.Option(
        "-mm",
        "--mmproj",
        metavar="FILE",
        help="Path of the vision file, for images; none for none. [default: the one beside the model]",
        show_default=False,
    ),
]
#: Options of the runtime for commands that render messages, and for those whose messages may have images.
CHAT_RUNTIME: dict[str, Any] = {**RUNTIME, "chat_template": ChatTemplate}
IMAGE_RUNTIME: dict[str, Any] = {**CHAT_RUNTIME, "mmproj": Mmproj}
Images = Annotated[
    list[Path] | None,
    typer.Option(
        "--image", metavar="FILE", help="Path of an image that the prompt is about; may be repeated."
    ),
]


def takes(**groups: Mapping[str, Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator that adds groups of options to a command: each parameter named like a group gets a dict of
    the group's values.
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
