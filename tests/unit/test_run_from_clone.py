"""The tests run from a clone with `pytest` and with `python -m pytest`.

The latter puts the current folder, a source without its compiled extension, before the installed package.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import REPOSITORY

import pydiffusion
from pydiffusion import _native

# What these runs of pytest collect: one test that only imports.
INNER = ["-q", "-p", "no:cacheprovider", str(Path(__file__)), "-k", "inner"]
# Fake import finders: nothing installed, and an editable install, whose finder returns the source and, for
# the compiled extension, another folder.
NOTHING = """
class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != "pydiffusion":
            return None
        found = super().find_spec(name, [entry for entry in sys.path if os.path.realpath(entry) == ROOT])
        if found is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return found
"""
EDITABLE = """
class Finder:
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        folders = {"pydiffusion": ROOT + "/pydiffusion", "pydiffusion.convert": ROOT + "/convert"}
        if name in folders:
            return importlib.util.spec_from_file_location(
                name, folders[name] + "/__init__.py", submodule_search_locations=[folders[name]])
        if name == "pydiffusion._native":
            return importlib.util.spec_from_file_location(name, NATIVE)
"""
RUN = """
import importlib.machinery, importlib.util, json, os, sys
ROOT, NATIVE, arguments = json.loads(sys.argv[1])
sys.path[0] = ROOT  # as of python -m
{finder}
sys.meta_path.insert(0, Finder)
import pytest
sys.exit(pytest.main(arguments))
"""


def test_inner_imports() -> None:
    """The test that the runs below collect."""
    from pydiffusion import convert

    assert _native.kernels() and convert.__file__
    code = "import pydiffusion; pydiffusion._native; print(pydiffusion.__file__)"
    if os.environ.get("PYDIFFUSION_TEST_FINDER") is None:  # child processes don't have the fake finder
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert Path(done.stdout.strip()).samefile(pydiffusion.__file__)


def run(command: list[str], **more: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **more}
    return subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False)


def run_with(finder: str) -> subprocess.CompletedProcess[str]:
    given = json.dumps([str(REPOSITORY), _native.__file__, INNER])
    return run([sys.executable, "-c", RUN.format(finder=finder), given], PYDIFFUSION_TEST_FINDER="1")


def test_pytest_as_a_module_takes_what_is_installed() -> None:
    done = run([sys.executable, "-m", "pytest", *INNER])
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


def test_an_editable_install_keeps_working() -> None:
    done = run_with(EDITABLE)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


def test_where_nothing_is_installed_it_says_so() -> None:
    done = run_with(NOTHING)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout + done.stderr
    message = done.stdout + done.stderr
    assert "pydiffusion is not installed" in message and "pip install '.[test]'" in message
    assert "Traceback" not in message
