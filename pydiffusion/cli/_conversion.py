"""Options and steps shared by the commands that write GGUF files."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pydiffusion._util.sizes import count, format_size, parse_size

from ._progress import conversion_progress
from ._text import say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pydiffusion.convert import ConversionReport

# Not the complete list, since importing it would slow down every --help. An unknown type prints the whole
# list.
Type = Annotated[
    str,
    typer.Option(
        "--type",
        "--outtype",
        help="Type of the weights: f32, bf16, q8_0, q6_k, q5_k_m, q4_k_m, iq4_xs, q3_k_m, q2_k, ... (an "
        "unknown one lists all), in any case.",
    ),
]
Pad = Annotated[
    bool | None,
    typer.Option(
        "--pad/--no-pad",
        help="Always or never pad feed-forward lengths with zeros to multiples of 256. [default: if the file "
        "gets smaller or hardly larger]",
        show_default=False,
    ),
]
TensorTypes = Annotated[
    list[str] | None,
    typer.Option(
        "--tensor-type",
        metavar="PATTERN=TYPE",
        help="Type of the tensors whose name matches the regular expression; may be repeated, the first "
        "match counts.",
    ),
]
ImatrixFile = Annotated[
    Path | None,
    typer.Option(
        "--imatrix",
        help="Path of an importance matrix (imatrix) that weights quantization errors.",
        show_default=False,
    ),
]
ThreadsForRows = Annotated[
    int | None,
    typer.Option(
        "--threads", help="Number of CPU threads, at most 16. [default: the CPUs available to this process]"
    ),
]
SourceFile = Annotated[
    Path,
    typer.Argument(metavar="IN", help="Path of the GGUF file; of a split one, any part.", show_default=False),
]
SplitMaxSize = Annotated[
    str | None,
    typer.Option(
        "--split-max-size",
        metavar="SIZE",
        help="Split into NAME-00001-of-0000N.gguf of at most this size (5G; 4GiB).",
        show_default=False,
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Keep OUT.part when interrupted; the next run resumes from it.",
    ),
]
AllowNonfinite = Annotated[
    bool,
    typer.Option(
        "--allow-nonfinite", help="Keep tensors with NaN or infinity in the source's type instead of failing."
    ),
]
MergedLora = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="PATH[:SCALE]",
        help="Merge an adapter (LoRA: PEFT folder, GGUF or OWNER/NAME on the Hugging Face Hub) into the "
        "weights, times SCALE (default 1); may be repeated. It must change encoder and decoder alike.",
    ),
]
Report = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
Keep = Annotated[bool, typer.Option("--no-overwrite", help="Refuse to replace an existing file.")]


def run_conversion(
    function: Callable[..., ConversionReport], source: Path, target: Path, as_json: bool, **choices: Any
) -> None:
    """Run ``convert`` or a similar function with a progress bar, and print its report."""
    resume = choices.get("resume", False)
    with resume_hint(target) if resume else contextlib.nullcontext():
        with conversion_progress(target) as update:
            report = function(source, target, progress=update, **choices)
        print_report(report, as_json)


@contextlib.contextmanager
def resume_hint(target: Path) -> Iterator[None]:
    """Print a hint if a resumable conversion fails and leaves its journal."""
    try:
        yield
    except BaseException:
        if Path(f"{os.path.realpath(target)}.part.journal").exists():
            say(f"{target}: partial output is kept; run the same command to resume")
        raise


def parse_split_size(given: str | None) -> int | None:
    """Parse a size to bytes; a usage error if it is invalid."""
    try:
        return None if given is None else parse_size(given)
    except ValueError as error:
        raise typer.BadParameter(f"--split-max-size: {error}") from None


def parse_overrides(given: list[str] | None) -> list[tuple[str, str]]:
    """Parse ``PATTERN=TYPE`` to pairs; a usage error if one is invalid."""
    from pydiffusion.convert import check_overrides

    pairs = []
    for text in given or ():
        pattern, equals, type_name = text.rpartition("=")
        if not equals or not pattern:
            raise typer.BadParameter(f"--tensor-type is {text!r}; it should be PATTERN=TYPE")
        pairs.append((pattern, type_name))
    try:
        check_overrides(pairs)
    except ValueError as error:
        raise typer.BadParameter(f"--tensor-type: {error}") from None
    return pairs


def given(context: typer.Context, parameter: str) -> bool:
    """Whether the parameter is on the command line, not its default."""
    source = context.get_parameter_source(parameter)
    return source is not None and source.name != "DEFAULT"


def parse_type(name: str) -> str:
    """The type that ``name`` means, in any case; a usage error for an unknown one, listing all."""
    from pydiffusion.convert import recipe_name

    try:
        return recipe_name(name)
    except ValueError as error:
        raise typer.BadParameter(f"--type: {error}") from None


def print_report(report: ConversionReport, as_json: bool) -> None:
    """Print the report: as JSON on stdout if asked for, and a summary on stderr."""
    if as_json:
        print(json.dumps(report.to_dict()))
    types = ", ".join(f"{number} {name}" for name, number in report.types.items())
    where = report.target if len(report.files) < 2 else f"{report.files[0]} and {len(report.files) - 1} more"
    say(
        f"{where}: {report.n_tensors} tensors ({types}), {count(report.n_weights)} weights,"
        f" {format_size(report.n_bytes)}, {report.bits_per_weight:.2f} bits per weight,"
        f" {report.seconds:.1f} s"
    )
    if report.fallbacks:
        say(f"fallback type, since rows don't fit the requested one: {len(report.fallbacks)} tensors")
    for note in report.notes:
        say(f"note: {note}")
