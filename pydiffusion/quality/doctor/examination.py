"""``examine``: run all checks on a model file, each whatever the others found."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from pydiffusion import PyDiffusionError, __version__, _native, devices
from pydiffusion._util.cpus import available_cpus
from pydiffusion._util.sizes import format_size
from pydiffusion.chat.template_source import find_template

from . import (
    file_check,
    layers_check,
    shapes_check,
    speed_check,
    stops_check,
    template_check,
    tokens_check,
    weights_check,
)
from .redaction import redact
from .report import Report, Section
from .subject import Subject, UnavailableError

Check = Callable[[Subject, Section], None]

#: In this order: speed frees the model before it measures, and the reference needs memory too.
CHECKS: dict[str, tuple[Check, ...]] = {
    "file": file_check.CHECKS,
    "shapes": shapes_check.CHECKS,
    "tokens": tokens_check.CHECKS,
    "template": template_check.CHECKS,
    "stops": stops_check.CHECKS,
    "speed": speed_check.CHECKS,
    "weights": weights_check.CHECKS,
    "layers": layers_check.CHECKS,
}


def examine(
    path: Path,
    reference: Path | None = None,
    *,
    checks: Collection[str] = tuple(CHECKS),
    runtime: Mapping[str, Any] | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Report:
    """Check a GGUF on this machine, and compare it with the checkpoint that it was made from.

    path: of a split file, any part. reference: folder of the checkpoint, or None.
    checks: names of those to run, see CHECKS. runtime: arguments of ``DiffusionModel``.
    progress: called with what is being done and the share of it.

    Raises PyDiffusionError for a chat template among the arguments that can't be used, and nothing for a file
    or folder with faults: they are in the report.
    """
    if runtime is not None and runtime.get("chat_template") is not None:
        find_template(runtime["chat_template"])
    subject = Subject(path, reference, runtime or {})
    report = Report(path.name, _facts(subject))
    for name in (name for name in CHECKS if name in checks):
        section = Section(name)
        report.sections.append(section)
        if progress is not None:
            subject.progress = lambda what, share, name=name: progress(f"{name}: {what}", share)  # type: ignore[misc]
        subject.progress("begins", 0.0)
        for check in CHECKS[name]:
            _run(check, subject, section)
    subject.close_model()
    return report


def page_of(report: Report, path: Path, reference: Path | None = None) -> str:
    """The report as a page in Markdown, without absolute paths, names of users and machines, and tokens."""
    paths = [path] if reference is None else [path, reference]
    return report.cleaned(lambda text: redact(text, paths)).page()


def _run(check: Check, subject: Subject, section: Section) -> None:
    try:
        check(subject, section)
    except UnavailableError as error:
        section.skip("the rest" if section.findings else "all of it", f"{error}: see above")
    except MemoryError:
        section.fail(
            "memory",
            "out of memory",
            "enough memory",
            "close other programs, or choose a smaller type of file (docs/quantization.md)",
        )
    except (PyDiffusionError, OSError, ValueError) as error:
        section.fail(section.title, str(error), "no error", "do what the error says, then run this again")
    except Exception as error:
        section.fail(
            section.title,
            f"{type(error).__name__}: {error}",
            "no error",
            "a fault of pydiffusion: report it with this page (PYDIFFUSION_DEBUG=1 shows where)",
        )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def _total_memory() -> str:
    try:
        return format_size(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return "unknown"


def _facts(subject: Subject) -> list[tuple[str, str]]:
    linked = _native.version()
    gpus = [f"{one.description}, {format_size(one.total_bytes)}" for one in devices()]
    facts = [
        ("pydiffusion", f"{__version__}, ggml {linked['ggml']}"),
        ("system", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"),
        ("CPU", f"{_cpu_name()}, {available_cpus()} CPUs, built for {linked['cpu'] or 'the baseline'}"),
        ("memory", _total_memory()),
        ("kernels", ", ".join(_native.kernels())),
        ("GPU", "; ".join(gpus) or "none that this build supports"),
        ("threads", str(subject.n_threads)),
    ]
    if subject.reference is not None:
        facts.append(("reference", subject.reference.name or "current folder"))
    return facts
