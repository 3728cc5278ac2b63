"""The fuzzers' corpus through the package; and a short run of the fuzzers where clang is."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from pydiffusion import _native
from pydiffusion.errors import PyDiffusionError

FUZZ = Path(__file__).resolve().parent.parent / "fuzz"
CORPUS = sorted((FUZZ / "corpus").glob("*/*"))
#: Zeros behind the header, as the targets have them: a data section.
N_ZEROS = 1 << 20


@pytest.mark.skipif(not CORPUS, reason="NOT CHECKED: no fuzz/corpus here (a source distribution has none)")
@pytest.mark.parametrize("n_zeros", [0, N_ZEROS])
def test_the_corpus_is_read_or_refused(tmp_path: Path, n_zeros: int) -> None:
    path, opened = tmp_path / "input.gguf", 0
    for entry in CORPUS:
        path.write_bytes(entry.read_bytes() + b"\0" * n_zeros)
        for open_file in (_native.GgufFile, lambda name: _native.Model(name, n_threads=1)):
            try:
                open_file(str(path))
                opened += 1
            except PyDiffusionError as error:
                assert "\n" not in str(error), (entry, error)
    assert opened > 0


@pytest.mark.slow
@pytest.mark.parametrize("target", ["file", "model"])
def test_a_short_fuzz(target: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """PYDIFFUSION_FUZZ names a folder with the built targets; else clang builds them (some minutes)."""
    built = os.environ.get("PYDIFFUSION_FUZZ")
    if not built:
        clang = shutil.which("clang++") or shutil.which("clang++-14")
        tools = [clang, shutil.which("cmake"), shutil.which("ninja")]
        if None in tools or not (FUZZ.parent / "vendor/ggml/CMakeLists.txt").is_file():
            pytest.skip(f"NOT CHECKED: fuzzing of the {target} layer; no clang, cmake, ninja or vendor/ggml")
        built = str(tmp_path_factory.getbasetemp() / "fuzz")
        define = [f"-DCMAKE_CXX_COMPILER={clang}", f"-DCMAKE_C_COMPILER={clang.replace('clang++', 'clang')}"]
        subprocess.run(["cmake", "-G", "Ninja", "-S", FUZZ, "-B", built, *define], check=True)
        subprocess.run(["cmake", "--build", built], check=True)
    found = tmp_path_factory.mktemp("corpus")
    command = [f"{built}/fuzz_{target}", found, FUZZ / "corpus" / target, "-max_len=16384", "-timeout=10"]
    result = subprocess.run(
        [*map(str, command), "-max_total_time=20", f"-artifact_prefix={found}/"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
