"""The fuzzers' corpus through the package, and a short run of the fuzzers where clang is installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support.paths import REPOSITORY

from pydiffusion import _native
from pydiffusion.errors import PyDiffusionError

FUZZ = REPOSITORY / "fuzz"
CORPUS = sorted((FUZZ / "corpus").glob("*/*"))
#: Zeros after the header, as the fuzz targets add them: a data section.
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


@pytest.mark.skipif(not CORPUS, reason="NOT CHECKED: no fuzz/corpus here (a source distribution has none)")
@pytest.mark.parametrize("n_zeros", [0, N_ZEROS])
def test_the_split_corpus_is_read_or_refused(tmp_path: Path, n_zeros: int) -> None:
    """An entry for ``fuzz_split`` is its parts' headers concatenated, each starting with its magic number."""
    outcomes = {}
    for entry in (entry for entry in CORPUS if entry.parent.name == "split"):
        parts = [b"GGUF" + part for part in entry.read_bytes().split(b"GGUF")[1:]]
        paths = [tmp_path / f"{entry.name}-{i + 1:05}-of-{len(parts):05}.gguf" for i in range(len(parts))]
        for path, part in zip(paths, parts, strict=True):
            path.write_bytes(part + b"\0" * n_zeros)
        try:
            outcomes[entry.name] = _native.GgufFile.open_all_parts(str(paths[0])).paths == [*map(str, paths)]
        except PyDiffusionError as error:
            assert "\n" not in str(error), (entry, error)
            outcomes[entry.name] = False
    refused = {"seed-tensor-twice", "seed-key-differs"} if n_zeros else set(outcomes)
    seeds = {name for name in outcomes if name.startswith("seed-")}
    assert len(seeds) == 8 and {name for name in seeds if not outcomes[name]} == refused & seeds


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of the fuzzers: PYDIFFUSION_FUZZ names one; else clang builds them (some minutes)."""
    if folder := os.environ.get("PYDIFFUSION_FUZZ"):
        return folder
    clang = shutil.which("clang++") or shutil.which("clang++-14")
    tools = [clang, shutil.which("cmake"), shutil.which("ninja")]
    if None in tools or not (FUZZ.parent / "vendor/ggml/CMakeLists.txt").is_file():
        pytest.skip("NOT CHECKED: fuzzing of the native layers; no clang, cmake, ninja or vendor/ggml")
    folder = str(tmp_path_factory.getbasetemp() / "fuzz")
    define = [f"-DCMAKE_CXX_COMPILER={clang}", f"-DCMAKE_C_COMPILER={clang.replace('clang++', 'clang')}"]
    subprocess.run(["cmake", "--preset", "fuzz", "-B", folder, *define], cwd=FUZZ.parent, check=True)
    subprocess.run(["cmake", "--build", folder], check=True)
    return folder


def run(*command: object) -> subprocess.CompletedProcess[str]:
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return result


@pytest.mark.slow
@pytest.mark.parametrize("target", ["file", "split", "model", "load"])
def test_a_short_fuzz(built: str, target: str, tmp_path: Path) -> None:
    seeds = FUZZ / "corpus" / ("model" if target == "load" else target)
    limits = ["-max_len=16384", "-timeout=60", "-max_total_time=20", f"-artifact_prefix={tmp_path}/"]
    result = run(f"{built}/fuzz_{target}", tmp_path, seeds, *limits)
    if target == "load":
        found = re.search(r"(\d+) inputs: (\d+) loaded, (\d+) denoised", result.stderr)
        assert found and int(found[3]) > 0, "no input came to a denoising step"
    if target == "split":
        found = re.search(r"(\d+) inputs: (\d+) opened", result.stderr)
        assert found and int(found[2]) > 0, "no input was one file of several parts"


@pytest.mark.slow
def test_errors_of_the_device_at_every_graph(
    built: str, gguf_file: Callable[..., Path], report: Callable[[str], None]
) -> None:
    """Each gives a typed error, after which the session computes as if it had not happened."""
    report(run(f"{built}/inject_errors", gguf_file("tiny", "f32")).stdout.strip())


@pytest.mark.slow
def test_the_sampler_under_valgrind(built: str, report: Callable[[str], None]) -> None:
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        pytest.skip("NOT CHECKED: the sampler under valgrind, which is not installed")
    done = run(valgrind, "--error-exitcode=9", "--leak-check=full", "-q", f"{built}/check_sampler")
    report(f"the sampler under valgrind: {done.stdout.strip()}")
