"""The package's logger: silent by default, printed where an application or the environment asks for it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pydiffusion import PyDiffusionWarning
from pydiffusion._util import log
from pydiffusion._util.warn import warn_caller

WARNS = (
    "import logging, warnings; warnings.simplefilter('ignore'); {set_up}import pydiffusion\n"
    "from pydiffusion._util.warn import warn_caller\n"
    "warn_caller('mind the gap', pydiffusion.PyDiffusionWarning)\n"
    "logging.getLogger('pydiffusion').info('all is well')\n"
)


def stderr_of(set_up: str = "", **environment: str) -> str:
    code = WARNS.format(set_up=set_up)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stderr


@pytest.fixture(autouse=True)
def untouched() -> object:
    logger = logging.getLogger("pydiffusion")
    before = logger.level, list(logger.handlers)
    yield
    logger.level, logger.handlers[:] = before


def test_nothing_is_printed_unless_asked_for() -> None:
    assert stderr_of(PYDIFFUSION_LOG_LEVEL="") == ""


def test_the_application_decides() -> None:
    printed = stderr_of("logging.basicConfig(format='APP %(levelname)s %(message)s'); ")
    assert printed == "APP WARNING mind the gap\n"


@pytest.mark.parametrize(("level", "n_lines"), [("debug", 2), ("INFO", 2), ("warning", 1), ("error", 0)])
def test_the_environment_sets_a_level(level: str, n_lines: int) -> None:
    lines = stderr_of(PYDIFFUSION_LOG_LEVEL=level).splitlines()
    assert len(lines) == n_lines and all(" pydiffusion: " in line for line in lines), lines


def test_a_wrong_level_is_named() -> None:
    assert "'loud'; permitted are debug, info, warning, error" in stderr_of(PYDIFFUSION_LOG_LEVEL="loud")


def test_a_warning_is_raised_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.warns(PyDiffusionWarning, match="mind the gap"), caplog.at_level("WARNING", "pydiffusion"):
        warn_caller("mind the gap", PyDiffusionWarning)
    assert [record.getMessage() for record in caplog.records] == ["mind the gap"]


def test_the_level_can_be_changed_and_lines_come_once(capsys: pytest.CaptureFixture[str]) -> None:
    for level in ("error", "info"):
        log.print_from(level)
        logging.getLogger("pydiffusion.server").info("at %s", level)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].endswith("INFO pydiffusion.server: at info")


def test_a_model_says_what_it_opened(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from pydiffusion import DiffusionModel
    from pydiffusion.convert import convert
    from pydiffusion.demo import checkpoint_path

    convert(checkpoint_path(), tmp_path / "demo.gguf", "q8_0")
    with caplog.at_level("INFO", "pydiffusion"):
        DiffusionModel(tmp_path / "demo.gguf", n_threads=1).close()
    assert any(str(tmp_path / "demo.gguf") in record.getMessage() for record in caplog.records)
