"""8-bit KV caches: asking for one warns, and none is chosen automatically."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from pydiffusion import DiffusionModel, plan
from pydiffusion.cli import main
from pydiffusion.errors import InsufficientMemoryError
from pydiffusion.testing.bench import run_bench

FIGURES = r"8-bit KV cache.*0\.377.*26B-A4B.*0\.108.*31B.*f16"


@pytest.fixture
def file(gguf_file: Callable[..., Path]) -> Path:
    return gguf_file("wide", "q8_0", seed=0, dtype="f32")


@pytest.mark.parametrize("ask", [
    lambda file, kv: DiffusionModel(file, n_ctx=128, n_threads=1, kv_type=kv),
    lambda file, kv: plan(file, n_ctx=128, kv_type=kv),
    lambda file, kv: run_bench(file, 1, n_prompt=8, n_steps=2, kv_type=kv),
])  # fmt: skip
def test_a_q8_0_cache_warns_once(file: Path, ask: Callable[[Path, str], object]) -> None:
    with pytest.warns(UserWarning, match=FIGURES) as caught:
        ask(file, "q8_0")
    assert len(caught) == 1
    assert Path(caught[0].filename) == Path(__file__), "it names the line that asks"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kv_type in ("auto", "f16", "f32"):
            ask(file, kv_type)


def test_unknown_cache_types_are_refused_by_plans(file: Path) -> None:
    with pytest.raises(ValueError, match="kv_type is 'q4_0'"):
        plan(file, kv_type="q4_0")


def test_commands_warn_in_one_line(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = ["bench", "-m", str(file), "--prompt", "8", "--steps", "2", "--threads", "1", "--json"]
    place = ["devices", "-m", str(file), "--json"]
    generate = ["generate", "-m", str(file), "-p", "a", "-n", "2", "--steps", "1", "--threads", "1"]
    for command in (bench, place, generate):
        for cache_type, n in (("q8_0", 1), ("f16", 0), ("q8_0", 1)):
            assert main([*command, "--cache-type", cache_type]) == 0
            out, err = capsys.readouterr()
            lines = [line for line in err.splitlines() if "8-bit" in line]
            assert len(lines) == n, err
            assert all(line.startswith("pydiffusion: warning: ") and "0.377" in line for line in lines)
            assert "8-bit" not in out


def test_the_server_warns_as_it_starts(file: Path, tmp_path: Path) -> None:
    """In its log, on stderr."""
    command = [sys.executable, "-m", "pydiffusion", "serve", "-m", str(file), "--port", "0", "--threads", "1"]
    server = subprocess.Popen([*command, "--cache-type", "q8_0"], stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    lines = []
    try:
        for line in server.stderr:
            lines.append(line)
            if "serving on" in line:
                break
    finally:
        server.terminate()
        server.communicate(timeout=60)
    assert [line for line in lines if "8-bit" in line and "0.377" in line] == lines[:1]


def test_short_memory_does_not_choose_q8_0(
    file: Path, gguf_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """With any memory limit, the plan is that of a 16-bit cache, and the opened model has one."""
    whole = plan(file, n_ctx=512, device="host", kv_type="f16")
    room = whole.total_bytes
    seen = set()
    for limit in range(room, -1, -max(1, room // 100)):
        found = plan(file, n_ctx=512, device="host", gpu_memory=limit)
        assert found == plan(file, n_ctx=512, device="host", gpu_memory=limit, kv_type="f16")
        state = (found.n_gpu_layers, found.n_cpu_moe)
        if state not in seen:
            seen.add(state)
            opened = DiffusionModel(file, n_ctx=512, device="host", gpu_memory=limit, n_threads=1)
            assert opened.description["kv_type"] == "f16"
    assert (0, 0) in seen and len(seen) > 4
    with pytest.raises(InsufficientMemoryError):
        DiffusionModel(file, n_ctx=512, device="host", n_gpu_layers=6, gpu_memory=whole.total_bytes // 2)
    exact = DiffusionModel(
        gguf_file("wide", "f32", seed=0, dtype="f32"), n_ctx=512, device="host", gpu_memory=0
    )
    assert exact.description["kv_type"] == "f32"
    capsys.readouterr()
    assert main(["bench", "-m", str(file), "--prompt", "8", "--steps", "2", "--threads", "1", "--json",
                 "--device", "host", "--gpu-memory", str(room // 2)]) == 0  # fmt: skip
    assert json.loads(capsys.readouterr().out)["kv_type"] == "f16"
