"""Fixtures of all tests: small GGUFs made once per session, the circulating samples, the reference.

Reasons of skips say what was not checked (printed, as pyproject.toml sets ``-ra``), and the parity tests'
measurements are printed at the end of the run.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
from reference.random_checkpoint import write_checkpoint
from support.checkpoint_folders import make_folder
from support.paths import REPOSITORY

REFERENCE_VERSIONS = {"torch": "2.13.0", "transformers": "5.23.0"}

_figures = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_figures] = []
    _use_what_is_installed()
    _hear_signals()


def _use_what_is_installed() -> None:
    """``python -m pytest`` puts the current folder first on the path: in this one, that would import a source
    without its compiled extension instead of the installed package.
    """
    compiled = [REPOSITORY / "pydiffusion" / f"_native{suffix}" for suffix in EXTENSION_SUFFIXES]
    if not any(path.exists() for path in compiled):
        sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != REPOSITORY]
    try:
        importlib.import_module("pydiffusion._native")
    except ImportError as error:
        raise pytest.UsageError(
            f"pydiffusion is not installed for {sys.executable} ({error}): run pip install '.[test]' in "
            f"{REPOSITORY}, then this again"
        ) from None


def _hear_signals() -> None:
    """Programs that the tests start inherit ignored signals (of ``nohup``, of ``&`` in a script)."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash[_figures]:
        terminalreporter.section("measured")
        for line in config.stash[_figures]:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session", autouse=True)
def _away_from_the_source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests run in an empty folder: programs started in the repository would import its source instead of the
    installed package.
    """
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("current-folder"))
    yield
    os.chdir(before)


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Call it with a line of measurements: they are printed at the end of the test run."""
    return request.config.stash[_figures].append


@pytest.fixture(scope="session")
def checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``checkpoint_folder("small", seed=0, dtype="f32", ...)``: a random checkpoint, written once."""
    made: dict[tuple[object, ...], Path] = {}

    def get(shape: str, **options: object) -> Path:
        key = (shape, *sorted(options.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{shape}-checkpoint")
            made[key] = write_checkpoint(folder, shape, **options)
        return made[key]

    return get


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint folder with everything that the converter reads, one per test file."""
    return make_folder(tmp_path_factory.mktemp("checkpoint") / "small")


@pytest.fixture(scope="session")
def gguf_file(
    checkpoint_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """``gguf_file("small", "q4_k_m", seed=0, dtype="f32", ...)``: that checkpoint, converted once."""
    from pydiffusion.convert import convert

    made: dict[tuple[object, ...], Path] = {}

    def get(shape: str, type: str = "f32", **options: object) -> Path:
        key = (shape, type, *sorted(options.items()))
        if key not in made:
            target = tmp_path_factory.mktemp(f"{shape}-gguf") / f"{shape}-{type}.gguf"
            convert(checkpoint_folder(shape, **options), target, type)
            made[key] = target
        return made[key]

    return get


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """``small_disk("1m")``: a file system of that size; skips where none can be mounted."""
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        disk = tmp_path / f"disk-{len(mounted)}"
        disk.mkdir()
        command = [shutil.which("mount") or "", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        if not command[0] or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("NOT CHECKED: a really full disk (mounting a tmpfs needs root)")
        mounted.append(disk)
        return disk

    yield mount
    for disk in mounted:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture(scope="session")
def circulating() -> Path:
    """Folder of the sample files of llama.cpp's pull request 24423; skipped where missing."""
    folder = Path(os.environ.get("PYDIFFUSION_CIRCULATING", REPOSITORY.parent / "shared/data/circulating"))
    if not (folder / "small-f32.gguf").is_file():
        pytest.skip(
            f"NOT CHECKED: files that circulate load and give the reference's logits; no samples in {folder} "
            "(set PYDIFFUSION_CIRCULATING to their folder)"
        )
    return folder


def _reference_is_missing() -> str:
    """Why the live comparison can't run here, or an empty string."""
    for name, version in REFERENCE_VERSIONS.items():
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
        found = importlib.metadata.version(name).split("+")[0]
        if found != version:
            return f"{name} is {found}, not {version}"
    return ""


def pytest_sessionstart() -> None:
    """PYDIFFUSION_REQUIRE_AMX: stop where the CPU has no AMX, instead of skipping its kernels' tests."""
    from pydiffusion import _native

    if os.environ.get("PYDIFFUSION_REQUIRE_AMX") and "amx" not in _native.kernels():
        raise pytest.UsageError(
            f"PYDIFFUSION_REQUIRE_AMX is set, but this CPU can run the kernels {_native.kernels()} only"
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``reference`` need exactly the versions that the goldens were made with."""
    marked = [item for item in items if item.get_closest_marker("reference")]
    reason = _reference_is_missing() if marked else ""
    if reason and os.environ.get("PYDIFFUSION_REQUIRE_REFERENCE"):
        raise pytest.UsageError(f"PYDIFFUSION_REQUIRE_REFERENCE is set, but {reason}")
    for item in marked:
        if reason:
            text = f"NOT CHECKED: live comparison with transformers; {reason} (pip install '.[reference]')"
            item.add_marker(pytest.mark.skip(reason=text))
        else:
            item.fixturenames.insert(0, "_quiet_torch")


@pytest.fixture(scope="session")
def _quiet_torch() -> None:
    """The reference on one thread: then its sums don't depend on the number of cores."""
    import torch

    torch.set_num_threads(1)
