"""benchmarks/gpu.py and gpu_kernels.py with the host in place of a GPU, so that they work on one."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.paths import REPOSITORY

from pydiffusion.testing.synthetic import synthetic_bytes, write_synthetic

FOLDER = REPOSITORY / "benchmarks"
MEASURED = [
    "machine", "rates", "load", "first-step", "steps:16", "peaked:50", "answer", "determinism", "batch:2",
    "file-types", "ggml-kernels", "graphs-off", "cpu-experts", "memory:1",
]  # fmt: skip


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The scripts as modules; they import each other by name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu
    import gpu_kernels
    import gpu_measure
    import gpu_page

    return SimpleNamespace(gpu=gpu, kernels=gpu_kernels, measure=gpu_measure, page=gpu_page)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_synthetic("tiny", folder / "tiny-q8_0.gguf", "q8_0")
    return folder


def given(folder: Path, results: Path, *more: str) -> list[str]:
    return [
        "--shape", "tiny", "--device", "host", "--types", "q8_0", "--threads", "1", "--folder", str(folder),
        "--results", str(results), "--prompts", "16", "--peaked-prompt", "16", "--kept", "50", "--timed", "3",
        "--steps", "5", "--answer", "20:512", "--commit", "abc123", "--batches", "2",
        "--memory-limits", "1", "--memory-context", "512", *more,
    ]  # fmt: skip


def read(path: Path, name: str | None = None) -> list[dict[str, Any]]:
    """Finished findings, of one name or all; a truncated line is left out."""
    entries = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return [e for e in entries if not e.get("begun") and name in (None, e["finding"])]


def test_all_measurements(
    scripts: SimpleNamespace, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results.jsonl"
    assert scripts.gpu.main(given(models, results)) == 0
    page = capsys.readouterr().out
    entries = read(results)
    assert [entry["finding"] for entry in entries] == MEASURED
    assert not [entry for entry in entries if "error" in entry]
    assert {e["finding"] for e in entries if "skipped" in e} == {"file-types", "ggml-kernels", "graphs-off"}
    by_name = {entry["finding"]: entry for entry in entries}
    assert by_name["machine"]["commit"] == "abc123"
    steps = by_name["steps:16"]
    assert len(steps["steps"]) == 3 + scripts.measure.WARM_STEPS
    assert steps["best"] <= steps["step"] and {"experts", "sampler"} <= steps["parts"].keys()
    peaked = by_name["peaked:50"]
    assert 30 < peaked["kept"] <= 50
    assert peaked["entropy"] == pytest.approx(peaked["entropy_expected"], abs=0.5)
    answer = by_name["answer"]
    assert answer["tokens"] == 512 and len(answer["blocks"]) == 2
    assert answer["blocks"][0]["steps"] == 5 and answer["blocks"][1]["commit"] > 0
    assert answer["first_canvas"] < answer["total"]
    assert by_name["determinism"]["same"] and by_name["determinism"]["seeds_differ"]
    batch = by_name["batch:2"]
    assert batch["tokens"] == 512 and batch["n_graphs"] == 1 and batch["one"] == steps["step"]
    memory = by_name["memory:1"]
    assert 0 < memory["planned"] <= memory["limit"] == 1 << 30 and memory["step"] > 0
    assert by_name["cpu-experts"]["n_cpu_moe"] == 2 and by_name["cpu-experts"]["all_on_gpu"] == steps["step"]
    for row in (
        "- commit: abc123",
        "| q8_0 | host | ",
        "| q8_0 | 16 | ",
        "| q8_0 | 50 | ",
        "| q8_0 | 20 | 512 | 5 | ",
        "| q8_0 | 2 | 16 | ",
        "| q8_0 | 1 GiB | ",
        "| experts | ",
        "- q8_0: the same seed again gave the same tokens, another seed other tokens",
        "- q8_0 graphs-off: skipped, no GPU",
    ):
        assert row in page, page
    assert scripts.gpu.main(["page", str(results)]) == 0
    assert capsys.readouterr().out.strip() == page.strip()


def test_measurements_with_a_simulated_gpu(
    scripts: SimpleNamespace,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The driver's figures, memory in use, and the process without CUDA graphs, with a simulated GPU."""
    driver = tmp_path / "nvidia-smi"
    driver.write_text(
        '#!/bin/sh\ncase "$1" in *name*) echo "NVIDIA H100 80GB HBM3, 580";; *) echo "1980 MHz, 3 W"; esac\n'
    )
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    free = iter(range(100_000_000_000, 0, -1_000_000_000))

    def devices() -> list[Any]:
        return [
            SimpleNamespace(name="host", description="made up", free_bytes=next(free), total_bytes=10**11)
        ]

    monkeypatch.setattr(scripts.gpu, "devices", devices)
    monkeypatch.setattr(scripts.measure, "devices", devices)
    results = tmp_path / "results.jsonl"
    assert scripts.gpu.main(given(models, results, "--only", "steps", "graphs-off", "cpu-experts")) == 0
    page = capsys.readouterr().out
    by_key = {(entry["finding"], entry.get("variant")): entry for entry in read(results)}
    assert not [entry for entry in by_key.values() if "error" in entry], by_key
    assert by_key["load", None]["used_by_model"] == 1e9 and by_key["first-step", None]["used"] == 3e9
    off = by_key["steps:16", "graphs-off"]
    assert off["commit"] == "abc123" and off["step"] > 0
    assert by_key["machine", "graphs-off"]["environment"]["GGML_CUDA_DISABLE_GRAPHS"] == "1"
    assert by_key["cpu-experts", None]["per_layer"] is not None
    for row in (
        "# pydiffusion on NVIDIA H100 80GB HBM3",
        "| q8_0 graphs-off | 16 | ",
        "- q8_0 graphs-off, steps:16: ",
        "| 1980 MHz, 3 W |",
    ):
        assert row in page, page


def test_time_runs_out(scripts: SimpleNamespace, models: Path, tmp_path: Path) -> None:
    """Steps that would take a minute are cut off; what was found before is kept, and a line says so."""
    results = tmp_path / "results.jsonl"
    command = [sys.executable, str(FOLDER / "gpu.py"), *given(models, results, "--seconds", "6")]
    command[command.index("--answer") + 1] = "20:100000"
    command[command.index("--prompts") + 1] = "100000"
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "left out: " in done.stderr and "answer" in done.stderr
    names = [entry["finding"] for entry in read(results) if "skipped" not in entry]
    assert names[:4] == MEASURED[:4]
    (answer,) = read(results, "answer")
    assert "the time was up" in answer["skipped"]
    assert "- q8_0 answer: skipped, the time was up" in done.stdout


def test_a_measurement_is_cut_off(
    scripts: SimpleNamespace, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A measurement that takes longer than estimated ends with the time budget."""
    results = tmp_path / "results.jsonl"
    arguments = scripts.gpu.parse(given(models, results, "--seconds", "2"))
    monkeypatch.setattr(scripts.measure.Bench, "n_timed", lambda bench: 100_000)
    run = scripts.gpu.Run(arguments, scripts.gpu.Results(results, {}))
    bench = run.bench = scripts.measure.Bench(models / "tiny-q8_0.gguf", arguments, run.left)
    bench.load()
    run.measure("answer", lambda: bench._generate(16, 100, seed=0)[1], 0.0)
    run.measure("steps:16", lambda: bench.steps(16), 0.0)
    run.measure("peaked:50", lambda: bench.peaked(50), 0.0)
    run.over.set()
    assert run.left() > -10
    assert len(read(results, "steps:16")) == 1
    assert "the time was up" in read(results, "peaked:50")[0]["skipped"]


def test_failures(
    scripts: SimpleNamespace, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A failure keeps its traceback, three one after another end the run, --resume does the rest."""
    results = tmp_path / "results.jsonl"

    def fail(*_: Any) -> None:
        raise RuntimeError("an illegal memory access")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("peaked", "answer", "determinism"):
            patch.setattr(scripts.measure.Bench, name, fail)
        assert scripts.gpu.main(given(models, results)) == 3
    captured = capsys.readouterr()
    assert "3 consecutive measurements failed" in captured.err and "in fail" in captured.err
    assert read(results, "cpu-experts")[0]["skipped"] == "3 measurements before it failed"
    assert "in fail" in read(results, "answer")[0]["traceback"]
    assert "- q8_0 answer: FAILED, RuntimeError: an illegal memory access" in captured.out
    with results.open("a") as file:  # as a process that was aborted leaves it
        killed = {"when": "", "finding": "determinism", "type": "q8_0", "begun": True}
        file.write(json.dumps(killed) + '\n{"when": "2026')
    assert scripts.gpu.main(given(models, results, "--resume")) == 0
    page = capsys.readouterr().out
    assert len(read(results, "steps:16")) == 1 and len(read(results, "answer")) == 2
    assert len(read(results, "determinism")) == 1 and len(read(results, "peaked:50")) == 1
    assert "| q8_0 | 20 | 512 | 5 | " in page and "- q8_0 determinism: ended the process" in page


def test_the_file(
    scripts: SimpleNamespace, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Written once, reused, waited for, and refused where there is no room."""
    results = tmp_path / "results.jsonl"
    assert scripts.gpu.main(given(tmp_path, results, "--write-only")) == 0
    path = tmp_path / "tiny-q8_0.gguf"
    assert capsys.readouterr().out.strip() == str(path)
    assert path.read_bytes() == (models / path.name).read_bytes()
    assert path.stat().st_size == synthetic_bytes("tiny", "q8_0")
    written = path.stat().st_mtime_ns
    assert scripts.gpu.main(given(tmp_path, results, "--write-only")) == 0
    assert path.stat().st_mtime_ns == written

    path.write_bytes(b"cut off")
    begun, go_on = threading.Event(), threading.Event()

    def write(shape: str, target: Path, type_name: str) -> None:
        begun.set()
        go_on.wait(20)
        write_synthetic(shape, target, type_name)

    def make() -> Path:
        return scripts.gpu.synthetic_file("tiny", "q8_0", [tmp_path], lambda: 20.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scripts.gpu, "write_synthetic", write)
        threads = [threading.Thread(target=make) for _ in range(2)]
        threads[0].start()
        assert begun.wait(20)
        threads[1].start()
        time.sleep(0.3)
        go_on.set()
        for thread in threads:
            thread.join(20)
    said = capsys.readouterr().err
    assert "waiting for another process that writes" in said and said.count("written in") == 1

    with pytest.MonkeyPatch.context() as patch:
        usage = SimpleNamespace(free=1000)
        patch.setattr("shutil.disk_usage", lambda folder: usage)
        path.unlink()
        assert scripts.gpu.main(given(tmp_path, results, "--write-only")) == 1
        line = capsys.readouterr().err
        assert "not enough space" in line and "--folder DIR" in line and str(tmp_path) in line
        assert scripts.gpu.main(given(tmp_path, results)) == 0
    assert "no room for" in read(results, "load")[0]["error"]
    assert "no room for" in capsys.readouterr().out


def test_kept_tokens(scripts: SimpleNamespace) -> None:
    """Counts by the kernels' rule, on distributions worked out by hand."""
    p = np.array([[0.9, 0.09, 0.00999, 0.00001], [0.25, 0.25, 0.25, 0.25]])
    logits = np.log(p)
    found, entropies = scripts.measure.kept_tokens(logits, 1.0, 1e-4)
    assert found.tolist() == [3, 4]
    assert entropies == pytest.approx((-p * logits).sum(1))
    assert scripts.measure.kept_tokens(logits, 1.0, 1e-6)[0].tolist() == [4, 4]
    many = -np.sort(-np.random.default_rng(0).standard_normal((8, 20_000)), axis=1)
    temperature = scripts.measure.temperature_for(many, 100, 0.5)
    assert scripts.measure.kept_tokens(many, temperature, 0.5)[0].mean() == pytest.approx(100, abs=3)


def test_page_of_checks(scripts: SimpleNamespace, tmp_path: Path) -> None:
    entries = [
        {"when": "2026-11-26T10:00:00", "finding": "kernels", "ok": True, "seconds": 3.5, "passed": 12},
        {"when": "2026-11-26T10:00:00", "finding": "parity:q8_0", "ok": False, "mean": 0.5, "stderr": "a\nb"},
        {"when": "2026-11-26T10:00:00", "finding": "sanitizer", "skipped": "not installed"},
        {"when": "2026-11-26T10:00:00", "finding": "rates", "type": "q4_k_m", "device": "CUDA0",
         "copy": 3e12, "matmul": {"q4_k": 4e14}},
        {"when": "2026-11-26T10:00:00", "finding": "machine", "shape": "26b-a4b",
         "gpus": [{"name": "NVIDIA H100 80GB HBM3"}]},
        {"when": "2026-11-26T10:00:00", "finding": "step-kernels", "launches": 3,
         "kernels": [["mul_mat_q<q4_k,128>", 2, 30.0], ["rms_norm_f32", 1, 10.0]]},
    ]  # fmt: skip
    page = scripts.page.page(entries)
    for row in (
        "# pydiffusion on NVIDIA H100 80GB HBM3",
        "1 pass, 1 fail, 1 skipped.",
        "| kernels |  | pass | 3.5 | passed 12 |",
        "| parity:q8_0 |  | FAIL |  | mean 0.5 |",
        "| sanitizer |  | skipped |  | skipped not installed |",
        "### parity:q8_0\n\nmean:\n\n```\n0.5\n```\n\nstderr:\n\n```\na\nb\n```",
        "| q4_k_m | CUDA0 | 3000 | q4_k 400.0 |",
        "| `mul_mat_q<q4_k,128>` | 2 | 30.0 | 15.00 | 75.0% |",
    ):
        assert row in page, page


_LONG = """==PROF== Connected to process 7 (/usr/bin/python3)
one step behind 1024 tokens
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size",\
"Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"
"0","7","python3","127.0.0.1","void mul_mat_q<(ggml_type)12, (int)128, (bool)0>(const char *, int *)","1",\
"7","(32, 8, 1)","(22, 1, 1)","0","9.0","Command line profiler metrics","gpu__time_duration.sum",\
"us","1,012.50"
"1","7","python3","127.0.0.1","void mul_mat_q<(ggml_type)14, (int)128, (bool)0>(const char *, int *)","1",\
"7","(32, 8, 1)","(22, 1, 1)","0","9.0","Command line profiler metrics","gpu__time_duration.sum","ms","0.5"
==PROF== Disconnected from process 7
"2","7","python3","127.0.0.1","void mul_mat_q<(ggml_type)12, (int)128, (bool)0>(const char *, int *)","1",\
"7","(32, 8, 1)","(11, 1, 1)","0","9.0","Command line profiler metrics","gpu__time_duration.sum","ns","500"
"3","7","python3","127.0.0.1","pydiffusion::(anonymous namespace)::find_mass(const float *)","1","7",\
"(1024, 1, 1)","(256, 1, 1)","0","9.0","Command line profiler metrics","gpu__time_duration.sum","usecond","87"
"""

_WIDE = """"ID","Process ID","Kernel Name","Grid Size","gpu__time_duration.sum"
"","","","","us"
"0","7","void k_bin_bcast<&(op_mul(float, float)), float, float>(const float *)","(1, 1, 1)","2.5"
"1","7","void k_bin_bcast<&(op_add(float, float)), float, float>(const float *)","(1, 1, 1)","1.5"
"""


def test_kernels_table(scripts: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long, wide, empty = (tmp_path / name for name in ("long.csv", "wide.csv", "empty.csv"))
    long.write_text(_LONG)
    wide.write_text(_WIDE)
    empty.write_text("==ERROR== No kernels were profiled.\n")
    results = tmp_path / "results.jsonl"
    assert scripts.kernels.main(["table", str(long), "--results", str(results), "--commit", "abc"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1:] == [
        ["2", "1013.0", "506.50", "63.3%", "mul_mat_q<q4_k,128,0>"],
        ["1", "500.0", "500.00", "31.2%", "mul_mat_q<q6_k,128,0>"],
        ["1", "87.0", "87.00", "5.4%", "find_mass"],
        ["4", "1600.0", "400.00", "100.0%", "sum"],
    ]
    finding = read(results, "step-kernels")[0]
    assert finding["kernels"][0] == ["mul_mat_q<q4_k,128,0>", 2, 1013.0] and finding["launches"] == 4
    assert scripts.kernels.main(["table", str(long), "--grids"]) == 0
    assert "mul_mat_q<q4_k,128,0> (11, 1, 1)" in capsys.readouterr().out
    assert scripts.kernels.main(["table", str(wide)]) == 0
    out = capsys.readouterr().out
    assert "k_bin_bcast<op_mul,float,float>" in out and "k_bin_bcast<op_add,float,float>" in out
    assert scripts.kernels.main(["table", str(empty)]) == 1
    assert "No kernels were profiled" in capsys.readouterr().err
    assert scripts.kernels.main(["table", str(empty), "--results", str(results), "--commit", "abc"]) == 1
    assert "No kernels were profiled" in read(results, "step-kernels")[1]["error"]


def test_long_kernel_names_stay_distinct(scripts: SimpleNamespace) -> None:
    long = "a" * 300
    short = scripts.kernels.short_names([f"{long}<1>{long}(int)", f"{long}<2>{long}(int)"])
    assert len(set(short.values())) == 2 and all(len(name) < 100 for name in short.values())


def test_a_profiled_step(models: Path) -> None:
    """Without a GPU the step runs, with a note that no profiler records it."""
    command = [
        sys.executable, str(FOLDER / "gpu_kernels.py"), "--shape", "tiny", "--type", "q8_0",
        "--device", "host", "--prompt", "16", "--threads", "1", "--folder", str(models), "--kept", "50",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "nothing records it" in done.stderr and "profiled one step after 16 tokens" in done.stderr


def test_a_missing_profiler_is_explained(scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Any:
        if name != "libcuda.so.1":
            raise OSError("no such library")
        calls = SimpleNamespace()
        for call in ("cuProfilerStart", "cuProfilerStop"):
            function = lambda: 100  # noqa: E731
            function.__name__ = call
            setattr(calls, call, function)
        return calls

    monkeypatch.setattr(scripts.kernels.ctypes, "CDLL", load)
    start, _ = scripts.kernels.profiler()
    with pytest.raises(RuntimeError, match=r"libcuda\.so\.1: cuProfilerStart returned 100"):
        start()

    def refuse(name: str) -> Any:
        raise OSError("no such library")

    monkeypatch.setattr(scripts.kernels.ctypes, "CDLL", refuse)
    with pytest.raises(RuntimeError, match=r"tried .*libcudart\.so\.13 \(no such library\).*libcuda\.so\.1"):
        scripts.kernels.profiler()


def test_the_page_needs_no_extension() -> None:
    """It can be made anywhere."""
    path = f"import sys; sys.path.insert(0, {str(FOLDER)!r})"
    code = f"{path}; import gpu_page; print('pydiffusion' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
