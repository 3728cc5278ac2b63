"""``pydiffusion convert``: a Hugging Face folder to GGUF."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._common import quiet_hub_in_a_pipe, say
from ._text import count

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pydiffusion.convert import ConversionProgress, ConversionReport

# Not the whole list: importing it would cost every --help the converter's imports. A wrong type is told all.
Type = Annotated[
    str,
    typer.Option(
        "--type",
        help="Type of the weights: f32, bf16, q8_0, q6_k, q5_k_m, q4_k_m, iq4_xs, q3_k_m, q2_k... (a wrong "
        "one lists all).",
    ),
]
Pad = Annotated[
    bool | None,
    typer.Option(
        "--pad/--no-pad",
        help="Pad feed-forward lengths with zeros to what the types' blocks need, always or never. "
        "[default: where it gives a smaller or hardly larger file]",
        show_default=False,
    ),
]
TensorTypes = Annotated[
    list[str] | None,
    typer.Option(
        "--tensor-type",
        metavar="PATTERN=TYPE",
        help="This type for tensors whose name the regular expression matches; may be given several times, "
        "the first match counts.",
    ),
]
ImatrixFile = Annotated[
    Path | None,
    typer.Option("--imatrix", help="GGUF of activation statistics that weigh columns.", show_default=False),
]
ThreadsForRows = Annotated[
    int | None, typer.Option("--threads", help="Threads that quantize. [default: all CPUs]")
]
SourceFile = Annotated[
    Path,
    typer.Argument(metavar="IN", help="The GGUF to read; of a split one, any part.", show_default=False),
]
SplitMaxSize = Annotated[
    str | None,
    typer.Option(
        "--split-max-size",
        metavar="SIZE",
        help="Split into files NAME-00001-of-0000N.gguf of at most so many bytes (5G; 4GiB).",
        show_default=False,
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Keep what is written (OUT.part) when interrupted, and go on from there when run again.",
    ),
]
AllowNonfinite = Annotated[
    bool,
    typer.Option(
        "--allow-nonfinite", help="Keep tensors that hold NaN or infinities in the source's type, not refuse."
    ),
]
Report = Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")]
Keep = Annotated[bool, typer.Option("--no-overwrite", help="Refuse to replace an existing file.")]


def command(
    context: typer.Context,
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder with config.json and *.safetensors, or a repo id on the Hugging Face Hub "
            "(OWNER/NAME[@REVISION]).",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The GGUF to write. [default: FOLDER-TYPE.gguf here]"),
    ] = None,
    type: Type = "q4_k_m",
    fit: Annotated[
        str | None,
        typer.Option(
            "--fit",
            metavar="SIZE",
            help="Instead of --type: the best that fits so much memory (16G) with its cache and buffers.",
            show_default=False,
        ),
    ] = None,
    ctx: Annotated[int, typer.Option("--ctx", help="Tokens of context that --fit leaves room for.")] = 4096,
    pad: Pad = None,
    tensor_type: TensorTypes = None,
    imatrix: ImatrixFile = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Only print what would be written: types, bytes, bits. Needs config.json alone."
        ),
    ] = False,
    mmproj: Annotated[
        bool,
        typer.Option(
            "--mmproj",
            help="Write the vision tower and projector instead: a file for llama.cpp's multimodal library, "
            "of --type bf16 unless f32, f16 or q8_0 is given.",
        ),
    ] = False,
    split_max_size: SplitMaxSize = None,
    resume: Resume = False,
    allow_nonfinite: AllowNonfinite = False,
    threads: ThreadsForRows = None,
    no_overwrite: Keep = False,
    as_json: Report = False,
) -> None:
    """Convert a Hugging Face folder or repo to GGUF, and check every tensor written."""
    check_type(type)
    quiet_hub_in_a_pipe()
    if mmproj:
        given = [pad is not None, tensor_type, imatrix, split_max_size, allow_nonfinite, fit, dry_run]
        if any(given):
            raise typer.BadParameter("--mmproj goes with --type, --resume and --threads only")
        if context.get_parameter_source("type").name == "DEFAULT":
            type = "bf16"
        choices = {"type": type, "resume": resume, "n_threads": threads, "overwrite": not no_overwrite}
        convert_vision(source, output, as_json, choices)
        return
    overrides = parse_overrides(tensor_type)
    if fit is not None:
        type, overrides = choose_fitting(source, fit, ctx, pad, overrides, imatrix is not None)
    if dry_run:
        print_sizes(source, type, pad, overrides, imatrix is not None, ctx, as_json)
        return
    from pydiffusion import convert

    run_conversion(
        convert.convert,
        source,
        output or Path(f"{model_name(source)}-{type}.gguf"),
        as_json,
        type=type,
        pad=pad,
        tensor_types=overrides,
        imatrix=imatrix,
        split_max_size=parse_split_size(split_max_size),
        resume=resume,
        allow_nonfinite=allow_nonfinite,
        n_threads=threads,
        overwrite=not no_overwrite,
    )


def convert_vision(source: Path, output: Path | None, as_json: bool, choices: dict[str, Any]) -> None:
    """The vision file of a checkpoint; wrong use of the command line for a type that it can't have."""
    from pydiffusion import convert

    if choices["type"] not in convert.MMPROJ_TYPES:
        raise typer.BadParameter(f"--mmproj: --type is one of {', '.join(convert.MMPROJ_TYPES)}")
    target = output or Path(f"mmproj-{model_name(source)}-{choices['type']}.gguf")
    run_conversion(convert.convert_mmproj, source, target, as_json, **choices)


def model_name(source: Path) -> str:
    """A folder's or repo's name, for the target's."""
    from pydiffusion.convert.checkpoint.hub import repo_id

    repo = repo_id(source)
    return source.resolve().name if repo is None else repo[0].partition("/")[2]


def run_conversion(
    function: Callable[..., ConversionReport], source: Path, target: Path, as_json: bool, **choices: Any
) -> None:
    """Call ``convert`` or one of its kind with its progress shown, and print its report."""
    resume = choices.get("resume", False)
    with telling_what_is_kept(target) if resume else contextlib.nullcontext():
        with conversion_progress(target) as update:
            report = function(source, target, progress=update, **choices)
        print_report(report, as_json)


@contextlib.contextmanager
def telling_what_is_kept(target: Path) -> Iterator[None]:
    """A line about the journal that a resumable conversion left, if it did."""
    try:
        yield
    except BaseException:
        if Path(f"{os.path.realpath(target)}.part.journal").exists():
            say(f"{target}: what was written is kept; the same command goes on from there")
        raise


def parse_split_size(given: str | None) -> int | None:
    """Bytes; wrong use of the command line when it is no size."""
    from pydiffusion.convert.gguf.split import parse_split_size as parse

    try:
        return None if given is None else parse(given)
    except ValueError as error:
        raise typer.BadParameter(f"--split-max-size: {error}") from None


def parse_overrides(given: list[str] | None) -> list[tuple[str, str]]:
    """``PATTERN=TYPE`` texts as pairs; wrong use of the command line when they are none."""
    from pydiffusion.convert.quantization.type_plan import check_overrides

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


def choose_fitting(
    source: Path, size: str, ctx: int, pad: bool | None, overrides: list[tuple[str, str]], has_imatrix: bool
) -> tuple[str, list[tuple[str, str]]]:
    """Type and overrides of the best recipe that fits, and a line that tells them."""
    from pydiffusion.convert.quantization import sizes

    try:
        n_bytes = sizes.parse_size(size)
    except ValueError as error:
        raise typer.BadParameter(f"--fit: {error}") from None
    plan, memory = sizes.fit(
        source, n_bytes, n_ctx=ctx, pad=pad, tensor_types=overrides, has_imatrix=has_imatrix
    )
    extras = " ".join(f"--tensor-type {shlex.quote(f'{pattern}={name}')}" for pattern, name in plan.overrides)
    say(
        f"--fit {size}: --type {plan.type} {extras}: {count(plan.n_bytes, 'B')} of weights,"
        f" {plan.bits_per_weight:.2f} bits per weight, {memory.total / 2**30:.2f} GiB in all"
    )
    return plan.type, list(plan.overrides)


def print_sizes(
    source: Path,
    type: str,
    pad: bool | None,
    overrides: list[tuple[str, str]],
    has_imatrix: bool,
    ctx: int,
    as_json: bool,
) -> None:
    """The table of a dry run on stdout."""
    from pydiffusion.convert.quantization import sizes

    plan = sizes.plan_sizes(source, type, pad=pad, tensor_types=overrides, has_imatrix=has_imatrix)
    memory = sizes.memory(sizes.read_config(source), plan.n_bytes, ctx)
    if as_json:
        extra = {"n_ctx": ctx, "total": memory.total, **dataclasses.asdict(memory)}
        print(json.dumps(plan.to_dict() | {"memory": extra}))
        return
    print(f"{'tensors':24} {'type':8} {'number':>6} {'weights':>9} {'bytes':>9} {'bits per weight':>15}")
    for kind, type_name, number, n_weights, n_bytes in plan.by_kind():
        bits = 8 * n_bytes / n_weights
        print(
            f"{kind:24} {type_name:8} {number:6} {count(n_weights):>9} {count(n_bytes, 'B'):>9} {bits:15.2f}"
        )
    total = f"{count(plan.n_weights):>9} {count(plan.n_bytes, 'B'):>9} {plan.bits_per_weight:15.2f}"
    print(f"{'all':24} {plan.type:8} {len(plan.tensors):6} {total}")
    print(
        f"memory with a context of {ctx}: {count(memory.weights, 'B')} weights, {count(memory.cache, 'B')}"
        f" cache, about {count(memory.buffers, 'B')} buffers, {count(memory.reserve, 'B')} kept free:"
        f" {memory.total / 2**30:.2f} GiB"
    )
    for line in plan.fallbacks:
        print(f"instead of the type asked for: {line}")
    for note in plan.notes:
        print(f"note: {note}")


def check_type(name: str) -> None:
    """Refuse an unknown type as wrong use, with the ones there are."""
    from pydiffusion.convert import TYPES

    if name not in TYPES:
        raise typer.BadParameter(f"--type is {name!r}; permitted are {', '.join(TYPES)}")


class conversion_progress:
    """Shows the stages of a conversion; a context manager that yields the callback to pass."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._stage = ""
        self._shown = None

    def __enter__(self) -> Callable[[ConversionProgress], None]:
        return self._update

    def _update(self, state: ConversionProgress) -> None:
        from ._display import progress

        if state.stage != self._stage:
            self.__exit__()
            self._stage = state.stage
            verb = {"write": "writing", "verify": "verifying"}.get(state.stage, state.stage)
            self._shown = progress(f"{verb} {self._target.name}")
            self._show = self._shown.__enter__()
        self._show(state.done_bytes, state.total_bytes, pace(state))

    def __exit__(self, *_: object) -> None:
        if self._shown is not None:
            self._shown.__exit__(None, None, None)
            self._shown = None


def pace(state: ConversionProgress) -> str:
    """``120 MB/s, 1:05 left``; empty before anything can be said."""
    rate, left = state.bytes_per_second, state.seconds_left
    if rate is None or left is None:
        return ""
    minutes, seconds = divmod(round(left), 60)
    hours, minutes = divmod(minutes, 60)
    clock = f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
    return f"{count(rate, 'B')}/s, {clock} left"


def print_report(report: ConversionReport, as_json: bool) -> None:
    """The report for a script on stdout, or for a person on stderr."""
    if as_json:
        print(json.dumps(report.to_dict()))
    types = ", ".join(f"{number} {name}" for name, number in report.types.items())
    where = report.target if len(report.files) < 2 else f"{report.files[0]} and {len(report.files) - 1} more"
    say(
        f"{where}: {report.n_tensors} tensors ({types}), {count(report.n_weights)} weights,"
        f" {count(report.n_bytes, 'B')}, {report.bits_per_weight:.2f} bits per weight, {report.seconds:.1f} s"
    )
    if report.fallbacks:
        say(f"of another type, for their rows do not fit the one asked for: {len(report.fallbacks)} tensors")
    for note in report.notes:
        say(f"note: {note}")
