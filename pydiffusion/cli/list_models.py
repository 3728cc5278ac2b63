"""``pydiffusion list``: the models in the Hugging Face Hub's cache."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from pydiffusion._util.sizes import format_size

from ._text import one_line, say


def command(
    every: Annotated[
        bool, typer.Option("-a", "--all", help="Also list GGUF files of other architectures.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
) -> None:
    """List the models in the Hugging Face Hub's cache, by the names that -m takes."""
    from pydiffusion._util import hub

    models = hub.cached_models()
    found = [model for model in models if every or _runs(model.path)]
    if as_json:
        keys = [(m.name, str(m.path), m.n_bytes, round(m.modified)) for m in found]
        print(
            json.dumps([dict(zip(("name", "path", "n_bytes", "modified"), key, strict=True)) for key in keys])
        )
        return
    if not found:
        others = f" ({len(models)} of other architectures: --all)" if models else ""
        say(f"no model is in the hub's cache{others}; pydiffusion pull OWNER/NAME downloads one")
        return
    width = max(len(model.name) for model in found)
    print(f"{'name':{width}} {'size':>9} downloaded")
    for model in found:
        date = time.strftime("%Y-%m-%d %H:%M", time.localtime(model.modified))
        print(f"{one_line(model.name):{width}} {format_size(model.n_bytes):>9} {date}")


def _runs(path: Path) -> bool:
    """Whether the file is of an architecture that this runtime knows."""
    from pydiffusion import ModelFormatError, _native

    try:
        return _native.GgufFile(str(path)).metadata.get("general.architecture") in (
            _native.samplers_of_architectures()
        )
    except (ModelFormatError, OSError, RuntimeError):
        return False
