"""Plot quality loss: KL divergence and solved tasks against bits per weight."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

from pydiffusion import PyDiffusionError
from pydiffusion._util import atomic

from .evaluation import EvaluationReport

FORMATS = ("png", "svg", "pdf")
_SMALLEST_KL = 1e-7  # KL of a file equal to its reference, since a logarithmic axis has no zero


def require_matplotlib() -> None:
    """Raise PyDiffusionError if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise PyDiffusionError("plotting needs matplotlib: pip install matplotlib") from error


def plot(reports: Sequence[EvaluationReport], target: str | os.PathLike[str]) -> None:
    """Plot the reports of files of one model; the suffix of ``target`` is the format (:data:`FORMATS`).

    Raises:
        PyDiffusionError: matplotlib is not installed, or the target can't be written.
        ValueError: no reports, or another suffix.
    """
    require_matplotlib()
    from matplotlib.figure import Figure  # without pyplot, which would look for a display

    path = Path(target)
    suffix = path.suffix.removeprefix(".").lower()
    if suffix not in FORMATS:
        raise ValueError(f"{path}: a plot's name must end with {', '.join('.' + name for name in FORMATS)}")
    if not reports:
        raise ValueError("there are no reports to plot")
    ordered = sorted(reports, key=lambda report: report.bits_per_weight)
    bits = [report.bits_per_weight for report in ordered]
    solved = [report.solved for report in ordered if report.solved is not None]
    has_tasks = len(solved) == len(ordered)
    figure = Figure(figsize=(8, 7.5 if has_tasks else 4.5), layout="constrained")
    axes = figure.subplots(2 if has_tasks else 1, sharex=True, squeeze=False)[:, 0]
    upper = axes[0]
    upper.set_yscale("log")
    for values, label, style in (
        ([report.mean_kl for report in ordered], "mean", "o"),
        ([report.kl_99 for report in ordered], "99th percentile", "^"),
    ):
        upper.plot(bits, [max(value, _SMALLEST_KL) for value in values], style, label=label, markersize=4)
    for index, report in enumerate(ordered):  # adjacent points are labelled on either side
        at = (report.bits_per_weight, max(report.mean_kl, _SMALLEST_KL))
        place = {"xytext": (5, -3), "ha": "left"} if index % 2 else {"xytext": (-5, -3), "ha": "right"}
        upper.annotate(report.file.stem, at, textcoords="offset points", fontsize=7, **place)
    upper.margins(x=0.15)
    upper.set_ylabel(f"KL from {ordered[0].reference.stem}, nats per position")
    upper.legend()
    if has_tasks:
        axes[1].plot(bits, [100 * share for share in solved], "o", markersize=4)
        axes[1].set_ylim(0, 100)
        if ordered[0].reference_solved is not None:
            axes[1].axhline(100 * ordered[0].reference_solved, linestyle=":", color="grey")
        axes[1].set_ylabel("tasks solved, %")
    axes[-1].set_xlabel("bits per weight")
    for one in axes:
        one.grid(alpha=0.3)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=suffix, dpi=150)
    with atomic.replacing(atomic.resolve_target(path, [], True)) as new:
        new.write(drawn.getvalue())
