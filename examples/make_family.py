"""Convert a checkpoint to several GGUF types in a single pass over it.

    python examples/make_family.py DiffusionGemma/ --folder out --types bf16 q8_0 q6_k q4_k_m iq4_xs
    python examples/make_family.py OWNER/NAME --folder out --imatrix model.imatrix.gguf --types q4_k_m iq2_m

Prints a Markdown table of the files with checksums to stdout and writes it to README.md in the output folder.
Either all files appear, verified, or none. Types below 8 bits use the imatrix.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from pathlib import Path

from pydiffusion import PyDiffusionError
from pydiffusion.convert import (
    TYPES,
    ConversionProgress,
    ConversionReport,
    Variant,
    convert_family,
    parse_size,
)

WITHOUT_IMATRIX = ("f32", "f16", "bf16", "q8_0")


class Progress:
    """Prints a line on stderr every few seconds."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def __call__(self, state: ConversionProgress) -> None:
        if time.monotonic() - self.last < 3:
            return
        self.last = time.monotonic()
        left = "" if state.seconds_left is None else f", {state.seconds_left:.0f} s left"
        print(f"{state.stage}: {100 * state.done_bytes / state.total_bytes:.0f}%{left}", file=sys.stderr)


def sha256(path: Path) -> str:
    checksum = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            checksum.update(data)
    return checksum.hexdigest()


def table(reports: list[ConversionReport]) -> str:
    lines = ["| file | bits per weight | bytes | sha256 |", "|---|---|---|---|"]
    for report in reports:
        for path in report.files:
            checksum = sha256(path)
            size = path.stat().st_size
            lines.append(f"| {path.name} | {report.bits_per_weight:.2f} | {size} | `{checksum}` |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "source", help="checkpoint folder, repo id, or a GGUF file of 8 or more bits per weight"
    )
    parser.add_argument("--folder", type=Path, required=True, help="output folder; created if missing")
    parser.add_argument("--name", help="files are named NAME-TYPE.gguf [default: the source's name]")
    parser.add_argument(
        "--types", nargs="+", choices=TYPES, metavar="TYPE", default=["q8_0", "q6_k", "q4_k_m"]
    )
    parser.add_argument("--imatrix", type=Path, help="imatrix for the types below 8 bits")
    parser.add_argument("--split-max-size", type=parse_size, metavar="SIZE")
    arguments = parser.parse_args()
    name = arguments.name or Path(arguments.source.partition("@")[0]).resolve().name.removesuffix(".gguf")
    variants = [
        Variant(
            arguments.folder / f"{name}-{type}.gguf",
            type,
            imatrix=None if type in WITHOUT_IMATRIX else arguments.imatrix,
            split_max_size=arguments.split_max_size,
        )
        for type in dict.fromkeys(arguments.types)
    ]
    try:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        reports = convert_family(arguments.source, variants, progress=Progress())
    except (PyDiffusionError, OSError) as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        return 1
    text = table(reports)
    (arguments.folder / "README.md").write_text(f"# {name}\n\n{text}", encoding="utf-8")
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
