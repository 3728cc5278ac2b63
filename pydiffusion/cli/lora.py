"""``pydiffusion lora``: inspect adapters, and convert them between PEFT's folders and GGUF."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from pydiffusion._util.sizes import count

from . import _open
from ._commands import Command, with_home
from ._options import output_file
from ._text import one_line, say

if TYPE_CHECKING:
    from pydiffusion.adapters.adapter import Adapter, Factors, Target

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
    model: Model = None,
    no_overwrite: Annotated[
        bool, typer.Option("--no-overwrite", help="Refuse to replace what exists.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a report as JSON.")] = False,
) -> None:
    """Convert an adapter: a PEFT folder to GGUF, as llama.cpp names it, or a GGUF to a PEFT folder."""
    from pydiffusion.adapters.gguf_file import write_adapter_gguf
    from pydiffusion.adapters.peft_folder import write_peft_folder
    from pydiffusion.errors import AdapterError

    to_gguf = target.suffix.lower() == ".gguf"
    if no_overwrite and target.exists():
        raise AdapterError(f"{target}: already exists; remove it, or leave out --no-overwrite")
    adapter = _loaded(source, model)
    if to_gguf == adapter.path.is_file():
        what, other = ("a GGUF", "a folder") if to_gguf else ("a PEFT folder", "NAME.gguf")
        raise AdapterError(f"{adapter.path}: is {what} already; give {other} as OUT to convert it")
    if to_gguf:
        write_adapter_gguf(adapter, output_file(str(target)))
    else:
        write_peft_folder(adapter, target)
    if as_json:
        print(json.dumps({"source": str(adapter.path), "target": str(target)} | _summary(adapter)))
    say(f"{target}: {_counted(adapter)}")


def inspect(
    source: Source,
    model: Model = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every matrix that it changes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Show what an adapter changes, and whether it can be merged into a model's weights."""
    adapter = _loaded(source, model)
    if as_json:
        listed = {"targets": [_target(*item) for item in adapter.factors.items()]} if tensors else {}
        print(json.dumps(_summary(adapter) | listed, default=str, allow_nan=False))
    else:
        _print(adapter, tensors)


app.command("convert", cls=Command)(with_home(convert))
app.command("inspect", cls=Command)(with_home(inspect))


def _loaded(source: str, model: Path | None) -> Adapter:
    from pydiffusion.adapters.loading import load_adapter

    return load_adapter(source, None if model is None else _metadata(model))


def _metadata(model: Path) -> dict[str, Any]:
    from pydiffusion.convert import open_parts

    return open_parts(_open.model_file(model)).metadata


def _summary(adapter: Adapter) -> dict[str, Any]:
    from pydiffusion.adapters.merging import why_not_mergeable

    sides = Counter(target.side for target in adapter.factors)
    return {
        "name": adapter.name,
        "path": str(adapter.path),
        "fingerprint": adapter.fingerprint.hex(),
        "n_targets": len(adapter.factors),
        "n_weights": _n_weights(adapter),
        "ranks": sorted({factors.rank for factors in adapter.factors.values()}),
        "sides": {side: sides[side] for side in ("encoder", "decoder", "both") if sides[side]},
        "merge_problem": why_not_mergeable(adapter),
        "metadata": dict(adapter.metadata),
    }


def _target(target: Target, factors: Factors) -> dict[str, Any]:
    return {
        "tensor": target.tensor,
        "side": target.side,
        "shape_a": list(factors.shape_a),
        "shape_b": list(factors.shape_b),
        "scale": factors.scale,
    }


def _n_weights(adapter: Adapter) -> int:
    return sum(math.prod(f.shape_a) + math.prod(f.shape_b) for f in adapter.factors.values())


def _counted(adapter: Adapter) -> str:
    ranks = sorted({factors.rank for factors in adapter.factors.values()})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    return f"{len(adapter.factors)} matrices, {rank}, {count(_n_weights(adapter))} weights"


def _print(adapter: Adapter, with_tensors: bool) -> None:
    from pydiffusion.adapters.merging import why_not_mergeable
    from pydiffusion.convert.checkpoint.tensor_map import split_name

    print(one_line(f"{adapter.name}: {_counted(adapter)}"))
    print(one_line(f"  from {adapter.path}"))
    for key, value in adapter.metadata.items():
        if key != "notes":
            print(one_line(f"  {key}: {value}"))
    print("\nChanges (encoder: reads prompt and finished text; decoder: denoises the canvas; both: one set)")
    kinds: Counter[tuple[str, str, int, float]] = Counter(
        (split_name(target.tensor)[0], target.side, factors.rank, factors.scale)
        for target, factors in adapter.factors.items()
    )
    print(f"  {'matrix':18} {'mode':8} {'number':>6} {'rank':>5} {'scale':>8}")
    for (kind, side, rank, scale), number in kinds.items():
        print(f"  {kind:18} {side:8} {number:6} {rank:5} {scale:8.4g}")
    if with_tensors:
        print("\nMatrices (shapes of A and B, slowest first)")
        for target, factors in adapter.factors.items():
            a, b = (" x ".join(map(str, shape)) for shape in (factors.shape_a, factors.shape_b))
            print(f"  {target!s:34} A {a:16} B {b:16} scale {factors.scale:.4g}")
    why_not = why_not_mergeable(adapter)
    print(f"\ncan be merged by convert --lora: {f'no, it {why_not}' if why_not else 'yes'}")
    for note in adapter.metadata.get("notes", ()):
        print(one_line(f"note: {note}"))
