"""Show or change the metadata of a GGUF file in place: its chat template, sampler defaults, name.

    python examples/edit_metadata.py model.gguf
    python examples/edit_metadata.py model.gguf --chat-template template.jinja
    python examples/edit_metadata.py model.gguf --chat-template diffusion-gemma
    python examples/edit_metadata.py model.gguf --set diffusion.eb_max_steps=32 --set diffusion.eb_t_max=0.7
    python examples/edit_metadata.py model.gguf --remove general.name -o other.gguf

A value keeps its key's type. The file is replaced atomically by a verified new one, or left unchanged on
errors.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from pydiffusion import PyDiffusionError
from pydiffusion.chat.template_source import TEMPLATE_KEY, find_template
from pydiffusion.convert import edit_metadata, open_parts


def parse(setting: str) -> tuple[str, Any]:
    """Parse ``KEY=VALUE``: a JSON value (number, true, false, list), or else a string."""
    key, equals, text = setting.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{setting!r} is not KEY=VALUE")
    try:
        return key, json.loads(text)
    except ValueError:
        return key, text


def show(path: Path) -> None:
    parts = open_parts(path)
    for key, value in parts.metadata.items():
        text = repr(value)
        print(f"{key} ({parts.metadata_types[key]}): {text if len(text) < 100 else text[:97] + '...'}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument(
        "--chat-template", metavar="FILE|NAME", help="the new chat template: a file, or a built-in one's name"
    )
    parser.add_argument("--set", type=parse, action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--remove", action="append", default=[], metavar="KEY")
    parser.add_argument("-o", "--output", type=Path, help="write to this file and leave FILE unchanged")
    arguments = parser.parse_args()
    changes = dict(arguments.set) | dict.fromkeys(arguments.remove)
    try:
        if arguments.chat_template:
            changes[TEMPLATE_KEY] = find_template(arguments.chat_template)
        if not changes:
            show(arguments.file)
            return 0
        report = edit_metadata(arguments.file, changes, arguments.output)
    except (PyDiffusionError, OSError) as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        return 1
    print(
        f"{report.target}: {len(changes)} keys changed, {report.n_tensors} tensors unchanged", file=sys.stderr
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
