"""The kit for machines with a GPU: what does not fit is refused in one line, and what was found is kept."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"


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
        ({"sources": "ffff"}, "GNU 12.2.0", r"are of other sources \(commit 0123456789\) than this tree"),
        ({}, "Clang 19.1.0", r"compiled by GNU 12.2.0, and Clang 19.1.0 can't link"),
        ({}, "GNU 11.4.0", r"compiled by GNU 12.2.0, and GNU 11.4.0 can't link"),
        ({"libc": "glibc 9.99"}, "GNU 12.2.0", r"need glibc 9.99, here is"),
        ({"machine": "m68k"}, "GNU 12.2.0", r"are for m68k, not"),
    ],
)
def test_a_kit_that_does_not_fit(
    entries: dict, compiler: str, said: str, archives: Path, scripts: SimpleNamespace
) -> None:
    change(archives, **entries)
    with pytest.raises(scripts.prebuilt.KitError, match=said):
        scripts.prebuilt.check(archives, compiler)


def test_a_kit_that_is_none(archives: Path, scripts: SimpleNamespace, tmp_path: Path) -> None:
    (archives / "lib/libggml-base.a").unlink()
    with pytest.raises(scripts.prebuilt.KitError, match=r"has no libggml-base\.a"):
        scripts.prebuilt.check(archives, "GNU 12.2.0")
    (archives / "manifest.json").unlink()
    with pytest.raises(scripts.prebuilt.KitError, match=r"has no readable manifest\.json"):
        scripts.prebuilt.check(archives, "GNU 12.2.0")
    with pytest.raises(scripts.prebuilt.KitError, match="is no kit, or an unfinished one"):
        scripts.prebuilt.unpack(archives, tmp_path / "target")


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
    assert list((tmp_path / "kit").iterdir()) == []


@pytest.fixture
def run(scripts: SimpleNamespace, archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(scripts.gpu_findings.VARIABLE, raising=False)
    options = ["check", "--out", str(tmp_path / "out"), "--folder", str(tmp_path), "--kit", str(archives)]
    run = scripts.gpu_run.Run(scripts.gpu_run.parse([*options, "--seconds", "8"]))
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
    ],
)
def test_a_card_that_the_kit_has_no_code_for(
    run, scripts: SimpleNamespace, archives: Path, capability: str, architectures: str, fits: bool
) -> None:
    change(archives, flags=f"-DPYDIFFUSION_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES={architectures}")
    if fits:
        run.require_capability(capability)
    else:
        with pytest.raises(scripts.gpu_run.RunError, match=rf"compute capability {capability}.*gpu_prepare"):
            run.require_capability(capability)


def findings(run) -> list[dict]:
    return [json.loads(line) for line in run.results.read_text().splitlines()]


def test_time_that_runs_out_keeps_what_was_found(run, scripts: SimpleNamespace) -> None:
    code = "import gpu_findings, time; gpu_findings.add('early', ok=True); print('said'); time.sleep(60)"
    assert not run.step("slow", [sys.executable, "-c", code], needs=1)
    assert not run.step("later", [sys.executable, "-c", ""], needs=1)
    found = findings(run)
    assert [entry["finding"] for entry in found] == ["early", "slow", "later"]
    assert found[1]["ok"] is False and "the time was up" in found[1]["text"]
    assert "were left" in found[2]["skipped"]
    assert run.log.read_text().endswith("\nsaid\n")


def test_a_program_that_fails_is_a_finding(run) -> None:
    assert not run.step("broken", [sys.executable, "-c", "raise SystemExit('no such thing')"], needs=0)
    (found,) = findings(run)
    assert found["exit"] == 1 and "no such thing" in found["text"]


def test_without_a_gpu_or_room(run, scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripts.gpu_run, "said", lambda *_: [])
    with pytest.raises(scripts.gpu_run.RunError, match="finds no GPU"):
        run.look()
    monkeypatch.setattr(scripts.gpu_run, "said", lambda *_: ["NVIDIA H100, 9.0, 580, 81559 MiB, 1980, 2619"])
    monkeypatch.setattr(scripts.gpu_run, "SHM_BYTES", 1 << 60)
    with pytest.raises(scripts.gpu_run.RunError, match="GB free, and the models take up to"):
        run.look()


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
    failed, skipped, counts = map(json.loads, results.read_text().splitlines())
    assert failed["test"] == "test_some.py::test_bad" and "assert 1 == 2" in failed["text"]
    assert skipped["finding"] == "test skipped" and "NOT CHECKED: that" in skipped["text"]
    assert (counts["passed"], counts["failed"], counts["ok"]) == (1, 1, False)
    with results.open("a") as file:
        file.write('{"finding": "cut')
    assert len(scripts.gpu_findings.read(results)) == 3
