"""``pydiffusion lora``: inspect adapters, and convert them between PEFT's folders and GGUF."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from . import _open
from ._adapter_facts import adapter_counts, adapter_facts, adapter_lines, target_lines
from ._commands import Command, with_home
from ._conversion import Keep
from ._options import output_file
from ._text import one_line, printable, say

if TYPE_CHECKING:
    from pydiffusion.adapters.adapter import Adapter

app = typer.Typer(
    cls=TyperGroup,
    help="Inspect adapters (LoRA), and convert them between PEFT's folders and GGUF.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Source = Annotated[
    str,
    typer.Argument(
        metavar="ADAPTER",
        help="PEFT folder, GGUF file, or OWNER/NAME on the Hugging Face Hub.",
        show_default=False,
    ),
]
Model = Annotated[
    Path | None,
    typer.Option(
        "-m",
        "--model",
        help="GGUF file of the model that it is for, to compare names and sizes with.",
        show_default=False,
    ),
]


def convert(
    source: Source,
    target: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            help="GGUF file to write (NAME.gguf), or, of a GGUF, the PEFT folder to write.",
            show_default=False,
        ),
    ],
    type: Annotated[
        str,
        typer.Option(
            "--type",
            "--outtype",
            help="Type of a GGUF's tensors: f32, f16, bf16, or auto, the smallest that holds each exactly.",
        ),
    ] = "auto",
    model: Model = None,
    no_overwrite: Keep = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a report as JSON.")] = False,
) -> None:
    """Convert an adapter: a PEFT folder to GGUF, as llama.cpp names it, or a GGUF to a PEFT folder."""
    from pydiffusion.adapters.gguf_file import TYPES, write_adapter_gguf
    from pydiffusion.adapters.loading import load_adapter, matrices_of
    from pydiffusion.adapters.peft_writing import write_peft_folder
    from pydiffusion.errors import AdapterError

    type, to_gguf = type.lower(), target.suffix.lower() == ".gguf"
    if type not in TYPES or (type != "auto" and not to_gguf):
        raise typer.BadParameter(f"--type is {type}; permitted are {', '.join(TYPES)}, for GGUF files only")
    keys = _metadata(model)
    adapter = load_adapter(source, keys)
    if to_gguf == adapter.path.is_file():
        what, other = ("a GGUF", "a folder") if to_gguf else ("a folder", "NAME.gguf")
        raise AdapterError(f"{adapter.path}: is {what} already; give {other} as OUT to convert it")
    if to_gguf:
        target = output_file(str(target))
        write_adapter_gguf(adapter, target, matrices_of(keys), type=type, overwrite=not no_overwrite)
    elif (target / "config.json").exists():
        raise AdapterError(f"{target}: is a model's folder; give the adapter one of its own")
    else:
        write_peft_folder(adapter, target, matrices_of(keys), overwrite=not no_overwrite)
    if as_json:
        print(json.dumps({"target": str(target)} | adapter_facts(adapter, False), default=str))
    say(f"{target}: {adapter_counts(adapter)}")


def inspect(
    source: Source,
    model: Model = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every matrix that it changes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Show what an adapter changes, and whether it can be merged into a model's weights."""
    from pydiffusion.adapters.loading import load_adapter

    adapter = load_adapter(source, _metadata(model))
    if as_json:
        print(json.dumps(adapter_facts(adapter, tensors), default=str))
    else:
        _print(adapter, tensors)


app.command("convert", cls=Command)(with_home(convert))
app.command("inspect", cls=Command)(with_home(inspect))


def _metadata(model: Path | None) -> dict[str, Any] | None:
    """Metadata of the model that an adapter is for; None without."""
    from pydiffusion.convert import open_parts
    from pydiffusion.errors import UnsupportedModelError

    if model is None:
        return None
    parts = open_parts(_open.model_file(model))
    if parts.reader.other_kind:
        raise UnsupportedModelError(f"{model}: is {parts.reader.other_kind}")
    return parts.metadata


def _print(adapter: Adapter, with_tensors: bool) -> None:
    print(one_line(f"{adapter.name}: {adapter_counts(adapter)}"))
    print(one_line(f"from {adapter.path}"))
    for key, value in adapter.metadata.items():
        if key != "notes":
            print(one_line(f"{key}: {value}"))
    print("\nChanges (encoder: reads prompt and finished text; decoder: denoises the canvas; both: one set)")
    for line in adapter_lines(adapter):
        print(f"  {printable(line)}")
    if with_tensors:
        print("\nMatrices (shapes slowest first)")
        for line in target_lines(adapter):
            print(f"  {printable(line)}")
