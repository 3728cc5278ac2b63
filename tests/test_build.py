"""The built extension: its stub, its symbols, its version, and the pin of ggml."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pydiffusion import _native

ROOT = Path(__file__).resolve().parent.parent


def test_version_is_the_pinned_ggml() -> None:
    pinned = re.search(r"^# ggml-version: (\S+)$", (ROOT / "vendor/ggml.lock").read_text(), re.MULTILINE)
    assert pinned and _native.version()["ggml"] == pinned.group(1)


def test_the_stub_is_what_stubgen_writes(tmp_path: Path) -> None:
    pytest.importorskip("nanobind", reason="NOT CHECKED: the committed stub (nanobind is not installed)")
    fresh = tmp_path / "_native.pyi"
    command = [sys.executable, "-m", "nanobind.stubgen", "-m", "pydiffusion._native", "-o", str(fresh)]
    subprocess.run(command, check=True, capture_output=True)
    assert fresh.read_text() == (ROOT / "pydiffusion/_native.pyi").read_text(), "run: " + " ".join(
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
        ROOT / "pydiffusion", tmp_path / "pydiffusion", ignore=shutil.ignore_patterns("_native*", "demo")
    )
    done = subprocess.run(
        # -S: without site-packages, where an installed one would be found
        [sys.executable, "-S", "-c", "from pydiffusion import _native"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "run from another folder, or install" in done.stderr.splitlines()[-1]


def test_the_licences_of_all_that_is_linked_in_come_along() -> None:
    texts = {
        file.name: file.read_text(encoding="utf-8")
        for file in importlib.metadata.files("pydiffusion-gguf") or ()
        if file.name.startswith("LICENSE") and ".dist-info" in file.parts[0]
    }
    assert "Apache License" in texts["LICENSE"]
    assert "The ggml authors" in texts["LICENSE-ggml.txt"]
    assert "Wenzel Jakob" in texts["LICENSE-nanobind.txt"]
    assert "Thibaut Goetghebuer-Planchon" in texts["LICENSE-nanobind.txt"]


def fetch_module():
    spec = importlib.util.spec_from_file_location("fetch_ggml", ROOT / "vendor/fetch_ggml.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_changed_tree_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    fetch = fetch_module()
    tree = tmp_path / "ggml"
    tree.mkdir()
    (tree / "file.c").write_text("int x;")
    lock = tmp_path / "ggml.lock"
    line = f"llama-cpp-python==0 --hash=sha256:{'0' * 64}"
    lock.write_text(f"{line}\n# tree-sha256: 0\n# patched-sha256: {fetch.tree_digest(tree)}\n")
    monkeypatch.setattr(fetch, "TARGET", tree)
    monkeypatch.setattr(fetch, "LOCK", lock)
    monkeypatch.setattr(sys, "argv", ["fetch_ggml.py"])
    assert fetch.main() == 0
    (tree / "file.c").write_text("int y;")
    assert fetch.main() == 1
    assert "is not the pinned ggml" in capsys.readouterr().err


def test_patches_are_applied_once_and_without_tolerance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """A tree from before there were patches gets them; one in which a line is elsewhere is refused whole."""
    fetch = fetch_module()
    tree, patches, lock = tmp_path / "ggml", tmp_path / "patches", tmp_path / "ggml.lock"
    tree.mkdir()
    patches.mkdir()
    before = "".join(f"line {i}\n" for i in range(1, 21))
    after = before.replace("line 3\n", "third\n").replace("line 17\n", "line 17\nmore\n")
    (patches / "0001-some.patch").write_text(
        "Why.\n\n--- a/file.c\n+++ b/file.c\n@@ -2,3 +2,3 @@\n line 2\n-line 3\n+third\n line 4\n"
        "@@ -17,2 +17,3 @@ void f()\n line 17\n+more\n line 18\n"
    )
    digests = {}
    for name, text in (("patched", after), ("tree", before)):
        (tree / "file.c").write_text(text)
        digests[name] = fetch.tree_digest(tree)
    line = f"llama-cpp-python==0 --hash=sha256:{'0' * 64}"
    lock.write_text(f"{line}\n# tree-sha256: {digests['tree']}\n# patched-sha256: {digests['patched']}\n")
    for name, value in (("TARGET", tree), ("LOCK", lock), ("PATCHES", patches)):
        monkeypatch.setattr(fetch, name, value)
    monkeypatch.setattr(sys, "argv", ["fetch_ggml.py"])
    for _ in range(2):
        assert fetch.main() == 0
        assert (tree / "file.c").read_text() == after
    for text in (before.replace("line 4", "line four"), "line 0\n" + before):
        (tree / "file.c").write_text(text)
        with pytest.raises(fetch.FetchError, match=r"0001-some.patch: .*file.c, line 2: the file is not as"):
            fetch.apply_patches(tree)


def test_a_lock_without_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    fetch = fetch_module()
    lock = tmp_path / "ggml.lock"
    lock.write_text("llama-cpp-python==0.3.36\n")
    monkeypatch.setattr(fetch, "LOCK", lock)
    monkeypatch.setattr(sys, "argv", ["fetch_ggml.py"])
    assert fetch.main() == 1
    assert "no requirement line with a sha256" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="NOT CHECKED: whether the fuzzers compile (no c++)")
def test_the_fuzzers_still_compile() -> None:
    """They are built by hand, with clang: what they use of the runtime changes without them."""
    headers = ROOT / "vendor/ggml/include"
    if not headers.is_dir():
        pytest.skip("NOT CHECKED: whether the fuzzers compile (no build has put ggml into vendor/)")
    listed = (ROOT / "fuzz/CMakeLists.txt").read_text()
    missing = [file.name for file in (ROOT / "native/device").glob("*.cpp") if file.name not in listed]
    assert not missing, f"fuzz/CMakeLists.txt does not build {missing}"
    command = ["c++", "-std=c++17", "-fsyntax-only", f"-I{ROOT / 'native'}", f"-I{headers}"]
    subprocess.run([*command, *map(str, (ROOT / "fuzz").glob("*.cpp"))], check=True)
