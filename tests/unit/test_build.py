"""The built extension: its stub, its symbols, its version."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import REPOSITORY

from pydiffusion import _native


def test_version_is_the_pinned_ggml() -> None:
    pinned = re.search(
        r"^# ggml-version: (\S+)$", (REPOSITORY / "vendor/ggml.lock").read_text(), re.MULTILINE
    )
    assert pinned and _native.version()["ggml"] == pinned.group(1)


def test_the_stub_is_what_stubgen_writes(tmp_path: Path) -> None:
    pytest.importorskip("nanobind", reason="NOT CHECKED: the committed stub (nanobind is not installed)")
    fresh = tmp_path / "_native.pyi"
    command = [sys.executable, "-m", "nanobind.stubgen", "-m", "pydiffusion._native", "-o", str(fresh)]
    subprocess.run(command, check=True, capture_output=True)
    assert fresh.read_text() == (REPOSITORY / "pydiffusion/_native.pyi").read_text(), "run: " + " ".join(
        command[1:]
    )


@pytest.mark.skipif(not shutil.which("nm") or sys.platform != "linux", reason="NOT CHECKED: symbols (no nm)")
def test_no_symbol_of_ggml_is_visible() -> None:
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", _native.__file__], check=True, capture_output=True, text=True
    )
    names = [line.split()[-1] for line in listing.stdout.splitlines()]
    assert "PyInit__native" in names
    assert not [name for name in names if "ggml" in name or "gguf" in name]


def test_the_source_without_its_compiled_part_says_so(tmp_path: Path) -> None:
    shutil.copytree(
        REPOSITORY / "pydiffusion",
        tmp_path / "pydiffusion",
        ignore=shutil.ignore_patterns("_native*", "demo"),
    )
    done = subprocess.run(
        # -S: without site-packages, where an installed one would be found
        [sys.executable, "-S", "-c", "from pydiffusion import _native"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "run elsewhere, or install" in done.stderr.splitlines()[-1]


def test_the_licences_of_linked_libraries_are_installed() -> None:
    texts = {
        file.name: file.read_text(encoding="utf-8")
        for file in importlib.metadata.files("pydiffusion-gguf") or ()
        if file.name.startswith("LICENSE") and ".dist-info" in file.parts[0]
    }
    assert "Apache License" in texts["LICENSE"]
    assert "The ggml authors" in texts["LICENSE-ggml.txt"]
    assert "Wenzel Jakob" in texts["LICENSE-nanobind.txt"]
    assert "Thibaut Goetghebuer-Planchon" in texts["LICENSE-nanobind.txt"]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="NOT CHECKED: whether the fuzzers compile (no c++)")
def test_the_fuzzers_still_compile() -> None:
    """They are built by hand, with clang, so changes of the runtime may break them unnoticed."""
    headers = REPOSITORY / "vendor/ggml/include"
    if not headers.is_dir():
        pytest.skip("NOT CHECKED: whether the fuzzers compile (no build has put ggml into vendor/)")
    command = ["c++", "-std=c++17", "-fsyntax-only", f"-I{REPOSITORY / 'native'}", f"-I{headers}"]
    subprocess.run([*command, *map(str, (REPOSITORY / "fuzz").glob("*.cpp"))], check=True)
