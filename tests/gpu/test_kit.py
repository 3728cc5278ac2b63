"""The kit for GPU machines: mismatches are refused in one line, and findings are kept."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.paths import REPOSITORY

SCRIPTS = REPOSITORY / "scripts"
PAGE = REPOSITORY / "benchmarks/gpu_page.py"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    names = ("prebuilt", "gpu_findings", "gpu_run")
    return SimpleNamespace(**{name: importlib.import_module(name) for name in names})


@pytest.fixture
def archives(tmp_path: Path, scripts: SimpleNamespace) -> Path:
    """A folder that looks like an unpacked kit of this tree."""
    folder = tmp_path / "archives"
    (folder / "lib").mkdir(parents=True)
    for name in scripts.prebuilt.ARCHIVES:
        (folder / f"lib/lib{name}.a").write_bytes(b"!<arch>\n")
    manifest = {
        "sources": scripts.prebuilt.source_key(),
        "compiler": "GNU 12.2.0",
        "libc": "glibc 2.17",
        "machine": os.uname().machine,
        "commit": "0123456789",
        "flags": "-DPYDIFFUSION_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=90a-real",
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def change(folder: Path, **entries: str) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_a_kit_of_this_tree_passes(archives: Path, scripts: SimpleNamespace) -> None:
    for compiler in ("GNU 12.2.0", "GNU 14.1.0"):
        scripts.prebuilt.check(archives, compiler)


@pytest.mark.parametrize(
    ("entries", "compiler", "said"),
    [
        ({"sources": "ffff"}, "GNU 12.2.0", r"are from other sources \(commit 0123456789\) than this tree"),
        ({}, "Clang 19.1.0", r"compiled by GNU 12.2.0, and Clang 19.1.0 can't link"),
        ({}, "GNU 11.4.0", r"compiled by GNU 12.2.0, and GNU 11.4.0 can't link"),
        ({"libc": "glibc 9.99"}, "GNU 12.2.0", r"need glibc 9.99, but this system has"),
        ({"machine": "m68k"}, "GNU 12.2.0", r"are for m68k, not"),
    ],
)
def test_a_kit_that_does_not_fit(
    entries: dict, compiler: str, said: str, archives: Path, scripts: SimpleNamespace
) -> None:
    change(archives, **entries)
    with pytest.raises(scripts.prebuilt.KitError, match=said):
        scripts.prebuilt.check(archives, compiler)


def test_an_incomplete_kit(archives: Path, scripts: SimpleNamespace, tmp_path: Path) -> None:
    (archives / "lib/libggml-base.a").unlink()
    with pytest.raises(scripts.prebuilt.KitError, match=r"has no libggml-base\.a"):
        scripts.prebuilt.check(archives, "GNU 12.2.0")
    (archives / "manifest.json").unlink()
    with pytest.raises(scripts.prebuilt.KitError, match=r"has no readable manifest\.json"):
        scripts.prebuilt.check(archives, "GNU 12.2.0")
    with pytest.raises(scripts.prebuilt.KitError, match="is not a kit, or an incomplete one"):
        scripts.prebuilt.unpack(archives, tmp_path / "target")


@pytest.mark.parametrize("content", [b"", b"no archive", None])
def test_a_damaged_kit(
    content: bytes | None, archives: Path, scripts: SimpleNamespace, tmp_path: Path
) -> None:
    """A packed kit that is cut off, or not an archive at all, is refused and leaves nothing behind."""
    kit = tmp_path / "kit"
    scripts.prebuilt.pack(archives, kit, "flags", key=scripts.prebuilt.build_key("flags"))
    scripts.prebuilt.unpack(kit, tmp_path / "whole")
    scripts.prebuilt.check(tmp_path / "whole", scripts.prebuilt.compiler_here())
    packed = kit / scripts.prebuilt.PACKED
    packed.write_bytes(packed.read_bytes()[:-200] if content is None else content)
    with pytest.raises(scripts.prebuilt.KitError, match=r"can't be unpacked .*gpu_prepare\.sh"):
        scripts.prebuilt.unpack(kit, tmp_path / "target")
    assert not (tmp_path / "target").exists()
    (kit / "manifest.json").write_text('{"flags": 1}')
    with pytest.raises(scripts.prebuilt.KitError, match=r"has no readable manifest\.json"):
        scripts.prebuilt.read_manifest(kit)


def test_sources_that_change_during_the_build(
    archives: Path, scripts: SimpleNamespace, tmp_path: Path
) -> None:
    with pytest.raises(scripts.prebuilt.KitError, match="changed while they were compiled"):
        scripts.prebuilt.pack(archives, tmp_path / "kit", "flags", key="0123456789abcdef")
    assert not (tmp_path / "kit").exists()


def test_the_key_is_of_what_the_archives_are_made_from(
    scripts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("native/a.cpp", "native/bindings/b.cpp", "vendor/ggml.lock", "vendor/ggml/c.c", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(scripts.prebuilt, "ROOT", tmp_path)
    before = scripts.prebuilt.source_key()
    for name, matters in (
        ("native/a.cpp", True), ("vendor/ggml.lock", True), ("native/bindings/b.cpp", False),
        ("vendor/ggml/c.c", False), ("README.md", False),
    ):  # fmt: skip
        (tmp_path / name).write_text("changed")
        assert (scripts.prebuilt.source_key() != before) == matters, name
        before = scripts.prebuilt.source_key()


def test_without_nvcc(tmp_path: Path) -> None:
    """gpu_prepare.sh says what is missing before it does anything."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "mkdir", "sed"):
        (tools / name).symlink_to(f"/bin/{name}" if Path(f"/bin/{name}").exists() else f"/usr/bin/{name}")
    done = subprocess.run(
        [tools / "bash", SCRIPTS / "gpu_prepare.sh", "--kit", tmp_path / "kit"],
        env={"PATH": str(tools), "HOME": str(tmp_path), "CUDACXX": str(tmp_path / "nvcc")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("gpu_prepare: no nvcc"), done.stderr
    assert [path.name for path in (tmp_path / "kit").iterdir()] == [".lock"]


@pytest.fixture
def run(scripts: SimpleNamespace, archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(scripts.gpu_findings.VARIABLE, raising=False)
    options = ["check", "--out", str(tmp_path / "out"), "--folder", str(tmp_path), "--kit", str(archives)]
    run = scripts.gpu_run.Run(scripts.gpu_run.parse([*options, "--seconds", "12"]))
    yield run
    os.environ.pop(scripts.gpu_findings.VARIABLE, None)


@pytest.mark.parametrize(
    ("capability", "architectures", "fits"),
    [
        ("9.0", "90a-real", True),
        ("8.9", "90a-real", False),
        ("12.0", "90a-real", False),
        ("8.9", "80-real;86-real", True),  # code of the same major version
        ("8.0", "86-real", False),
        ("7.0", "75-virtual;80-real", False),
        ("12.0", "75-virtual", True),  # the driver compiles it
        ("12.0", "all-major", True),
    ],
)
def test_gpus_that_the_kit_has_no_code_for(
    run, scripts: SimpleNamespace, archives: Path, capability: str, architectures: str, fits: bool
) -> None:
    change(archives, flags=f"-DPYDIFFUSION_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES={architectures}, nvcc 13.0.88")
    if fits:
        run.require_capability(["3.5", capability])  # any card will do
    else:
        with pytest.raises(scripts.gpu_run.RunError, match=rf"compute capability {capability}.*gpu_prepare"):
            run.require_capability([capability])


def findings(run) -> list[dict]:
    return [json.loads(line) for line in run.results.read_text().splitlines()]


def test_findings_are_kept_when_time_runs_out(run, scripts: SimpleNamespace) -> None:
    code = "import gpu_findings, time; gpu_findings.add('early', ok=True); print('said'); time.sleep(60)"
    assert not run.step("slow", [sys.executable, "-c", code], needs=1)
    assert not run.step("later", [sys.executable, "-c", ""], needs=1)
    found = findings(run)
    assert [entry["finding"] for entry in found] == ["early", "slow", "later"]
    assert found[1]["ok"] is False and "the time was up" in found[1]["text"]
    assert "were left" in found[2]["skipped"]
    assert run.log.read_text().endswith("\nsaid\n")


@pytest.mark.parametrize("after", [0, 2], ids=["running", "starting"])
def test_an_interrupted_run_leaves_nothing_behind(
    tmp_path: Path, scripts: SimpleNamespace, after: float
) -> None:
    """Its child processes end, its temporary folder is removed, and its findings and page stay.

    Also if the signal arrives while ``Popen``, which here takes ``after`` seconds more, starts the child.
    """
    pid, out = tmp_path / "pid", tmp_path / "out"
    child = (
        f"import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(60)"
    )
    code = (
        f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); import gpu_run; Run = gpu_run.Run\n"
        "Run.check_machine = lambda self: None\nRun.install = lambda self: None\n"
        f"import subprocess, time; start = subprocess.Popen.__init__\n"
        f"slow = lambda *a, **k: (start(*a, **k), time.sleep({after}))[0]\n"
        "subprocess.Popen.__init__ = slow\n"
        f"Run.check = lambda self: self.step('child', [sys.executable, '-c', {child!r}], 0)\n"
        f"sys.argv = ['gpu_run.py', 'check', '--out', {str(out)!r}, '--folder', {str(tmp_path)!r}]\n"
        "sys.exit(gpu_run.main())"
    )
    running = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    while not (pid.exists() and pid.read_text()):
        assert running.poll() is None
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    assert running.wait(30) == 130
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert "interrupted" in (out / "page.md").read_text()
    assert not list(tmp_path.glob("pydiffusion-gpu-*"))


def test_a_program_that_fails_is_a_finding(run) -> None:
    assert not run.step("broken", [sys.executable, "-c", "raise SystemExit('no such thing')"], needs=0)
    (found,) = findings(run)
    assert found["exit"] == 1 and "no such thing" in found["text"]


def test_an_error_of_cmake_in_one_line(scripts: SimpleNamespace) -> None:
    text = (
        "-- The C compiler identification is GNU 12.2.0\n"
        "  CMake Error at cmake/cuda_libraries.cmake:21 (message):\n"
        "    cuBLAS is neither in the CUDA toolkit nor installed\n    as the wheel\n\n    nvidia-cublas\n"
        "-- Configuring incomplete, errors occurred!\n"
    )
    said = scripts.gpu_run.cmake_error(text)
    assert said == "cuBLAS is neither in the CUDA toolkit nor installed as the wheel nvidia-cublas"
    assert scripts.gpu_run.cmake_error("ninja: error\n") is None


def test_without_a_gpu_or_room(run, scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripts.gpu_run, "output_lines", lambda *_: [])
    with pytest.raises(scripts.gpu_run.RunError, match="finds no GPU"):
        run.check_machine()
    monkeypatch.setattr(
        scripts.gpu_run, "output_lines", lambda *_: ["NVIDIA H100, 9.0, 580, 81559 MiB, 1980, 2619"]
    )
    monkeypatch.setattr(scripts.gpu_run, "FOLDER_BYTES", 1 << 60)
    with pytest.raises(scripts.gpu_run.RunError, match="GB free, but the models need another"):
        run.check_machine()
    kept = run.options.folder / scripts.gpu_run.MODEL
    with kept.open("wb") as file:
        file.truncate(1 << 40)  # of an earlier call: needs no more room
    monkeypatch.setattr(scripts.gpu_run, "FOLDER_BYTES", (1 << 40) + 1)
    run.check_machine()


def test_the_plugin_reports_each_failure_at_once(tmp_path: Path, scripts: SimpleNamespace) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 1 == 2\n"
        "def test_left(): pytest.skip('NOT CHECKED: that')\n"
    )
    results = tmp_path / "results.jsonl"
    env = {**os.environ, "PYTHONPATH": str(SCRIPTS), scripts.gpu_findings.VARIABLE: str(results)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "gpu_findings",
        "-p",
        "no:cacheprovider",
        "test_some.py",
    ]
    subprocess.run(command, cwd=tmp_path, env=env, check=False, capture_output=True)
    begun, failed, skipped, counts = map(json.loads, results.read_text().splitlines())
    assert begun["begun"] is True and begun["what"] == counts["what"] == failed["of"]
    assert failed["test"] == "test_some.py::test_bad" and "assert 1 == 2" in failed["text"]
    assert skipped["finding"] == "test skipped" and "NOT CHECKED: that" in skipped["skipped"]
    assert (counts["n_passed"], counts["n_failed"], counts["ok"]) == (1, 1, False)
    page = subprocess.run([sys.executable, PAGE, results], capture_output=True, text=True, check=True).stdout
    assert (
        "| FAIL |  | n_passed 1, n_failed 1, n_skipped 1 |" in page
        and "### test failed: test_some.py" in page
    )
    again = [json.dumps({**begun}), json.dumps({**counts, "ok": True})]  # and now all pass
    with results.open("a") as file:
        file.write("\n".join(again) + "\n")
    page = subprocess.run([sys.executable, PAGE, results], capture_output=True, text=True, check=True).stdout
    assert "FAIL" not in page
    with results.open("a") as file:
        file.write('{"finding": "cut')
    assert len(scripts.gpu_findings.read(results)) == 6
