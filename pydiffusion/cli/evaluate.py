"""``pydiffusion evaluate``: measure the quality loss of quantized files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import _open
from ._input import read_text
from ._options import ChatTemplate, Lora, Threads, output_file
from ._text import one_line, say

if TYPE_CHECKING:
    from pydiffusion.convert import EvaluationReport


def command(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="Paths of the GGUF files to evaluate.", show_default=False),
    ],
    reference: Annotated[
        Path,
        typer.Option(
            "--reference", help="Path of a GGUF file of the same model with more bits.", show_default=False
        ),
    ],
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            help="Path of a text file, a prompt per line. [default: held-out tasks of the demo model]",
        ),
    ] = None,
    noise: Annotated[
        list[float] | None,
        typer.Option("--noise", help="Noise level; may be repeated. [default: 0.1 0.4 0.7 1.0]"),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("-n", "--max-tokens", help="Maximum number of tokens per answer.")
    ] = 144,
    steps: Annotated[
        int | None,
        typer.Option("--steps", help="Maximum number of denoising steps per canvas. [default: the files']"),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Random seed of answers and noise.")] = 0,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            parser=output_file,
            metavar="FILE",
            help="Path of a plot of quality against bits per weight (png, svg or pdf; needs matplotlib).",
            show_default=False,
        ),
    ] = None,
    chat_template: ChatTemplate = None,
    threads: Threads = None,
    lora: Lora = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Compare quantized GGUF files with a reference. Measures KL divergence, agreement and steps."""
    from pydiffusion._util.atomic import resolve_target
    from pydiffusion.quality import evaluation, plotting

    from ._progress import progress

    texts = None
    if prompts is not None:
        texts = [line for line in read_text(prompts).splitlines() if line.strip()]
        if not texts:
            raise typer.BadParameter(f"--prompts: {prompts} has no prompts")
    levels = noise or evaluation.NOISE
    if not all(0 < t <= 1 for t in levels) or max_tokens < 1 or (steps is not None and steps < 1):
        raise typer.BadParameter("--noise: above 0, up to 1; --max-tokens and --steps: at least 1")
    if plot is not None:
        if plot.suffix.lower().removeprefix(".") not in plotting.FORMATS:
            raise typer.BadParameter(f"--plot: {plot} should end with .{', .'.join(plotting.FORMATS)}")
        plotting.require_matplotlib()  # fail now, not after an hour
        resolve_target(plot, [], overwrite=True)
    adapters = _open.adapters_of(lora)
    files, reference = [_open.model_file(file) for file in files], _open.model_file(reference)
    with progress(f"evaluating {files[0].name if len(files) == 1 else f'{len(files)} files'}") as update:
        reports = evaluation.evaluate_family(
            files,
            reference,
            texts,
            noise=levels,
            max_tokens=max_tokens,
            steps=steps,
            seed=seed,
            n_threads=threads,
            chat_template=chat_template,
            lora=adapters,
            progress=lambda state: update(state.done_bytes, state.total_bytes),
        )
    if as_json:
        found = [report.to_dict() for report in reports]
        print(json.dumps(found if len(found) > 1 else found[0]))
    elif len(reports) > 1:
        print_table(reports)
    else:
        print_one(reports[0])
    if plot is not None:
        plotting.plot(reports, plot)
        say(f"{plot}: written")
    say(f"{reports[0].n_prompts} prompts; KL in nats per position")


def print_one(report: EvaluationReport) -> None:
    """Print the results by noise level, and overall."""
    print(f"{'noise':>5} {'conditioned':>11} {'mean KL':>9} {'99% KL':>9} {'top 1':>7}")
    for row in report.agreements:
        conditioned = "yes" if row.self_conditioning else "no"
        print(f"{row.noise:5.2f} {conditioned:>11} {row.mean_kl:9.5f} {row.kl_99:9.5f} {row.top1:7.2%}")
    print(f"{'all':>5} {'':11} {report.mean_kl:9.5f} {report.kl_99:9.5f} {report.top1:7.2%}")
    print(
        f"steps per canvas {report.steps:.2f} (reference {report.reference_steps:.2f}), equal answers"
        f" {report.same_answers:.0%}, {report.bits_per_weight:.2f} bits per weight"
    )
    if report.solved is not None:
        print(f"solved {report.solved:.0%} (reference {report.reference_solved:.0%})")


def print_table(reports: list[EvaluationReport]) -> None:
    """Print a Markdown table with a row for each file and one for the reference."""
    has_tasks = reports[0].solved is not None
    heads = ["file", "bits per weight", "mean KL", "99% KL", "top 1", "steps per canvas", "equal answers"]
    rows = [heads + ["solved"] * has_tasks, ["---"] * (len(heads) + has_tasks)]
    for report in reports:
        cells = [report.file.name, f"{report.bits_per_weight:.2f}", f"{report.mean_kl:.5f}"]
        cells += [f"{report.kl_99:.4f}", f"{report.top1:.2%}", f"{report.steps:.2f}"]
        cells.append(f"{report.same_answers:.0%}")
        rows.append(cells + ([f"{report.solved:.0%}"] if has_tasks else []))
    first = reports[0]
    cells = [f"{first.reference.name} (reference)", "", "", "", "", f"{first.reference_steps:.2f}", ""]
    rows.append(cells + ([f"{first.reference_solved:.0%}"] if has_tasks else []))
    for row in rows:
        print(f"| {' | '.join(one_line(cell) for cell in row)} |")
