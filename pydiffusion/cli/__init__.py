"""Command line ``pydiffusion``: results on stdout, everything else on stderr.

Exit codes: 0 success, 1 failure, 2 usage error, 130 interrupted. Each command is a file, which imports what
it needs when it runs, so that ``--help`` is fast and needs no native module.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from . import (
    batch,
    bench,
    chat,
    convert,
    demo,
    devices,
    doctor,
    evaluate,
    generate,
    imatrix,
    infill,
    inspect,
    list_models,
    lora,
    merge,
    pull,
    quantize,
    run,
    serve,
    split,
    verify,
)
from ._commands import Command, Group, with_home
from ._text import one_line, say

app = typer.Typer(
    name="pydiffusion",
    cls=Group,
    help="Run block text-diffusion language models (DiffusionGemma) from GGUF files.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for _module in (
    *(convert, quantize, split, merge, imatrix, verify, evaluate, inspect),
    *(generate, infill, batch, chat, run, serve, pull, list_models, demo, devices, bench, doctor),
):
    _name = _module.__name__.rpartition(".")[2].removesuffix("_models")
    app.command(_name, cls=Command)(with_home(_module.command))


app.add_typer(lora.app, name="lora")


def _print_version(context: typer.Context, parameter: typer.CallbackParam, wanted: bool) -> None:
    """Callback of both options, in either order; acts once both are known."""
    seen = context.meta.setdefault("pydiffusion.version", {})
    seen[parameter.name] = wanted
    if len(seen) < 2 or context.resilient_parsing:
        return
    if seen["version"]:
        typer.echo("\n".join(_bill_of_materials() if seen["verbose"] else _bill_of_materials()[:1]))
        raise typer.Exit
    if seen["verbose"]:
        raise typer.BadParameter("belongs to --version", param_hint="--verbose")


def _bill_of_materials() -> list[str]:
    """Versions of this build and its dependencies, one per line."""
    import importlib.metadata
    import platform

    from pydiffusion import DISTRIBUTION, __version__, _native

    linked = _native.version()
    lines = [
        f"pydiffusion {__version__}",
        f"ggml {linked['ggml']} ({_commit(linked['ggml_commit'])}), linked in, MIT",
        f"nanobind {linked['nanobind']} with tsl::robin_map, linked in, BSD-3-Clause and MIT",
        f"instruction sets: {linked['cpu'] or 'the baseline alone'}",
        f"Python {platform.python_version()}, {platform.platform()}",
    ]
    try:
        requirements = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return [*lines, f"{DISTRIBUTION} is not installed: what it needs is listed in pyproject.toml"]
    for requirement in sorted(requirements, key=str.lower):
        name, bounds, extra = re.fullmatch(r"([\w.-]+)([^;]*)(.*)", requirement).groups()  # type: ignore[union-attr]
        if "extra" in extra and "server" not in extra:
            continue
        try:
            lines.append(f"{name} {importlib.metadata.version(name)} (needed: {bounds.strip() or 'any'})")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name} is not installed (needed: {bounds.strip() or 'any'})")
    return lines


def _commit(found: str) -> str:
    """Describe ggml's commit; a source distribution has none, its digest is pinned in vendor/ggml.lock."""
    return "commit unknown" if found == "unknown" else f"commit {found}"


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose",
            callback=_print_version,
            is_eager=True,
            help="With --version, also list ggml, the Python packages and the CPU's instruction sets.",
        ),
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (``sys.argv`` unless given) and return its exit code."""
    _standard_streams()
    code = 0
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            warnings.filterwarnings("ignore", module=r"PIL\.")  # what we refuse of an image, we explain
            code = _run(None if arguments is None else list(arguments))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of our output has exited, as in `| head`
        _forget_output()
        return 1
    except OSError as error:  # of a full disk, or a closed output
        if code == 0:
            print(f"pydiffusion: standard output: {error.strerror or error}", file=sys.stderr)
        _forget_output()
        return code or 1


def _standard_streams() -> None:
    """Open what the caller has closed (``>&-``), as what can't be read or written, so that no other file gets
    its number. Characters missing from a terminal's encoding must not raise.
    """
    streams = [("stdin", "r", os.O_WRONLY), ("stdout", "w", os.O_RDONLY), ("stderr", "w", os.O_WRONLY)]
    for name, mode, flags in streams:  # in the order of their numbers
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, flags)  # the lowest free number
            setattr(sys, name, open(opened, mode, encoding="utf-8"))  # noqa: SIM115, PTH123
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _forget_output() -> None:
    """Python writes what is left in the buffer when it ends: to nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@functools.cache
def _program() -> Any:
    return typer.main.get_command(app)


def _run(arguments: list[str] | None) -> int:
    try:
        code = _program()(args=arguments, prog_name="pydiffusion", standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):
        code = 130  # some versions of typer return it themselves
    except BrokenPipeError:
        raise
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # typer's usage errors
            error.show()
            return error.exit_code
        return _report(error)
    if code == 130:
        print("pydiffusion: interrupted", file=sys.stderr)
    return code


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """Print our own warnings on one line of stderr, others as Python does."""
    from pydiffusion import PyDiffusionWarning

    if issubclass(category, PyDiffusionWarning):
        say(f"pydiffusion: warning: {one_line(str(message))}")
    else:
        print(warnings.formatwarning(message, category, *where[:2]), end="", file=sys.stderr)


# Of a read or print where the stream is closed or full; errors of other files name them.
_OF_STREAMS = (errno.EBADF, errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


def _report(error: Exception) -> int:
    """Print an error on one line, and the traceback if PYDIFFUSION_DEBUG is set."""
    from pydiffusion import OptionError, PyDiffusionError

    if os.environ.get("PYDIFFUSION_DEBUG"):
        traceback.print_exception(error)
    message = one_line(str(error)) or type(error).__name__
    if isinstance(error, MemoryError):
        message = "out of memory"
    elif isinstance(error, OSError) and error.filename is None and error.errno in _OF_STREAMS:
        stream = "standard input or output" if error.errno == errno.EBADF else "standard output"
        message = f"{stream}: {error.strerror}"
    elif isinstance(error, OSError) and error.filename is not None and error.strerror:
        message = one_line(f"{error.filename}: {error.strerror}")
    elif not isinstance(error, (PyDiffusionError, OSError, ValueError)):
        message = f"{type(error).__name__}: {message} (PYDIFFUSION_DEBUG=1 shows where)"
    print(f"pydiffusion: {message}", file=sys.stderr)
    return 2 if isinstance(error, OptionError) else 1
